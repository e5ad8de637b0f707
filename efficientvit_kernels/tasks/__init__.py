"""What the models do with image files: classify, segment, mask, reconstruct and enlarge; imported on first use.

`python -m efficientvit_kernels classify | segment | sam | reconstruct | upscale` is made of these functions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Problem as Problem
    from .classify import Classification as Classification
    from .classify import classify_images as classify_images
    from .images import ImageError as ImageError
    from .images import read_image as read_image
    from .reconstruct import Reconstruction as Reconstruction
    from .reconstruct import reconstruct_images as reconstruct_images
    from .sam import ImageMasks as ImageMasks
    from .sam import mask_images as mask_images
    from .segment import Segmentation as Segmentation
    from .segment import segment_images as segment_images
    from .upscale import Upscaled as Upscaled
    from .upscale import upscale_images as upscale_images

_HOME = {
    "Classification": ".classify",
    "ImageError": ".images",
    "ImageMasks": ".sam",
    "Problem": ".batch",
    "Reconstruction": ".reconstruct",
    "Segmentation": ".segment",
    "Upscaled": ".upscale",
    "classify_images": ".classify",
    "mask_images": ".sam",
    "read_image": ".images",
    "reconstruct_images": ".reconstruct",
    "segment_images": ".segment",
    "upscale_images": ".upscale",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .._optional import require

    require("numpy", name)  # the modules import it at their top; this error says how to install it
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
