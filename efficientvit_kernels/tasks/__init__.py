"""What the models do with image files: classify, segment, mask, reconstruct and enlarge; imported on first use.

`python -m efficientvit_kernels classify | segment | sam | reconstruct | upscale` is made of these functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names

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

_HOMES = {
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
__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES, needs="numpy")
