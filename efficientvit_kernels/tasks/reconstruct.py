"""Images through an autoencoder and back."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..models.dc_ae import DCAE
from ..training.image_quality import psnr
from .batch import Problem, check_finite, each_image, say, to_model
from .images import Pixels, save_png, shown
from .job import Job
from .preprocess import pad_to_multiple, pixels_to_tensor, tensor_to_pixels


@dataclass(frozen=True)
class Reconstruction:
    """pixels: the image; decoded: what came back, of the same size; psnr: in dB, over all channels, inf if they
    are equal."""

    path: Path
    pixels: Pixels
    decoded: Pixels
    latent_shape: tuple[int, ...]  # channels, height, width
    psnr: float


def reconstruct_images(
    model: DCAE,
    paths: Iterable[str | os.PathLike[str]],
    *,
    problems: list[Problem] | None = None,
    progress: bool = False,
) -> Iterator[Reconstruction]:
    """Encodes and decodes image files.

    The model sees RGB / 127.5 - 1. The last row and column are repeated up to a multiple of the model's compression
    ratio; what comes back is cropped, clamped and rounded to 8 bits, and compared as such.

    Args:
        model: in eval mode, such as `create_model("dc-ae-f32c32-in-1.0", weights)`.
        problems, progress: see `batch.each_image`.

    Raises:
        ImageError, RuntimeError: an image cannot be read; the output is not finite; if `problems` is None.
    """

    def work(path: Path, pixels: Pixels) -> Reconstruction:
        height, width = pixels.shape[:2]
        x = pad_to_multiple(pixels_to_tensor(pixels) / 127.5 - 1, model.spatial_compression_ratio, "replicate")
        with torch.inference_mode():
            latent = model.encode(to_model(model, x))
            decoded = check_finite(model.decode(latent)[..., :height, :width])
        back = tensor_to_pixels((decoded + 1) / 2)
        found, expected = (pixels_to_tensor(image).double() / 255 for image in (back, pixels))
        return Reconstruction(path, pixels, back, tuple(latent.shape[1:]), float(psnr(found, expected)))

    return each_image(paths, work, problems, progress)


def run(arguments: argparse.Namespace) -> int:
    """The command `reconstruct`: per image <name>_reconstructed.png and its PSNR, in JSON null where it is infinite."""
    job = Job(arguments)
    if not job.paths:
        return job.finish([])
    assert isinstance(job.model, DCAE)
    records = []
    for result in reconstruct_images(job.model, job.paths, problems=job.problems, progress=True):
        file = job.path(result.path, "reconstructed.png")
        save_png(result.decoded, file)
        height, width = result.pixels.shape[:2]
        latent = list(result.latent_shape)
        say(f"{shown(result.path)} ({width} x {height}): PSNR {result.psnr:.2f} dB, latent {latent}")
        finite = result.psnr if math.isfinite(result.psnr) else None
        records.append(job.record(result.path, (height, width), [file], psnr=finite, latent_shape=latent))
    return job.finish(records)
