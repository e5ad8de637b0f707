"""One function over many image files: progress, and files that cannot be done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .images import ImageError, Pixels, read_image, shown

Result = TypeVar("Result")


@dataclass(frozen=True)
class Problem:
    """A file that could not be done, and why."""

    path: Path
    cause: str

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.cause}"


def each_image(
    paths: Iterable[str | os.PathLike[str]],
    work: Callable[[Path, Pixels], Result],
    problems: list[Problem] | None = None,
    progress: bool = False,
) -> Iterator[Result]:
    """`work(path, pixels)` of every image, one after the other, as they are asked for.

    Args:
        problems: gets the files that cannot be read or done, which are then left out; None: the first raises.
        progress: a bar on standard error, where that is a terminal and tqdm is installed.

    Raises:
        ImageError, and what `work` raises: if `problems` is None.
    """
    with _bar([Path(path) for path in paths], progress) as bar:
        for path in bar:
            try:
                result = work(path, read_image(path))
            except (ValueError, RuntimeError, MemoryError) as error:
                if problems is None:
                    raise
                cause = error.cause if isinstance(error, ImageError) else f"{type(error).__name__}: {error}"
                problems.append(Problem(path, cause))
                bar.write(f"skipped: {problems[-1]}")
                continue
            yield result


class _Plain:
    """What stands in for a progress bar."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)

    def write(self, text: str) -> None:
        print(text, file=sys.stderr)


class _Bar(_Plain):
    """tqdm's, which lets lines pass above it."""

    def __init__(self, paths: list[Path], tqdm: Any) -> None:
        super().__init__(paths)
        self.bar = tqdm(total=len(paths), unit="image", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __iter__(self) -> Iterator[Path]:
        for path in self.paths:
            self.bar.set_postfix_str(path.name, refresh=True)
            yield path
            self.bar.update()

    def write(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)


def _bar(paths: list[Path], progress: bool) -> _Plain:
    if not progress or len(paths) < 2 or not sys.stderr.isatty():
        return _Plain(paths)
    try:
        from tqdm import tqdm
    except ImportError:
        return _Plain(paths)
    return _Bar(paths, tqdm)


def say(text: str) -> None:
    """Prints a line; a progress bar on the same terminal makes room for it."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(text)
    else:
        tqdm.tqdm.write(text)


def to_model(model: nn.Module, x: Tensor) -> Tensor:
    """`x` on the model's device and in its dtype."""
    parameter = next(model.parameters())
    return x.to(parameter.device, parameter.dtype)


def check_finite(output: Tensor) -> Tensor:
    """`output` in float32, on its device.

    Raises:
        RuntimeError: NaN or infinity in it, which would become a plausible class or colour.
    """
    output = output.float()
    if not torch.isfinite(output).all():
        raise RuntimeError("the model's output is not finite; damaged weights, or a dtype that is too narrow")
    return output
