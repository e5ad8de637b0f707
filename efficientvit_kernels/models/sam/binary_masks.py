"""Binary masks: stability, boxes, run lengths, small regions."""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..._optional import require

# What needs which module, for `require`.
COCO = ("pycocotools.mask", "output_mode 'coco_rle'")
NDIMAGE = ("scipy.ndimage", "min_mask_region_area")
NMS = ("torchvision.ops", "SamAutomaticMaskGenerator")

Mask = npt.NDArray[np.bool_]


class RunLengths(TypedDict):
    """COCO's uncompressed run-length encoding: `size` = [H, W]; `counts`: runs of 0, 1, 0, ... down the columns."""

    size: list[int]
    counts: list[int]


def encode_runs(mask: Mask) -> RunLengths:
    """[H, W] -> run lengths; the first run, of zeros, may be empty."""
    columns = np.asarray(mask, dtype=bool).T.ravel()
    changes = np.flatnonzero(columns[1:] != columns[:-1]) + 1
    starts_with_one = bool(columns.size > 0 and columns[0])
    bounds = np.concatenate([[0, 0] if starts_with_one else [0], changes, [columns.size]])
    return {"size": list(mask.shape), "counts": np.diff(bounds).tolist()}


def decode_runs(runs: RunLengths) -> Mask:
    """The mask [H, W] that `encode_runs` encoded."""
    height, width = runs["size"]
    values = np.arange(len(runs["counts"])) % 2 == 1
    return np.repeat(values, runs["counts"]).reshape(width, height).T


def area_of_runs(runs: RunLengths) -> int:
    return sum(runs["counts"][1::2])


def compress_runs(runs: RunLengths) -> dict[str, Any]:
    """COCO's compressed encoding, as JSON can hold it: {"size": [H, W], "counts": str}."""
    compressed = require(*COCO).frPyObjects(runs, *runs["size"])
    return {"size": list(compressed["size"]), "counts": compressed["counts"].decode("ascii")}


def stability_scores(logits: Tensor, threshold: float, offset: float) -> Tensor:
    """IoU of the masks cut at threshold + offset and at threshold - offset, [N, H, W] -> [N]; 0 for empty masks."""
    # int64: an image may have more pixels than float32 counts exactly.
    inner, outer = ((logits > threshold + shift).flatten(1).sum(1) for shift in (offset, -offset))
    return torch.where(outer > 0, inner / outer, torch.zeros_like(inner, dtype=torch.float32))


def mask_boxes(masks: Tensor) -> Tensor:
    """(x0, y0, x1, y1) of the first and last columns and rows of masks [N, H, W] -> [N, 4]; zeros for empty masks."""
    ends = []
    for lines in (masks.any(dim=1), masks.any(dim=2)):  # columns, rows
        index = torch.arange(lines.shape[1], device=masks.device)
        first = torch.where(lines, index, lines.shape[1]).amin(dim=1)
        last = torch.where(lines, index, -1).amax(dim=1)
        ends.append((first, last))
    (x0, x1), (y0, y1) = ends
    boxes = torch.stack([x0, y0, x1, y1], dim=1)
    return boxes * (x1 >= x0).unsqueeze(1)


def remove_small_regions(mask: Mask, min_area: float) -> tuple[Mask, bool]:
    """Fills holes, then removes islands, of less than `min_area` pixels; and whether anything changed.

    Pixels that touch at a corner are connected, in holes and islands alike. The largest island always stays.
    """
    filled = mask | _small_regions(~mask, min_area)
    islands = _small_regions(filled, min_area, keep_largest=True)
    cleaned = filled & ~islands
    return cleaned, bool((cleaned != mask).any())


def _small_regions(mask: Mask, min_area: float, keep_largest: bool = False) -> Mask:
    labels, count = require(*NDIMAGE).label(mask, structure=np.ones((3, 3)))
    if count == 0:
        return np.zeros_like(mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    small = areas < min_area
    small[0] = False
    if keep_largest:
        small[1 + int(areas[1:].argmax())] = False
    return np.asarray(small[labels])
