"""All masks of an image: a grid of point prompts, then filters and non-maximum suppression."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..._optional import require
from ...ops._checks import check_positive_int
from .binary_masks import (
    COCO,
    NDIMAGE,
    NMS,
    RunLengths,
    area_of_runs,
    compress_runs,
    decode_runs,
    encode_runs,
    mask_boxes,
    remove_small_regions,
    stability_scores,
)
from .crops import Box, crop_boxes, cut_by_crop, point_grid
from .model import EfficientViTSam
from .predictor import SamPredictor, check_image_array

OUTPUTS: dict[str, Callable[[RunLengths], Any]] = {
    "binary_mask": decode_runs,
    "uncompressed_rle": lambda runs: runs,
    "coco_rle": compress_runs,
}
# Masks are enlarged to the image's size so many pixels at a time: 256 MiB of float32.
PIXELS_AT_A_TIME = 2**26


@dataclass
class Proposals:
    """N masks, as run lengths in the image, with the facts that they are filtered by; all on the CPU."""

    runs: list[RunLengths]
    boxes: Tensor  # [N, 4] (x0, y0, x1, y1), in the image
    ious: Tensor  # [N], predicted
    stabilities: Tensor  # [N]
    points: Tensor  # [N, 2], in the image
    crops: Tensor  # [N, 4]

    def select(self, index: Tensor) -> Proposals:
        runs = [self.runs[i] for i in index.tolist()]
        tensors = (self.boxes, self.ious, self.stabilities, self.points, self.crops)
        return Proposals(runs, *(tensor[index] for tensor in tensors))

    @staticmethod
    def join(parts: Sequence[Proposals]) -> Proposals:
        fields = ("boxes", "ious", "stabilities", "points", "crops")
        runs = [runs for part in parts for runs in part.runs]
        return Proposals(runs, *(torch.cat([getattr(part, field) for part in parts]) for field in fields))

    @staticmethod
    def none() -> Proposals:
        return Proposals([], torch.empty(0, 4), torch.empty(0), torch.empty(0), torch.empty(0, 2), torch.empty(0, 4))


class SamAutomaticMaskGenerator:
    """Masks of everything in an image.

    Points of a grid are prompts, on the image and on overlapping crops of it. A mask is kept if its predicted IoU and
    its stability are high enough, if it is not empty, if no crop's edge cuts it, and if no better mask has about the
    same box.

    Args:
        model: put into eval mode.
        points_per_side: the grid is points_per_side x points_per_side; None if `point_grids` are given.
        points_per_batch: prompts at a time.
        pred_iou_thresh, stability_score_thresh: least predicted IoU, least stability; 0 keeps all.
        stability_score_offset: the stability is the IoU of the masks at the thresholds -offset and +offset.
        box_nms_thresh, crop_nms_thresh: box IoU above which the lesser of two masks is dropped, within one crop and
            between crops (where the mask of the smaller crop is kept).
        crop_n_layers: layer i has 2^i x 2^i crops; 0: the image alone.
        crop_overlap_ratio: overlap of the first layer's crops, halved with each layer, relative to the short side / 2.
        crop_n_points_downscale_factor: layer i has points_per_side / factor^i points per side.
        point_grids: for each layer (x, y) [N, 2] in the unit square, in place of points_per_side.
        min_mask_region_area: holes and islands of fewer pixels are filled and removed (needs scipy); 0: they stay.
        output_mode: "binary_mask" (NumPy [H, W] bool), "uncompressed_rle" or "coco_rle" (needs pycocotools).

    Non-maximum suppression needs torchvision.

    Source: Kirillov et al., "Segment Anything" (ICCV 2023), appendix B.
    """

    def __init__(
        self,
        model: EfficientViTSam,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[npt.NDArray[Any]] | None = None,
        min_mask_region_area: float = 0,
        output_mode: str = "binary_mask",
    ) -> None:
        name = "SamAutomaticMaskGenerator"
        check_positive_int(name, "points_per_batch", points_per_batch)
        if crop_n_layers < 0:
            raise ValueError(f"{name}: crop_n_layers must be at least 0, got {crop_n_layers}")
        if output_mode not in OUTPUTS:
            raise ValueError(f"{name}: output_mode must be one of {', '.join(OUTPUTS)}, got {output_mode!r}")
        # What is missing is said now, not after minutes of work.
        needs = [NMS, *([COCO] if output_mode == "coco_rle" else []), *([NDIMAGE] if min_mask_region_area > 0 else [])]
        for module, user in needs:
            require(module, user)
        self.predictor = SamPredictor(model)
        self.point_grids = _grids(points_per_side, point_grids, crop_n_layers, crop_n_points_downscale_factor)
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode

    @torch.no_grad()
    def generate(self, image: npt.NDArray[np.uint8]) -> list[dict[str, Any]]:
        """The masks of an RGB image, uint8 [H, W, 3]; one record each.

        Keys of a record: "segmentation" (see output_mode), "area" in pixels, "bbox" [x, y, w, h] from the first to the
        last column and row, "predicted_iou", "point_coords" [[x, y]] (the prompt), "stability_score", "crop_box"
        [x, y, w, h].

        Raises:
            TypeError, ValueError: not such an image.
        """
        check_image_array("SamAutomaticMaskGenerator.generate", image)
        found = self._in_all_crops(image)
        if self.min_mask_region_area > 0:
            found = self._without_small_regions(found)
        encode = OUTPUTS[self.output_mode]
        return [
            {
                "segmentation": encode(runs),
                "area": area_of_runs(runs),
                "bbox": _xywh(found.boxes[i]),
                "predicted_iou": found.ious[i].item(),
                "point_coords": [found.points[i].tolist()],
                "stability_score": found.stabilities[i].item(),
                "crop_box": _xywh(found.crops[i]),
            }
            for i, runs in enumerate(found.runs)
        ]

    def _in_all_crops(self, image: npt.NDArray[np.uint8]) -> Proposals:
        size = (image.shape[0], image.shape[1])
        crops = crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        found = Proposals.join([self._in_crop(image, crop, self.point_grids[layer]) for crop, layer in crops])
        self.predictor.reset_image()
        if len(crops) == 1:
            return found
        areas = (found.crops[:, 2] - found.crops[:, 0]) * (found.crops[:, 3] - found.crops[:, 1])
        return found.select(_nms(found.boxes, 1 / areas, self.crop_nms_thresh))

    def _in_crop(self, image: npt.NDArray[np.uint8], crop: Box, grid: npt.NDArray[np.float64]) -> Proposals:
        x0, y0, x1, y1 = crop
        self.predictor.set_image(image[y0:y1, x0:x1])
        points = grid * (x1 - x0, y1 - y0)
        batches = [points[i : i + self.points_per_batch] for i in range(0, len(points), self.points_per_batch)]
        size = (image.shape[0], image.shape[1])
        parts = [part for batch in batches for part in self._batch(batch, crop, size)]
        found = Proposals.join([Proposals.none(), *parts])
        return found.select(_nms(found.boxes, found.ious, self.box_nms_thresh))

    def _batch(self, points: npt.NDArray[np.float64], crop: Box, size: tuple[int, int]) -> Iterator[Proposals]:
        """The good masks of some points of a crop, several masks at a time, placed in the image."""
        predictor = self.predictor
        crop_size = (crop[3] - crop[1], crop[2] - crop[0])
        framed = predictor.transform.apply_coords(points, crop_size)
        coords = torch.as_tensor(framed, dtype=torch.float32, device=predictor.device).unsqueeze(1)
        labels = torch.ones(coords.shape[:2], dtype=torch.int64, device=coords.device)
        low_res, ious = predictor.predict_low_res(coords, labels)
        prompts = torch.as_tensor(points, dtype=torch.float32).repeat_interleave(ious.shape[1], dim=0)
        low_res, ious = low_res.flatten(0, 1), ious.flatten().float()
        wanted = ious > self.pred_iou_thresh if self.pred_iou_thresh > 0 else torch.ones_like(ious, dtype=torch.bool)
        # Of the masks that are not wanted none is enlarged.
        index = wanted.nonzero().flatten()
        frame_pixels = predictor.model.image_size[0] ** 2
        at_a_time = max(1, PIXELS_AT_A_TIME // max(frame_pixels, crop_size[0] * crop_size[1]))
        for chunk in (index[i : i + at_a_time] for i in range(0, len(index), at_a_time)):
            logits = predictor.restore(low_res[chunk].unsqueeze(1), crop_size).squeeze(1)
            yield self._judge(logits, ious[chunk].cpu(), prompts[chunk.cpu()], crop, size)

    def _judge(self, logits: Tensor, ious: Tensor, points: Tensor, crop: Box, size: tuple[int, int]) -> Proposals:
        threshold = self.predictor.model.mask_threshold
        stabilities = stability_scores(logits, threshold, self.stability_score_offset)
        masks = logits > threshold
        boxes = mask_boxes(masks)
        keep = masks.flatten(1).any(dim=1) & ~cut_by_crop(boxes, crop, size)
        if self.stability_score_thresh > 0:
            keep &= stabilities >= self.stability_score_thresh
        index = keep.nonzero().flatten()
        offset = torch.tensor([crop[0], crop[1]], dtype=torch.float32)
        runs = []
        for mask in masks[index].cpu().numpy():
            whole = np.zeros(size, dtype=bool)
            whole[crop[1] : crop[3], crop[0] : crop[2]] = mask
            runs.append(encode_runs(whole))
        placed = boxes[index].cpu().float() + offset.repeat(2)
        index = index.cpu()
        crops = torch.tensor(crop, dtype=torch.float32).expand(len(index), 4)
        return Proposals(runs, placed, ious[index], stabilities.cpu()[index], points[index] + offset, crops)

    def _without_small_regions(self, found: Proposals) -> Proposals:
        """Fills and removes small regions; of masks that then coincide, one that needed no change is kept."""
        if len(found.runs) == 0:
            return found
        boxes, scores = [], []
        for i, runs in enumerate(found.runs):
            mask, changed = remove_small_regions(decode_runs(runs), self.min_mask_region_area)
            found.runs[i] = encode_runs(mask)
            boxes.append(mask_boxes(torch.from_numpy(mask).unsqueeze(0)).float())
            scores.append(float(not changed))
        found.boxes = torch.cat(boxes)
        return found.select(_nms(found.boxes, torch.tensor(scores), max(self.box_nms_thresh, self.crop_nms_thresh)))


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes that stay, best first."""
    kept: Tensor = require(*NMS).batched_nms(boxes, scores, torch.zeros(len(boxes), dtype=torch.int64), threshold)
    return kept


