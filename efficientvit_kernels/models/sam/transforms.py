"""Images and prompts into the models' frames, and masks out of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..._optional import require


def resized_size(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Height and width scaled so that the longer is `long_side`, rounded to the nearest, at least 1."""
    scale = long_side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class ResizeLongestSide:
    """Images, and points and boxes in their pixels, to the size whose longer side is `long_side`."""

    def __init__(self, long_side: int) -> None:
        self.long_side = long_side

    def apply_image(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """[H, W, 3] uint8, resized bilinearly with antialiasing (Pillow's); as it is if the size is right already."""
        size = resized_size(image.shape[0], image.shape[1], self.long_side)
        if size == image.shape[:2]:
            return image
        pil = require("PIL.Image", "ResizeLongestSide.apply_image")
        resized = pil.fromarray(np.ascontiguousarray(image)).resize(size[::-1], pil.Resampling.BILINEAR)
        return np.asarray(resized)

    def apply_coords(self, coords: npt.ArrayLike, original_size: tuple[int, int]) -> npt.NDArray[np.float64]:
        """(x, y) pairs [..., 2] in pixels of the original [H, W] image -> in pixels of the resized one."""
        return np.multiply(coords, self._scales(original_size), dtype=np.float64)

    def apply_boxes(self, boxes: npt.ArrayLike, original_size: tuple[int, int]) -> npt.NDArray[np.float64]:
        """(x0, y0, x1, y1) [..., 4], as `apply_coords`."""
        return np.multiply(boxes, 2 * self._scales(original_size), dtype=np.float64)

    def apply_coords_torch(self, coords: Tensor, original_size: tuple[int, int]) -> Tensor:
        """`apply_coords` for tensors, in float32 at least."""
        return _scaled(coords, self._scales(original_size))

    def apply_boxes_torch(self, boxes: Tensor, original_size: tuple[int, int]) -> Tensor:
        """`apply_boxes` for tensors, in float32 at least."""
        return _scaled(boxes, 2 * self._scales(original_size))

    def _scales(self, original_size: tuple[int, int]) -> tuple[float, ...]:
        height, width = original_size
        new_height, new_width = resized_size(height, width, self.long_side)
        return new_width / width, new_height / height


def _scaled(positions: Tensor, scales: tuple[float, ...]) -> Tensor:
    positions = positions.to(torch.promote_types(positions.dtype, torch.float32))
    return positions * positions.new_tensor(scales)


def restore_masks(masks: Tensor, frame: int, input_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
    """Low-resolution logits [B, M, h, w] -> logits [B, M, *original_size], bilinear by way of the square frame.

    The frame of side `frame` holds the image in its top-left corner of size `input_size`. 16-bit logits are
    interpolated and returned in float32.
    """
    if 0 in masks.shape[:2]:  # interpolate takes no empty batch
        return masks.new_empty((*masks.shape[:2], *original_size))
    masks = masks.to(torch.promote_types(masks.dtype, torch.float32))
    masks = F.interpolate(masks, (frame, frame), mode="bilinear", align_corners=False)
    masks = masks[..., : input_size[0], : input_size[1]]
    return F.interpolate(masks, original_size, mode="bilinear", align_corners=False)
