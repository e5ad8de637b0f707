"""Would lite_mla in inference be faster in fewer launches? What arithmetic says, per variant, layer and batch.

`python -m benchmarks.variants` prints the table and writes `benchmarks/results/variants_h200.json`. The variants:

- four: cuBLAS for qkv; aggregation with the state; aggregation with its application; projection.
- two: k and v from x, aggregated and summed up; q from x, aggregated, applied, projected. A block of the second launch
  holds all heads of its pixels, which the projection sums over, and x with its halo; qkv and out are never stored.
- one: a block holds an image. Not built.

Unlike `bench static`, which is a bound, this counts what decides here: how many blocks there are for how many
multiprocessors, how many of them shared memory lets share one, and rates that kernels of this kind reach. A block's
parts (loads, products, depthwise convolution) follow one another; blocks that share a multiprocessor overlap.
Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil, inf
from pathlib import Path
from typing import Any

from benchmarks.report import format_table
from benchmarks.shapes import B_AND_L_SERIES, Shape
from benchmarks.static import H200

RESULT = Path(__file__).parent / "results" / "variants_h200.json"
BATCHES = (1, 8, 64, 256)
ELEMENT = 2  # bytes: 16-bit storage


@dataclass(frozen=True)
class Rates:
    """Of one multiprocessor, where nothing else is said; bytes and operations per second."""

    multiprocessors: int = 132
    memory: float = 0.75 * H200.memory  # of the GPU
    cublas: float = 0.65 * H200.tensor  # of the GPU
    tensor: float = 0.30 * H200.tensor / 132  # mma.sync between barriers
    tf32: float = 0.30 * H200.tf32 / 132
    fma: float = 0.50 * H200.fma / 132
    l2: float = 64 * 1.75e9
    launch: float = H200.launch
    ramp: float = 1e-6  # of a kernel: its first loads, its last stores
    shared: int = 227 * 1024
    resident: int = 4  # blocks, where shared memory does not say fewer


@dataclass(frozen=True)
class Block:
    """What one block does: bytes that it loads, operations per unit; and its shared memory."""

    load: float
    tensor: float
    tf32: float
    fma: float
    shared: float


def seconds(blocks: int, block: Block, moved: float, rates: Rates) -> float:
    """Of a launch that moves so many bytes of the GPU's memory; inf where a block does not fit."""
    if block.shared > rates.shared:
        return inf
    resident = max(1, min(rates.resident, int(rates.shared // block.shared)))
    parts = (block.load / rates.l2, block.tensor / rates.tensor + block.tf32 / rates.tf32, block.fma / rates.fma)
    own = ceil(blocks / rates.multiprocessors)  # blocks of the busiest multiprocessor
    busy = max(own * max(parts), ceil(own / resident) * sum(parts))
    return max(rates.launch, rates.ramp + busy, moved / rates.memory)


@dataclass(frozen=True)
class Tile:
    """`rows` by `cols` pixels of an image, with the halo of a depthwise convolution."""

    shape: Shape
    rows: int
    cols: int

    @property
    def count(self) -> int:
        return ceil(self.shape.height / self.rows) * ceil(self.shape.width / self.cols)

    @property
    def pixels(self) -> int:
        return self.rows * self.cols

    @property
    def halo(self) -> int:
        return 2 * (self.shape.scales[0] // 2)

    @property
    def padded(self) -> int:
        """Values of a channel in shared memory."""
        return (self.rows + self.halo) * (self.cols + 16)

    @property
    def loaded(self) -> int:
        """Pixels within the image, of an average tile; products take them by eights."""
        rows, cols = (
            _mean_extent(size, step, self.halo // 2)
            for size, step in ((self.shape.height, self.rows), (self.shape.width, self.cols))
        )
        return 8 * ceil(rows * cols / 8)


def _mean_extent(size: int, step: int, halo: int) -> float:
    starts = range(0, size, step)
    return sum(min(size, start + step + halo) - max(0, start - halo) for start in starts) / len(starts)


def four(shape: Shape, rates: Rates) -> list[float]:
    image = shape.pixels * shape.channels * ELEMENT
    d, heads, taps = shape.dim, shape.heads, shape.scales[0] ** 2
    tile = Tile(shape, 8, 16 if shape.width > 8 else 8)
    blocks = shape.batch * tile.count * heads
    halo = d * tile.padded * ELEMENT
    state = Block(2 * halo, 0, 6 * d * d * tile.pixels, 4 * d * tile.pixels * taps, 2 * halo)
    apply = Block(halo, 0, 6 * d * d * tile.pixels, 2 * d * tile.pixels * taps, 2 * halo)
    projection = Block(128 * 2 * shape.channels * ELEMENT, 2 * 64 * 64 * 2 * shape.channels, 0, 0, 32e3)
    projected = ceil(shape.pixels / 64) * ceil(shape.channels / 64)
    qkv = max(rates.launch, 4 * image / rates.memory, 6 * shape.pixels * shape.channels**2 / rates.cublas)
    return [
        qkv,
        seconds(blocks, state, 2 * image, rates),
        seconds(blocks, apply, 3 * image, rates),
        seconds(projected, projection, 3 * image, rates),
    ]


def two(shape: Shape, rates: Rates) -> list[float]:
    """The better of two tiles; a block has eight warps, one for 64 pixels of a head."""
    tiles = [Tile(shape, 8, cols) for cols in (8, 16) if shape.heads * cols <= 64]
    return min((_two(shape, tile, rates) for tile in tiles), key=sum, default=[inf])


def _two(shape: Shape, tile: Tile, rates: Rates) -> list[float]:
    image = shape.pixels * shape.channels * ELEMENT
    c, d, taps = shape.channels, shape.dim, shape.scales[0] ** 2
    stages = 3 * 40 * ELEMENT  # of the products, per row of an operand
    state = Block(
        load=(tile.loaded + 2 * d) * c * ELEMENT,
        tensor=4 * d * tile.loaded * c,
        tf32=8 * d * d * tile.pixels,
        fma=4 * d * tile.pixels * taps,
        shared=2 * d * tile.padded * ELEMENT + (tile.loaded + 2 * d) * stages,
    )
    apply = Block(
        load=(tile.loaded + 3 * c) * c * ELEMENT,
        tensor=2 * c * c * tile.loaded + 4 * c * c * tile.pixels,
        tf32=6 * d * c * tile.pixels,
        fma=2 * c * tile.pixels * taps,
        shared=c * (tile.padded + 2 * tile.pixels) * ELEMENT + (tile.loaded + c) * stages,
    )
    blocks = shape.batch * tile.count
    return [seconds(blocks * shape.heads, state, image, rates), seconds(blocks, apply, 2 * image, rates)]


def one(shape: Shape, rates: Rates) -> list[float]:
    c, d, tokens = shape.channels, shape.dim, shape.height * shape.width
    pixels = 64 * ceil(tokens / 64)
    whole = Tile(shape, shape.height, shape.width)
    block = Block(
        load=(tokens + 5 * c) * c * ELEMENT,
        tensor=6 * c * c * tokens + 4 * c * c * pixels,
        tf32=14 * d * c * pixels,
        fma=6 * c * pixels * shape.scales[0] ** 2,
        shared=(c * (tokens + 2 * pixels) + 3 * d * whole.padded) * ELEMENT,
    )
    return [seconds(shape.batch, block, 2 * shape.pixels * c * ELEMENT, rates)]


VARIANTS: dict[str, Callable[[Shape, Rates], list[float]]] = {"four": four, "two": two, "one": one}


def layers() -> Iterator[Shape]:
    """Of the classification models at 224, and of others with up to 256 channels, at every batch."""
    for shape in B_AND_L_SERIES:
        if shape.channels <= 256:
            yield from (replace(shape, batch=batch) for batch in BATCHES)


def rows(rates: Rates = Rates()) -> list[dict[str, Any]]:
    """Microseconds of every launch; a variant whose blocks do not fit has none."""
    found = []
    for shape in layers():
        times = {name: variant(shape, rates) for name, variant in VARIANTS.items()}
        known = {name: [round(1e6 * t, 2) for t in ts] for name, ts in times.items() if sum(ts) < inf}
        best = min(known, key=lambda name: sum(known[name]))
        found.append({"layer": shape.name, "batch": shape.batch, "us": known, "best": best})
    return found


def table(found: list[dict[str, Any]]) -> list[list[str]]:
    lines = [["layer", "batch", *(f"{name}, us" for name in VARIANTS), "best"]]
    for row in found:
        times = [f"{sum(row['us'][name]):.1f}" if name in row["us"] else "does not fit" for name in VARIANTS]
        lines.append([row["layer"], str(row["batch"]), *times, row["best"]])
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.variants", description=__doc__)
    parser.add_argument("--output", default=str(RESULT), help="default %(default)s")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args(argv)
    found = rows()
    print("\n".join(format_table(table(found), arguments.markdown)))
    head = json.dumps({"rates": vars(Rates())})[:-1]
    body = ",\n".join(json.dumps(row) for row in found)
    Path(arguments.output).write_text(f'{head}, "rows": [\n{body}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
