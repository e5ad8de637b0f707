"""Masks of image files: of one object, from points and a box, or of everything."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .._files import written_whole
from ..models.sam import EfficientViTSam, SamAutomaticMaskGenerator, SamPredictor
from ..models.sam.binary_masks import RunLengths, area_of_runs, decode_runs, encode_runs
from .batch import Problem, each_image
from .drawing import draw_prompts, tint_mask
from .images import Pixels, save_png
from .job import Job
from .palettes import generated_palette

Point = tuple[float, float, int]  # x, y, label: 1 on the object, 0 off it
Box = tuple[float, float, float, float]  # x0, y0, x1, y1


@dataclass(frozen=True)
class Mask:
    """A mask as run lengths, its predicted IoU, and what the automatic generator says more of it."""

    runs: RunLengths
    score: float
    facts: dict[str, Any]

    def array(self) -> npt.NDArray[np.bool_]:
        """[H, W]."""
        return decode_runs(self.runs)

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold: score, area, bbox [x0, y0, x1, y1] with both ends inside (None if empty), the facts."""
        rows, columns = np.nonzero(self.array())
        box = [int(end) for end in (columns.min(), rows.min(), columns.max(), rows.max())] if len(rows) else None
        return {"score": self.score, "area": area_of_runs(self.runs), "bbox": box, **self.facts}


@dataclass(frozen=True)
class ImageMasks:
    """The masks of an image, the best first."""

    path: Path
    pixels: Pixels
    masks: tuple[Mask, ...]


def mask_images(
    model: EfficientViTSam,
    paths: Iterable[str | os.PathLike[str]],
    *,
    points: Sequence[Point] = (),
    box: Box | None = None,
    points_per_side: int = 32,
    problems: list[Problem] | None = None,
    progress: bool = False,
    **options: Any,
) -> Iterator[ImageMasks]:
    """The masks of image files.

    With points or a box: those of the one object that they are all about, in every image. A single point is ambiguous
    and gets three masks; more prompts get one. Without: those of everything.

    Args:
        model: such as `create_model("efficientvit-sam-l0", weights)`; put into eval mode.
        points: (x, y, label) in pixels of the upright image; label 1 on the object, 0 off it.
        box: (x0, y0, x1, y1) likewise.
        points_per_side, options: of `SamAutomaticMaskGenerator`, which finds everything.
        problems, progress: see `batch.each_image`.

    Raises:
        ImageError, ValueError: an image cannot be read; a prompt lies outside it; if `problems` is None.
        ImportError: torchvision is missing, which everything needs.
    """
    if points or box is not None:
        predictor = SamPredictor(model)

        def work(path: Path, pixels: Pixels) -> ImageMasks:
            return ImageMasks(path, pixels, _prompted(predictor, pixels, points, box))

    else:
        generator = SamAutomaticMaskGenerator(
            model, points_per_side=points_per_side, output_mode="uncompressed_rle", **options
        )

        def work(path: Path, pixels: Pixels) -> ImageMasks:
            return ImageMasks(path, pixels, _everything(generator, pixels))

    return each_image(paths, work, problems, progress)


def _prompted(predictor: SamPredictor, pixels: Pixels, points: Sequence[Point], box: Box | None) -> tuple[Mask, ...]:
    height, width = pixels.shape[:2]
    corners = [] if box is None else [box[:2], box[2:]]
    for x, y in [*((x, y) for x, y, _ in points), *corners]:
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"points and box must lie in the image of {width} x {height} pixels, got {x:g},{y:g}")
    predictor.set_image(pixels)
    masks, scores, _ = predictor.predict(
        np.array([point[:2] for point in points], dtype=np.float64) if points else None,
        np.array([point[2] for point in points]) if points else None,
        None if box is None else np.array(box, dtype=np.float64),
        multimask_output=len(points) == 1 and box is None,
    )
    predictor.reset_image()
    if not np.isfinite(scores).all():
        raise RuntimeError("the model's output is not finite; damaged weights, or a dtype that is too narrow")
    order = np.argsort(-scores, kind="stable")
    return tuple(Mask(encode_runs(masks[i]), float(scores[i]), {}) for i in order)


def _everything(generator: SamAutomaticMaskGenerator, pixels: Pixels) -> tuple[Mask, ...]:
    records = sorted(generator.generate(pixels), key=lambda record: -record["predicted_iou"])
    facts = ("stability_score", "point_coords")
    return tuple(
        Mask(record["segmentation"], record["predicted_iou"], {name: record[name] for name in facts})
        for record in records
    )


def overlay(result: ImageMasks, points: Sequence[Point] = (), box: Box | None = None) -> Pixels:
    """The masks over the image, each in a colour of its own, the smallest on top; prompts get the best mask only."""
    pixels = result.pixels.copy()
    masks = result.masks[:1] if points or box is not None else result.masks
    by_area = sorted(masks, key=lambda mask: -area_of_runs(mask.runs))
    for mask, colour in zip(by_area, generated_palette(len(by_area)), strict=True):
        tint_mask(pixels, mask.array(), colour)
    return draw_prompts(pixels, points, box) if points or box is not None else pixels


def write_npz(masks: Sequence[Mask], path: Path) -> None:
    """An .npz file that numpy.load reads: mask_000, mask_001, ... bool [H, W]; scores [M] float64."""
    with written_whole(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("scores.npy", "w") as file:
            np.lib.format.write_array(file, np.array([mask.score for mask in masks], dtype=np.float64))
        for number, mask in enumerate(masks):  # one at a time: hundreds of them would fill the memory
            with archive.open(f"mask_{number:03}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, mask.array())


def run(arguments: argparse.Namespace) -> int:
    """The command `sam`: per image <name>_overlay.png, and <name>_mask_000.png, ... or <name>_masks.npz, best first."""
    job = Job(arguments)
    if not job.paths:
        return job.finish([])
    assert isinstance(job.model, EfficientViTSam)
    prompts: dict[str, Any] = {"points": tuple(arguments.point), "box": arguments.box}
    records = []
    for result in mask_images(
        job.model,
        job.paths,
        **prompts,
        points_per_side=arguments.points_per_side,
        problems=job.problems,
        progress=True,
        pred_iou_thresh=arguments.iou,
        stability_score_thresh=arguments.stability,
    ):
        picture = job.path(result.path, "overlay.png")
        save_png(overlay(result, **prompts), picture)
        files = [picture, *_write_masks(job, result, arguments.format)]
        size = (result.pixels.shape[0], result.pixels.shape[1])
        records.append(job.record(result.path, size, files, masks=[mask.as_dict() for mask in result.masks]))
    return job.finish(records)


def _write_masks(job: Job, result: ImageMasks, form: str) -> list[Path]:
    if form == "npz":
        path = job.path(result.path, "masks.npz")
        write_npz(result.masks, path)
        return [path]
    paths = [job.path(result.path, f"mask_{number:03}.png") for number in range(len(result.masks))]
    for mask, path in zip(result.masks, paths, strict=True):
        save_png(mask.array(), path)
    return paths
