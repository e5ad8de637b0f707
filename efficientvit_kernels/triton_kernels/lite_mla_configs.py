"""Tiles, warps and the split over tiles of the fused kernels of lite_mla, per head dimension, image and precision.

From the resource table, no measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from .configs import MAX_SPLITS, MAX_SUMMED_SPLITS

WINDOWS = (3, 5, 7, inf)  # buckets of k
LANES = 16  # the least side of a matrix product
# Up to this many tiles the readers add up the few splits themselves, which saves a launch; beyond, a split takes at
# least four tiles, since its state costs as much to write and read again as 64 tokens at D = 32.
FEW_TILES = 32
TILES_PER_SPLIT = 4
# A multiprocessor holds about four programs, and an H200 has 132.
PROGRAMS = 528


@dataclass(frozen=True)
class BlockConfig:
    """A tile: `bands` bands of `rows` rows, `cols` columns; see `aggregation.tile_of`."""

    rows: int
    bands: int
    cols: int
    num_warps: int

    def tiles(self, height: int, width: int) -> tuple[int, int]:
        """All tiles of an image, and those side by side."""
        tiles_w = -(-width // self.cols)
        return -(-height // (self.rows * self.bands)) * tiles_w, tiles_w


# (kernel, kind, padded head dimension, up to this window) -> rows, num_warps. Kinds: 16-bit storage, and fp32 in either
# precision of its products. What is not here is not fused: at D = 64 registers did not hold it.
_BLOCKS: dict[tuple[str, str, int, float], tuple[int, int]] = {
    ("state", "half", 16, 3): (2, 8),
    ("state", "half", 16, 5): (2, 4),
    ("state", "half", 16, 7): (2, 8),
    ("state", "half", 16, inf): (2, 4),
    ("state", "half", 32, 3): (2, 8),
    ("state", "half", 32, 5): (2, 8),
    ("state", "half", 32, 7): (2, 8),
    ("state", "half", 32, inf): (3, 8),
    ("state", "tf32", 16, 3): (2, 8),
    ("state", "tf32", 16, 5): (2, 8),
    ("state", "tf32", 16, inf): (2, 4),
    ("state", "tf32", 32, 3): (2, 8),
    ("state", "tf32", 32, 5): (1, 8),
    ("state", "tf32", 32, inf): (3, 8),
    ("state", "ieee", 16, 3): (2, 4),
    ("state", "ieee", 16, 5): (2, 8),
    ("state", "ieee", 16, 7): (3, 4),
    ("state", "ieee", 16, inf): (3, 4),
    ("state", "ieee", 32, 3): (2, 8),
    ("state", "ieee", 32, 5): (2, 8),
    ("state", "ieee", 32, inf): (2, 8),
    ("apply", "half", 16, 3): (4, 4),
    ("apply", "half", 16, 5): (3, 4),
    ("apply", "half", 16, 7): (3, 4),
    ("apply", "half", 16, inf): (4, 4),
    ("apply", "half", 32, 3): (4, 4),
    ("apply", "half", 32, 5): (4, 8),
    ("apply", "half", 32, 7): (4, 8),
    ("apply", "half", 32, inf): (2, 4),
    ("apply", "tf32", 16, 3): (3, 4),
    ("apply", "tf32", 16, 5): (3, 4),
    ("apply", "tf32", 16, 7): (3, 4),
    ("apply", "tf32", 16, inf): (2, 4),
    ("apply", "tf32", 32, 3): (4, 8),
    ("apply", "tf32", 32, 5): (4, 8),
    ("apply", "tf32", 32, 7): (4, 8),
    ("apply", "tf32", 32, inf): (4, 4),
    ("apply", "ieee", 16, 3): (4, 4),
    ("apply", "ieee", 16, 5): (4, 4),
    ("apply", "ieee", 16, 7): (4, 4),
    ("apply", "ieee", 16, inf): (3, 4),
    ("apply", "ieee", 32, 3): (2, 8),
    ("apply", "ieee", 32, 5): (2, 8),
    ("apply", "ieee", 32, 7): (2, 8),
    ("apply", "ieee", 32, inf): (3, 8),
}


def block_config(kernel: str, kind: str, block_d: int, k: int, width: int) -> BlockConfig | None:
    """Of the kernel "state" or "apply"; `kind`: "half", "tf32" or "ieee". None: aggregation and attention apart."""
    window = next(limit for limit in WINDOWS if k <= limit)
    found = _BLOCKS.get((kernel, kind, block_d, window))
    if found is None:
        return None
    cols = 8 if width <= 8 else LANES
    return BlockConfig(found[0], LANES // cols, cols, found[1])


def tiles_per_split(tiles: int) -> int:
    """A function of the image's size alone, so that an image's bits do not depend on its batch."""
    if tiles <= FEW_TILES:
        return -(-tiles // MAX_SUMMED_SPLITS)
    return max(TILES_PER_SPLIT, -(-tiles // MAX_SPLITS))


def tiles_per_program(tiles: int, heads: int) -> int:
    """Of the application, where every token stands for itself: heads of all images. Each program loads its states."""
    return max(1, min(TILES_PER_SPLIT, tiles * heads // PROGRAMS))
