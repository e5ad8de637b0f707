"""Training runs that stop and go on without loss: the loop, its state on disk, ranks, logs; imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .distributed import Ranks as Ranks
    from .distributed import start_ranks as start_ranks
    from .distributed import start_run as start_run
    from .image_quality import luma as luma
    from .image_quality import psnr as psnr
    from .image_quality import ssim as ssim
    from .loop import Trainer as Trainer
    from .optim import cosine_with_warmup as cosine_with_warmup
    from .optim import parameter_groups as parameter_groups
    from .settings import Settings as Settings

_HOMES = {
    "Ranks": ".distributed",
    "Settings": ".settings",
    "Trainer": ".loop",
    "cosine_with_warmup": ".optim",
    "luma": ".image_quality",
    "parameter_groups": ".optim",
    "psnr": ".image_quality",
    "ssim": ".image_quality",
    "start_ranks": ".distributed",
    "start_run": ".distributed",
}
__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
