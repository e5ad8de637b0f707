"""The class of every pixel."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Problem, check_finite, each_image, to_model
from .class_names import SEGMENTATION
from .drawing import beside, tint
from .images import Pixels, save_png, to_pillow
from .job import Job
from .palettes import palette_of
from .preprocess import (
    SEGMENTATION_STRIDE,
    normalise,
    pad_to_multiple,
    pixels_to_tensor,
    resize_cubic,
    segmentation_size,
)

RESIZES = ("official", "none")
# An image so long and narrow that its official size has more pixels than this is taken at its own size.
MOST_OFFICIAL_PIXELS = 2**24
LOGITS_AT_A_TIME = 2**26  # 256 MiB of float32
LEAST_SHOWN = 0.001  # share of the image, for a line in the legend


@dataclass(frozen=True)
class Segmentation:
    """labels: the class of every pixel, uint8 [H, W]; pixels: the image; input_size: what the model saw, [H, W]."""

    path: Path
    pixels: Pixels
    labels: npt.NDArray[np.uint8]
    input_size: tuple[int, int]

    def shares(self) -> dict[int, float]:
        """Class -> its share of the pixels, the largest first."""
        counts = np.bincount(self.labels.ravel())
        order = np.argsort(-counts, kind="stable")
        return {int(i): float(counts[i] / self.labels.size) for i in order if counts[i]}


def segment_images(
    model: nn.Module,
    paths: Iterable[str | os.PathLike[str]],
    *,
    dataset: str,
    resize: str = "official",
    problems: list[Problem] | None = None,
    progress: bool = False,
) -> Iterator[Segmentation]:
    """The classes of the pixels of image files, at the size of the image.

    Args:
        model: in eval mode, [1, 3, H, W] with H and W multiples of 32 -> logits [1, classes <= 256, H/8, W/8], such as
            `create_model("efficientvit-seg-b1-ade20k", weights)`.
        dataset: "cityscapes" or "ade20k", which the model was trained on.
        resize: "official": the input is resized to `preprocess.segmentation_size` with OpenCV's cubic filter, and the
            logits to the image with torch's, as in the official evaluation. An image for which that would be more than
            `MOST_OFFICIAL_PIXELS` is done as with "none": the image at its own size, with zeros (the mean colour) below
            and to the right up to a multiple of 32; the logits are enlarged 8 times and cropped.
        problems, progress: see `batch.each_image`.

    Raises:
        ValueError: another dataset or resize.
        ImageError, RuntimeError: an image cannot be read; the logits are not finite; if `problems` is None.
    """
    if dataset not in SEGMENTATION:
        raise ValueError(f"segment_images: dataset must be one of {', '.join(SEGMENTATION)}, got {dataset!r}")
    if resize not in RESIZES:
        raise ValueError(f"segment_images: resize must be one of {', '.join(RESIZES)}, got {resize!r}")

    def work(path: Path, pixels: Pixels) -> Segmentation:
        values, size = pixels_to_tensor(pixels), (pixels.shape[0], pixels.shape[1])
        official = segmentation_size(dataset, *size)
        official_applies = resize == "official" and official[0] * official[1] <= MOST_OFFICIAL_PIXELS
        x = normalise(resize_cubic(values, official) if official_applies else values)
        x = pad_to_multiple(x, SEGMENTATION_STRIDE)
        with torch.inference_mode():
            logits = check_finite(model(to_model(model, x)))
            enlarged = size if official_applies else (x.shape[2], x.shape[3])
            labels = classes_of(logits, enlarged)[: size[0], : size[1]]
        return Segmentation(path, pixels, np.ascontiguousarray(labels.cpu().numpy()), (x.shape[2], x.shape[3]))

    return each_image(paths, work, problems, progress)


def classes_of(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """argmax over the classes of logits [1, C, h, w], resized bicubically to `size`; uint8 [*size].

    A few classes at a time: 150 of them at the size of a photograph would take gigabytes. Of equals the first wins.
    """
    best = logits.new_full(size, -torch.inf)
    labels = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    at_a_time = max(1, LOGITS_AT_A_TIME // (size[0] * size[1]))
    for start in range(0, logits.shape[1], at_a_time):
        part = F.interpolate(logits[:, start : start + at_a_time], size, mode="bicubic", align_corners=False)
        values, index = part[0].max(dim=0)
        better = values > best
        best = torch.where(better, values, best)
        labels = torch.where(better, (index + start).to(torch.uint8), labels)
    return labels


def overlay(result: Segmentation, palette: Pixels, names: tuple[str, ...]) -> Any:
    """A Pillow image: the classes' colours over the image, and a legend of those with at least a thousandth of it."""
    entries: list[tuple[tuple[int, int, int], str]] = []
    for index, share in result.shares().items():
        if share >= LEAST_SHOWN:
            red, green, blue = palette[index].tolist()
            entries.append(((red, green, blue), f"{names[index]} {share:.1%}"))
    return beside(tint(result.pixels, palette[result.labels]), entries)


def run(arguments: argparse.Namespace) -> int:
    """The command `segment`: per image <name>_overlay.png and <name>_labels.png (class numbers, as a palette image)."""
    job = Job(arguments)
    if not job.paths:
        return job.finish([])
    dataset = job.model_name.rpartition("-")[2]
    names = SEGMENTATION[dataset]
    palette = palette_of(dataset, len(names))
    records = []
    results = segment_images(
        job.model, job.paths, dataset=dataset, resize=arguments.resize, problems=job.problems, progress=True
    )
    for result in results:
        files = [job.path(result.path, suffix) for suffix in ("overlay.png", "labels.png")]
        save_png(overlay(result, palette, names), files[0])
        labels = to_pillow(result.labels)
        labels.putpalette(palette.tobytes())
        save_png(labels, files[1])
        shares = {names[index]: round(share, 6) for index, share in result.shares().items()}
        size = (result.pixels.shape[0], result.pixels.shape[1])
        records.append(job.record(result.path, size, files, input_size=list(result.input_size), classes=shares))
    return job.finish(records)
