"""From RGB pixels to what each kind of model was trained on: the official rules."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._optional import require
from .images import Pixels, to_pillow

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEGMENTATION_STRIDE = 32
CITYSCAPES_SIZE = (1024, 2048)
ADE20K_SHORT_SIDE = 512
LONGEST_STRIP = 64

# Short side before the crop = ceil(size / ratio). b0, for which no official command was published, is taken as b1.
CROP_RATIOS = {"efficientvit-b0": 0.95, "efficientvit-b1": 0.95}


def pixels_to_tensor(pixels: Pixels) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, H, W], 0 to 255."""
    return torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1).unsqueeze(0).float()


def tensor_to_pixels(rgb: Tensor) -> Pixels:
    """[1, 3, H, W] in [0, 1] -> uint8 [H, W, 3], clamped and rounded to the nearest."""
    values = (rgb[0].float() * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy())


def normalise(values: Tensor) -> Tensor:
    """(x / 255 - mean) / std per channel, of RGB values 0 to 255 [B, 3, H, W]: ImageNet's mean and deviation."""
    mean, std = (values.new_tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    return (values / 255 - mean) / std


def classification_input(pixels: Pixels, size: int, crop_ratio: float = 1.0) -> Tensor:
    """uint8 [H, W, 3] -> normalised [1, 3, size, size].

    The short side is resized to ceil(size / crop_ratio), the long one to the same scale, rounded down, with Pillow's
    bicubic filter; the central square is cut out. Of an image more than `LONGEST_STRIP` times as long as it is wide
    only the middle is resized: the whole of a strip of 100000 x 1 pixels would take gigabytes.
    """
    bicubic = require("PIL.Image", "classification_input").Resampling.BICUBIC
    pixels = _middle(pixels, LONGEST_STRIP * min(pixels.shape[:2]))
    height, width = pixels.shape[:2]
    short = math.ceil(size / crop_ratio)
    height, width = (short * side // min(height, width) for side in (height, width))
    resized = np.asarray(to_pillow(pixels).resize((width, height), bicubic))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return normalise(pixels_to_tensor(resized[top : top + size, left : left + size]))


def _middle(pixels: Pixels, longest: int) -> Pixels:
    """The image without what exceeds `longest` pixels at its ends."""
    top, left = (max(0, side - longest) // 2 for side in pixels.shape[:2])
    return pixels[top : top + longest, left : left + longest]


def segmentation_size(dataset: str, height: int, width: int) -> tuple[int, int]:
    """The official height and width for evaluation.

    "cityscapes": 1024 x 2048, whatever the image (those of the dataset have that size, or that shape). "ade20k": the
    short side 512, the long one ceil(long / short * 512 / 32) * 32.
    """
    if dataset == "cityscapes":
        return CITYSCAPES_SIZE
    short, long = min(height, width), max(height, width)
    stride = SEGMENTATION_STRIDE
    scaled = math.ceil(long / short * ADE20K_SHORT_SIDE / stride) * stride
    return (ADE20K_SHORT_SIDE, scaled) if height <= width else (scaled, ADE20K_SHORT_SIDE)


def resize_cubic(values: Tensor, size: tuple[int, int]) -> Tensor:
    """OpenCV's cubic resizing of 8-bit images: A = -0.75, no antialiasing, rounded to 0..255; [B, 3, H, W]."""
    if tuple(values.shape[2:]) == size:
        return values
    resized = F.interpolate(values, size, mode="bicubic", align_corners=False)
    return resized.round().clamp(0, 255)


def pad_to_multiple(x: Tensor, multiple: int, mode: str = "constant") -> Tensor:
    """[B, C, H, W] with rows below and columns to the right, so that H and W are positive multiples of `multiple`.

    `mode`: "constant" (zeros) or "replicate" (the last row and column).
    """
    bottom, right = (-side % multiple for side in x.shape[2:])
    return F.pad(x, (0, right, 0, bottom), mode=mode) if bottom or right else x
