"""Where the automatic mask generator looks: grids of points, overlapping crops of the image."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Box = tuple[int, int, int, int]  # x0, y0, x1, y1, ends excluded

EDGE_DISTANCE = 20.0  # pixels; a box so close to a crop's edge is cut off by it


def point_grid(per_side: int) -> npt.NDArray[np.float64]:
    """Centres of per_side x per_side cells of the unit square, (x, y) [per_side^2, 2]."""
    centres = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(centres, centres)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def crop_boxes(size: tuple[int, int], layers: int, overlap_ratio: float) -> list[tuple[Box, int]]:
    """The whole image (layer 0), then per layer i a grid of 2^i x 2^i crops, each with its layer.

    Crops of layer i overlap by overlap_ratio * 2 / 2^i of the image's short side. size = (H, W).
    """
    height, width = size
    crops: list[tuple[Box, int]] = [((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(size) * 2 / per_side)
        crop_width, crop_height = (math.ceil((overlap * (per_side - 1) + side) / per_side) for side in (width, height))
        for column, row in product(range(per_side), repeat=2):
            x0, y0 = column * (crop_width - overlap), row * (crop_height - overlap)
            x1, y1 = min(x0 + crop_width, width), min(y0 + crop_height, height)
            if x0 < x1 and y0 < y1:  # an image of few pixels has fewer crops
                crops.append(((x0, y0, x1, y1), layer))
    return crops


def cut_by_crop(boxes: Tensor, crop: Box, size: tuple[int, int]) -> Tensor:
    """Which boxes [N, 4] (in pixels of the crop) end near an edge of the crop that is not an edge of the image: [N]."""
    x0, y0 = crop[:2]
    placed = boxes.to(torch.float32) + boxes.new_tensor([x0, y0, x0, y0], dtype=torch.float32)
    edges = placed.new_tensor(crop)
    image = placed.new_tensor([0, 0, size[1], size[0]])
    near_crop, near_image = ((placed - edge).abs() <= EDGE_DISTANCE for edge in (edges, image))
    return (near_crop & ~near_image).any(dim=1)
