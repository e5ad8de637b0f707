"""Images of twice the size."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .._optional import require
from ..ops._checks import check_positive_int
from .batch import Problem, check_finite, each_image, to_model
from .images import Pixels, save_png, to_pillow
from .job import Job
from .options import UsageError
from .preprocess import pixels_to_tensor, tensor_to_pixels

SCALE = 2


@dataclass(frozen=True)
class Upscaled:
    """pixels: the image; enlarged: twice its size, by the model; bicubic: twice its size, by Pillow's filter."""

    path: Path
    pixels: Pixels
    enlarged: Pixels
    bicubic: Pixels


def upscale_images(
    model: nn.Module,
    paths: Iterable[str | os.PathLike[str]],
    *,
    tile: int = 512,
    overlap: int = 32,
    problems: list[Problem] | None = None,
    progress: bool = False,
) -> Iterator[Upscaled]:
    """Image files at twice their size.

    Args:
        model: in eval mode, RGB in [0, 1] [1, 3, H, W] -> [1, 3, 2H, 2W], such as
            `create_model("efficientvit-sr-w1.0", weights)`.
        tile, overlap: see `upscale`.
        problems, progress: see `batch.each_image`.

    Raises:
        ValueError, TypeError: tile is not a positive int, or overlap not in [0, tile / 2].
        ImageError, RuntimeError: an image cannot be read; the output is not finite; if `problems` is None.
    """
    _check_tiles(tile, overlap)

    def work(path: Path, pixels: Pixels) -> Upscaled:
        with torch.inference_mode():
            enlarged = tensor_to_pixels(upscale(model, pixels_to_tensor(pixels) / 255, tile, overlap))
        height, width = pixels.shape[:2]
        bicubic = require("PIL.Image", "upscale_images").Resampling.BICUBIC
        plain = np.array(to_pillow(pixels).resize((SCALE * width, SCALE * height), bicubic))
        return Upscaled(path, pixels, enlarged, plain)

    return each_image(paths, work, problems, progress)


def upscale(model: nn.Module, rgb: Tensor, tile: int, overlap: int) -> Tensor:
    """[1, 3, H, W] in [0, 1] -> float32 [1, 3, 2H, 2W] on the CPU, in tiles of at most tile x tile pixels.

    Neighbouring tiles share at least `overlap` pixels. There both results are mixed, with weights that fall linearly
    from the inside of a tile to its edge and add up to one, so that no seam is sharp.
    """
    height, width = rgb.shape[2:]
    total = rgb.new_zeros(1, 3, SCALE * height, SCALE * width)
    for y0, y1, rows in _tiles(height, tile, overlap):
        for x0, x1, columns in _tiles(width, tile, overlap):
            out = check_finite(model(to_model(model, rgb[..., y0:y1, x0:x1]))).cpu()
            total[..., SCALE * y0 : SCALE * y1, SCALE * x0 : SCALE * x1] += out * rows[:, None] * columns
    return total


def _tiles(length: int, tile: int, overlap: int) -> list[tuple[int, int, Tensor]]:
    """Start, end, and the weights [SCALE * (end - start)] of the tiles along one axis; weights add up to one."""
    if length <= tile:
        return [(0, length, torch.ones(SCALE * length))]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    weights, total = [], torch.zeros(SCALE * length)
    for start in starts:
        inside = torch.arange(SCALE * tile) + 0.5
        ramp = torch.minimum(inside, SCALE * tile - inside) / max(1, SCALE * overlap)
        weight = ramp.clamp(max=1.0) if overlap else torch.ones_like(ramp)
        weights.append(weight)
        total[SCALE * start : SCALE * (start + tile)] += weight
    return [
        (start, start + tile, weight / total[SCALE * start : SCALE * (start + tile)])
        for start, weight in zip(starts, weights, strict=True)
    ]


def _check_tiles(tile: int, overlap: int) -> None:
    check_positive_int("upscale_images", "tile", tile)
    if not 0 <= overlap <= tile // 2:
        raise ValueError(f"upscale_images: overlap must be from 0 to tile / 2 = {tile // 2}, got {overlap}")


def run(arguments: argparse.Namespace) -> int:
    """The command `upscale`: per image <name>_upscaled.png and <name>_bicubic.png, both of twice its size."""
    try:
        _check_tiles(arguments.tile, arguments.overlap)
    except ValueError as error:
        raise UsageError(str(error)) from error
    job = Job(arguments)
    if not job.paths:
        return job.finish([])
    records = []
    results = upscale_images(
        job.model, job.paths, tile=arguments.tile, overlap=arguments.overlap, problems=job.problems, progress=True
    )
    for result in results:
        files = [job.path(result.path, suffix) for suffix in ("upscaled.png", "bicubic.png")]
        save_png(result.enlarged, files[0])
        save_png(result.bicubic, files[1])
        records.append(job.record(result.path, result.pixels.shape[:2], files))
    return job.finish(records)
