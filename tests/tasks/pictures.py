"""Images with known contents, to files and from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from efficientvit_kernels.tasks.images import Pixels

Image = pytest.importorskip("PIL.Image", reason="Pillow is in the extra `tasks`")


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path: Path, pixels: npt.NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def read(path: Path) -> npt.NDArray[Any]:
    with Image.open(path) as image:
        return np.array(image)