def _grids(
    per_side: int | None, grids: Sequence[npt.NDArray[Any]] | None, layers: int, factor: int
) -> list[npt.NDArray[np.float64]]:
    """One grid of points in the unit square per layer of crops."""
    name = "SamAutomaticMaskGenerator"
    if (per_side is None) == (grids is None):
        count = "neither" if grids is None else "both"
        raise ValueError(f"{name}: points_per_side or point_grids must be given, one of them, got {count}")
    if grids is None:
        check_positive_int(name, "points_per_side", per_side)
        check_positive_int(name, "crop_n_points_downscale_factor", factor)
        assert per_side is not None
        return [point_grid(max(1, int(per_side / factor**layer))) for layer in range(layers + 1)]
    checked = [np.asarray(grid, dtype=np.float64) for grid in grids]
    if len(checked) < layers + 1 or any(grid.ndim != 2 or grid.shape[1] != 2 for grid in checked):
        shapes = [list(grid.shape) for grid in checked]
        raise ValueError(f"{name}: point_grids must be {layers + 1} arrays [N, 2], one per layer, got {shapes}")
    return checked


def _xywh(box: Tensor) -> list[int]:
    x0, y0, x1, y1 = (int(end) for end in box.tolist())
    return [x0, y0, x1 - x0, y1 - y0]
