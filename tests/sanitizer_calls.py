"""The calls that run under a sanitizer: python -m tests.sanitizer_calls {quick,awkward,full,threads}

Forward and backward of every op on the samples of its tests and on the awkward ones below, which sit on the edges that
the kernels cut along: vectors, tiles, panels, chunks, fold or no fold. Right values are the business of other tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

import efficientvit_kernels
from efficientvit_kernels import _library, lite_mla, multiscale_aggregate, relu_linear_attention
from tests.ops import aggregate_samples, common, lite_mla_samples
from tests.ops.aggregate_samples import Sample as Aggregate
from tests.ops.block_common import Arguments, results
from tests.ops.common import DTYPES, LAYOUTS
from tests.ops.common import Sample as Attention
from tests.ops.lite_mla_samples import ALL
from tests.ops.lite_mla_samples import Sample as Block

Sample = Attention | Aggregate | Block

AWKWARD: list[Sample] = [
    # Attention: chunks of 1024 tokens and their remainders, tiles of 64, several scales of an odd D.
    *(Attention(1, 1, d, 1, n, scales=2) for d in (1, 5, 65) for n in (1, 63, 65, 1535, 1537, 2561)),
    *(Attention(batch, 1, 3, 5, 7, layout="sliced") for batch in (0, 1, 9)),
    # Aggregation: rows that are cut (W > 256 forward, > 512 backward), tiles of one row, halos wider than the image.
    *(Aggregate(1, 1, 5, h, w, (k,)) for h, w in ((1, 1), (1, 257), (2, 513), (1, 1030), (700, 2)) for k in (1, 5, 9)),
    *(Aggregate(1, 1, 3, 2, 515, (3, 7), layout, True) for layout in LAYOUTS),
    *(Aggregate(9, 1, d, 3, 17, (5, 3), biases=True) for d in (1, 7, 33, 65)),
    # Blocks: D odd, around vectors and panels; C_out around the panels of 14 and of 6 rows, with and without the fold.
    *(Block(2, 7, 1, d, 5, 6, (3,), ALL) for d in (1, 3, 9, 17, 31, 33, 65)),
    *(
        Block(1, 9, 1, 8, h, w, (5,), ALL, out_channels=channels)
        for channels in (1, 5, 6, 7, 13, 14, 15, 29, 57, 300)
        for h, w in ((1, 3), (6, 7), (9, 70))
    ),
    *(Block(1, 16, 2, 4, h, w, (k,), "shift") for h, w in ((1, 1), (1, 257), (2, 515), (1, 1025)) for k in (1, 3, 9)),
    *(Block(1, 33, 1, 16, 3, 300, (5, 3), ALL, layout) for layout in LAYOUTS),
    *(Block(batch, 12, 1, 5, 4, 5, (9, 1), ALL, "sliced") for batch in (0, 1, 9)),
    Block(1, 260, 3, 16, 13, 19, (5,), "scale residual", out_channels=70),  # the projection's input in several tiles
    Block(4, 64, 4, 16, 37, 41, (5,), "scale shift", "channels_last"),  # qkv product: blocks of columns
    Block(2, 16, 1, 4, 61, 67, (), "residual"),
]  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One sample in one dtype: inference, then forward and backward."""

    sample: Sample
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{type(self.sample).__module__} {self.sample} {self.dtype}"

    def __call__(self) -> None:
        sample = self.sample
        arguments: Arguments
        if isinstance(sample, Attention):
            qkv = sample.make(self.dtype)
            arguments = {"qkv": qkv, "head_dim": sample.head_dim, "eps": sample.eps}
            self.run(relu_linear_attention, arguments)
        elif isinstance(sample, Aggregate):
            self.run(multiscale_aggregate, sample.make(self.dtype))
        else:
            arguments = sample.make(self.dtype)
            self.run(lite_mla, arguments)
            self.run(partial(lite_mla, recompute=True), arguments)

    def run(self, op: Callable[..., object], arguments: Arguments) -> None:
        with torch.no_grad():
            op(**arguments, backend="cpu")
        results(partial(op, backend="cpu"), arguments)


def quick() -> list[Call]:
    """Every second awkward sample in one dtype, in turn: what a push can afford."""
    return [Call(sample, DTYPES[i % len(DTYPES)]) for i, sample in enumerate(AWKWARD[::2])]


def awkward() -> list[Call]:
    return [Call(sample, dtype) for sample in AWKWARD for dtype in DTYPES]


def full() -> list[Call]:
    """The awkward samples in every dtype, those of the tests in one dtype each, in turn."""
    samples = [*common.SAMPLES, *aggregate_samples.SAMPLES, *lite_mla_samples.SAMPLES]
    return awkward() + [Call(sample, DTYPES[i % len(DTYPES)]) for i, sample in enumerate(samples)]


def threads() -> list[Call]:
    """Float and bfloat16: the tasks are cut from the shape alone, and what differs is the type of an element."""
    return [Call(sample, dtype) for sample in AWKWARD for dtype in (torch.float32, torch.bfloat16)]


def run_all(calls: Iterable[Call]) -> None:
    for call in calls:
        # A report ends the process: the last line says which call it was.
        print(call, file=sys.stderr, flush=True)
        call()


def main(which: str) -> None:
    home = os.environ["EVK_SANITIZED_PACKAGE"]
    assert efficientvit_kernels.__file__.startswith(home), efficientvit_kernels.__file__
    calls = {"quick": quick, "awkward": awkward, "full": full, "threads": threads}[which]()
    before = _library.cpu_calls()
    run_all(calls)
    if which == "threads":
        # Callers on several threads share the library's own state, and nothing else.
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run_all, [calls[i::40] for i in range(4)]))
    assert _library.cpu_calls() - before >= 3 * len(calls)
    print("clean", _library.cpu_isa(), len(calls))


if __name__ == "__main__":
    main(sys.argv[1])
