"""Samples of multiscale_aggregate: shapes, kernel sizes, layouts and biases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from efficientvit_kernels import multiscale_aggregate, reference
from efficientvit_kernels.testing import Verdict, official_multiscale_aggregate
from tests.ops.block_common import Arguments, in_dtype, judge_by_name, results
from tests.ops.common import LAYOUTS, as_layout, device_of


@dataclass(frozen=True)
class Sample:
    """One input of multiscale_aggregate."""

    batch: int
    heads: int
    head_dim: int
    height: int
    width: int
    kernels: tuple[int, ...] = (5,)
    layout: str = "nchw"
    biases: bool = False

    def __str__(self) -> str:
        kernels = "-".join(str(kernel) for kernel in self.kernels)
        text = f"b{self.batch}h{self.heads}d{self.head_dim}_{self.height}x{self.width}_k{kernels}_{self.layout}"
        return f"{text}_biases" if self.biases else text

    def make(self, dtype: torch.dtype, seed: int = 0) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        channels = self.heads * 3 * self.head_dim

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

        arguments: Arguments = {
            "qkv": as_layout(normal(self.batch, channels, self.height, self.width), self.layout),
            "depthwise_weights": [normal(channels, 1, k, k, scale=1 / k) for k in self.kernels],
            "pointwise_weights": [
                normal(channels, self.head_dim, 1, 1, scale=1 / math.sqrt(self.head_dim)) for _ in self.kernels
            ],
            "head_dim": self.head_dim,
        }
        if self.biases:
            for name in ("depthwise_biases", "pointwise_biases"):
                arguments[name] = [normal(channels, scale=0.5) for _ in self.kernels]
        return arguments


SAMPLES = [
    # Shapes of the official models, some with fewer heads.
    *(Sample(1, heads, 16, size, size) for heads, size in ((4, 14), (8, 14), (8, 7), (4, 16), (2, 9))),
    *(Sample(1, heads, 32, size, size) for heads, size in ((4, 14), (8, 7), (2, 24), (4, 16))),
    Sample(2, 2, 32, 32, 32),
    Sample(1, 1, 16, 64, 128, layout="channels_last"),
    # Kernel sizes, alone and several at once.
    *(Sample(2, 2, 8, 11, 13, kernels=(k,)) for k in (1, 3, 7, 9, 11)),
    *(Sample(2, 2, 8, 9, 7, kernels=kernels) for kernels in ((3, 5), (5, 3, 7), (1, 9), (5, 5), (7, 1, 3, 5))),
    # Head dims: one, odd, between the vector widths, wide.
    *(Sample(2, 2, d, 6, 5, biases=d % 2 == 1) for d in (1, 2, 3, 4, 5, 7, 12, 15, 17, 24, 31, 33, 40, 48, 63, 64)),
    # Smaller than the kernel, one pixel, long rows and columns, widths around the vectors.
    *(Sample(2, 1, 4, h, w, kernels=(3, 7)) for h, w in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (4, 5))),
    *(Sample(1, 1, 3, 1, width, kernels=(5,)) for width in (7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 700)),
    *(Sample(1, 1, 4, h, w, kernels=(3, 5)) for h, w in ((3, 300), (2, 129), (700, 1), (97, 3), (31, 33))),
    Sample(1, 1, 2, 90, 110, kernels=(9,)),
    # Batches: none, odd, many.
    *(Sample(batch, 1, 8, 5, 6, biases=True) for batch in (0, 1, 5, 33)),
    # Layouts, with and without biases.
    *(Sample(2, 2, d, 9, 7, (3, 5), layout, biases=d == 5) for d in (5, 8, 16) for layout in LAYOUTS[1:]),
    *(Sample(2, 1, 32, 14, 14, layout=layout, biases=True) for layout in ("nchw", "channels_last")),
]  # fmt: skip


def run(arguments: Arguments, backend: str) -> Arguments:
    return results(partial(multiscale_aggregate, backend=backend), arguments, device=device_of(backend))


def exact(arguments: Arguments) -> Arguments:
    """The results in float64, for grad_outs that are rounded to the dtype of the arguments."""
    return results(reference.multiscale_aggregate, in_dtype(arguments, torch.float64), arguments["qkv"].dtype)


def judge(arguments: Arguments, backend: str) -> dict[str, Verdict]:
    """Rule T for every output and gradient."""
    dtype = arguments["qkv"].dtype
    ours = run(arguments, backend)
    assert all(result.dtype == dtype for result in ours.values())
    base = results(official_multiscale_aggregate, arguments) if arguments["qkv"].numel() else ours
    return judge_by_name(
        ours,
        exact(arguments),
        base,
        lambda: results(official_multiscale_aggregate, in_dtype(arguments, torch.float32), dtype),
    )
