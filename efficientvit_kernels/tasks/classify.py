"""The most probable classes of images."""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .._files import written_whole
from ..ops._checks import check_positive_int
from .batch import Problem, check_finite, each_image, say, to_model
from .class_names import imagenet_names
from .images import Pixels, shown
from .job import Job
from .options import UsageError
from .preprocess import CROP_RATIOS, classification_input

DEFAULT_SIZE = 224


@dataclass(frozen=True)
class ClassScore:
    """A class by its index in the model's output and its name (empty if none is known), with its probability."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Classification:
    """The best classes of an image, the most probable first."""

    path: Path
    size: tuple[int, int]  # height, width
    classes: tuple[ClassScore, ...]


def classify_images(
    model: nn.Module,
    paths: Iterable[str | os.PathLike[str]],
    *,
    size: int = DEFAULT_SIZE,
    crop_ratio: float = 1.0,
    top: int = 5,
    names: Sequence[str] | None = None,
    problems: list[Problem] | None = None,
    progress: bool = False,
) -> Iterator[Classification]:
    """The classes of image files, by the official rule: see `preprocess.classification_input`.

    Args:
        model: a classifier in eval mode, [1, 3, size, size] -> logits [1, classes], such as
            `create_model("efficientvit-b1", weights)`.
        size, crop_ratio: side of the input, and its share of the short side.
        top: classes per image; all, if there are fewer.
        names: of the classes, in the order of the logits.
        problems, progress: see `batch.each_image`.

    Raises:
        ValueError, TypeError: size or top is not a positive int, crop_ratio not in (0, 1].
        ImageError, RuntimeError: an image cannot be read; the logits are not finite; if `problems` is None.
    """
    check_positive_int("classify_images", "size", size)
    check_positive_int("classify_images", "top", top)
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"classify_images: crop_ratio must be in (0, 1], got {crop_ratio}")

    def work(path: Path, pixels: Pixels) -> Classification:
        with torch.inference_mode():
            logits = check_finite(model(to_model(model, classification_input(pixels, size, crop_ratio))))
        best = logits[0].softmax(0).sort(descending=True, stable=True)
        scores = zip(best.indices[:top].tolist(), best.values[:top].tolist(), strict=True)
        classes = tuple(ClassScore(i, names[i] if names and i < len(names) else "", value) for i, value in scores)
        return Classification(path, (pixels.shape[0], pixels.shape[1]), classes)

    return each_image(paths, work, problems, progress)


def table(result: Classification) -> str:
    """The classes as lines of text."""
    height, width = result.size
    lines = [f"{shown(result.path)} ({width} x {height})"]
    lines += [f"  {rank}  {c.probability:8.3%}  {c.index:4d}  {c.name}" for rank, c in enumerate(result.classes, 1)]
    return "\n".join(line.rstrip() for line in lines)


def write_csv(results: Sequence[Classification], path: Path) -> None:
    """One line per image and class: image, rank, index, name, probability."""
    with written_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "rank", "index", "name", "probability"))
        for result in results:
            for rank, c in enumerate(result.classes, 1):
                writer.writerow((shown(result.path), rank, c.index, c.name, f"{c.probability:.6g}"))


def run(arguments: argparse.Namespace) -> int:
    """The command `classify`: a table, classify.csv and classify.json."""
    names: Sequence[str] | None = None
    options = {}
    if arguments.names is not None:
        try:
            names = [line.strip() for line in Path(arguments.names).read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise UsageError(f"--names must be a text file in UTF-8, got {arguments.names}") from error
        if not names:
            raise UsageError(f"--names must have a name on every line, got none in {arguments.names}")
        options["n_classes"] = len(names)
    job = Job(arguments, **options)
    if not job.paths:
        return job.finish([])
    if names is None:
        names = imagenet_names()
        if names is None:
            print("torchvision, which has the names of the classes, cannot be imported: they are numbered")
    results = []
    for result in classify_images(
        job.model,
        job.paths,
        size=arguments.size or job.resolution or DEFAULT_SIZE,
        crop_ratio=CROP_RATIOS.get(job.model_name, 1.0),
        top=arguments.top,
        names=names,
        problems=job.problems,
        progress=True,
    ):
        say(table(result))
        results.append(result)
    write_csv(results, job.out / "classify.csv")
    return job.finish([job.record(r.path, r.size, (), classes=[asdict(c) for c in r.classes]) for r in results])
