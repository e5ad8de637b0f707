"""Fused multi-scale linear attention (LiteMLA) for EfficientViT and its relatives.

Everything is imported on first use: importing this package loads neither triton nor a native library and leaves CUDA
untouched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazy_names

if TYPE_CHECKING:
    from . import models as models
    from ._info import info as info
    from .integrations import Report as Report
    from .integrations import accelerate as accelerate
    from .integrations import restore as restore
    from .nn import FusedLiteMLA as FusedLiteMLA
    from .nn import LiteMLA as LiteMLA
    from .ops.lite_mla import lite_mla as lite_mla
    from .ops.multiscale_aggregate import multiscale_aggregate as multiscale_aggregate
    from .ops.relu_linear_attention import relu_linear_attention as relu_linear_attention

__version__ = "0.1.0"

_HOMES = {
    "FusedLiteMLA": ".nn",
    "LiteMLA": ".nn",
    "Report": ".integrations",
    "accelerate": ".integrations",
    "info": "._info",
    "lite_mla": ".ops",
    "models": ".models",
    "multiscale_aggregate": ".ops",
    "relu_linear_attention": ".ops",
    "restore": ".integrations",
}
__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
