"""Tiles and warps of the aggregation's kernels, per head dimension, window, image and precision.

From the resources of their code, not from measurements: as many rows per lane as registers hold without spilling in the
table of `resources.py`, since ROWS rows cost ROWS + k - 1 loads per column of the window instead of ROWS * k. Functions
of the shape of one image alone, so that its bits do not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .configs import MAX_REGISTERS
from .launch import block_of

# Programs of the kernels that leave partial sums: enough to fill a GPU several times, few enough that the sums are
# small beside the images.
SUMMING_PROGRAMS = 1536


@dataclass(frozen=True)
class AggregationConfig:
    """A tile: `bands` bands of `rows` rows, `cols` columns. block_c: input channels at a time; block_r: output ones.

    all_registers: ptxas may use all that there are, where it would spill a few bytes to fit one more block.
    """

    rows: int
    bands: int
    cols: int
    block_c: int
    block_r: int
    num_warps: int
    all_registers: bool = False


class Tiling:
    """The tiles of an image, and what every kernel takes from its configuration."""

    def __init__(self, config: AggregationConfig, height: int, width: int) -> None:
        self.block_c, self.block_r = config.block_c, config.block_r
        self.tiles_w = -(-width // config.cols)
        self.tiles = -(-height // (config.rows * config.bands)) * self.tiles_w
        self.meta: dict[str, Any] = {
            "BLOCK_C": config.block_c,
            "ROWS": config.rows,
            "BANDS": config.bands,
            "COLS": config.cols,
            "num_warps": config.num_warps,
            "num_stages": 1,
        }
        if config.all_registers:
            self.meta["maxnreg"] = MAX_REGISTERS

    def runs(self, batch: int, blocks: int) -> tuple[int, int, int]:
        """Tasks (tiles of all images), how many of them a program takes, and programs per block of channels."""
        tasks = batch * self.tiles
        per_program = -(-tasks // max(1, SUMMING_PROGRAMS // blocks))
        return tasks, per_program, -(-tasks // per_program)


def forward_config(head_dim: int, height: int, width: int, ieee: bool) -> AggregationConfig:
    bands, cols = _lanes(width, 16)
    block = block_of(head_dim)
    if block > 64:
        return AggregationConfig(_few(2, height, bands), bands, cols, 32, 128, 8, True)
    rows = _rows(height, bands) if block <= 32 - 16 * ieee else _few(4, height, bands)
    many = block > 32 or (block == 32 and (rows > 4 or ieee))
    all_registers = block > 32 or bands > 1 or rows > 4
    return AggregationConfig(rows, bands, cols, block, block, 8 if many else 4, all_registers)


def gradients_fit(head_dim: int, k: int, ieee: bool) -> bool:
    """Whether one program can hold all sums that a tile adds to: of P, and of k * k taps in every lane."""
    return k <= 5 and block_of(head_dim) <= (32 if ieee else 64)


def gradients_config(head_dim: int, k: int, height: int, width: int) -> AggregationConfig:
    """Of everything at once, where `gradients_fit`."""
    block = block_of(head_dim)
    bands, cols = _lanes(width, 32 if block == 16 and k == 5 else 16)
    rows = _few(2 if block > 32 or head_dim < block or (k < 5 and bands > 1) else 4, height, bands)
    all_registers = block > 32 or bands > 1 or head_dim < block
    return AggregationConfig(rows, bands, cols, block if block <= 32 else 16, block, 8, all_registers)


def middle_config(head_dim: int, height: int, width: int) -> AggregationConfig:
    bands, cols = _lanes(width, 16)
    block = block_of(head_dim)
    rows = _few(4 if block <= 32 else 2, height, bands)
    return AggregationConfig(rows, bands, cols, min(block, 32), min(block, 64) if block <= 64 else 32, 4, True)


def grad_pointwise_config(head_dim: int, height: int, width: int) -> AggregationConfig:
    bands, cols = _lanes(width, 16)
    block = block_of(head_dim)
    rows = _few(2, height, bands) if block <= 32 else 1
    return AggregationConfig(rows, bands, cols, min(block, 32), min(block, 64), 8, True)


def grad_taps_config(height: int, width: int) -> AggregationConfig:
    bands, cols = _lanes(width, 32)
    return AggregationConfig(_few(4, height, bands), bands, cols, 16, 16, 4)


def grad_qkv_config(height: int, width: int) -> AggregationConfig:
    bands, cols = _lanes(width, 32)
    return AggregationConfig(_rows(height, bands), bands, cols, 16, 16, 4, bands > 1)


def _lanes(width: int, lanes: int) -> tuple[int, int]:
    """Bands and columns of a tile of `lanes` lanes: as few columns as hold the image."""
    cols = min(lanes, 8 if width <= 8 else block_of(width))
    return lanes // cols, cols


def _few(rows: int, height: int, bands: int) -> int:
    """At most `rows` rows per lane, and no more than the image fills."""
    return min(rows, -(-height // bands))


def _rows(height: int, bands: int) -> int:
    """Rows per lane: many where the image has many, and a divisor of 14 and 28, the heights of classification."""
    if bands > 1 or height < 14:
        return _few(4, height, bands)
    return 7 if height % 7 == 0 and height % 8 != 0 else 8 if height >= 32 else 4
