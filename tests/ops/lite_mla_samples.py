"""Samples of lite_mla: shapes, kernel sizes, layouts, biases and epilogues; and their judgement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from efficientvit_kernels import lite_mla, reference
from efficientvit_kernels.testing import Verdict, official_lite_mla, rule_t
from tests.ops.block_common import Arguments, in_dtype, results
from tests.ops.common import as_layout, device_of
from tests.ops.rounding import prescribed


@dataclass(frozen=True)
class Sample:
    """One input of lite_mla. `extras`: of "biases", "scale", "shift", "residual"."""

    batch: int
    in_channels: int
    heads: int
    head_dim: int
    height: int
    width: int
    kernels: tuple[int, ...] = (5,)
    extras: str = ""
    layout: str = "nchw"
    out_channels: int | None = None  # None: in_channels
    eps: float = 1e-15

    def __str__(self) -> str:
        kernels = "-".join(str(kernel) for kernel in self.kernels) or "none"
        channels = f"c{self.in_channels}" + (f"o{self.out_channels}" if self.out_channels else "")
        size = f"{self.height}x{self.width}"
        text = f"b{self.batch}{channels}h{self.heads}d{self.head_dim}_{size}_k{kernels}_{self.layout}"
        text += f"_{self.extras.replace(' ', '-')}" if self.extras else ""
        return text if self.eps == 1e-15 else f"{text}_eps{self.eps}"

    @property
    def tokens(self) -> int:
        return self.height * self.width

    def make(self, dtype: torch.dtype, seed: int = 0) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        total, scales, out_channels = (
            self.heads * self.head_dim,
            len(self.kernels),
            self.out_channels or self.in_channels,
        )
        compute = torch.promote_types(dtype, torch.float32)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

        def weight(*shape: int) -> Tensor:
            return normal(*shape, scale=1 / math.sqrt(math.prod(shape[1:])))

        def image(channels: int) -> Tensor:
            return as_layout(normal(self.batch, channels, self.height, self.width), self.layout)

        arguments: Arguments = {
            "x": image(self.in_channels),
            "qkv_weight": weight(3 * total, self.in_channels, 1, 1),
            "depthwise_weights": [weight(3 * total, 1, k, k) for k in self.kernels],
            "pointwise_weights": [weight(3 * total, self.head_dim, 1, 1) for _ in self.kernels],
            "proj_weight": weight(out_channels, total * (1 + scales), 1, 1),
            "head_dim": self.head_dim,
            "eps": self.eps,
        }
        extras = self.extras.split()
        if "biases" in extras:
            arguments["qkv_bias"] = normal(3 * total, scale=0.3)
            for name in ("depthwise_biases", "pointwise_biases"):
                arguments[name] = [normal(3 * total, scale=0.3) for _ in self.kernels]
        if "scale" in extras:
            arguments["proj_scale"] = 1 + normal(out_channels, scale=0.3, dtype=compute)
        if "shift" in extras:
            arguments["proj_shift"] = normal(out_channels, dtype=compute)
        if "residual" in extras:
            arguments["residual"] = image(out_channels)
        return arguments


ALL = "biases scale shift residual"
SAMPLES = [
    # Shapes of the official models, some with fewer channels.
    *(Sample(1, c, c // 16, 16, n, n, extras="scale shift") for c, n in ((64, 14), (128, 14), (128, 7), (64, 16))),
    *(Sample(1, c, c // 32, 32, n, n, extras="scale shift residual") for c, n in ((128, 14), (256, 7), (64, 24))),
    Sample(2, 64, 2, 32, 32, 32, kernels=(), extras="scale shift"),
    Sample(1, 32, 2, 16, 48, 64, extras="scale shift", layout="channels_last"),
    # Kernel sizes, alone and several at once, and none.
    *(Sample(2, 24, 2, 8, 9, 8, kernels=(k,), extras=ALL) for k in (1, 3, 7, 9)),
    *(Sample(2, 24, 2, 8, 9, 7, kernels=kernels) for kernels in ((), (3, 5), (5, 3, 7), (1, 9))),
    # Head dims: one, odd, between the vector widths, wide; channels of every kind.
    *(Sample(2, 3 * d % 50 + 1, 2, d, 9, 7, extras=ALL) for d in (1, 2, 3, 4, 5, 7, 12, 15, 17, 24)),
    *(Sample(1, 31, 1, d, 9, 8, out_channels=d + 5, extras="biases shift") for d in (31, 33, 40, 48, 63, 64)),
    *(Sample(2, c, 1, 8, 7, 5, out_channels=o, extras="scale") for c, o in ((1, 1), (2, 67), (130, 3), (8, 200))),
    # One pixel, smaller than the kernel, long rows and columns, fewer tokens than D.
    *(Sample(2, 16, 2, 8, h, w, extras="scale shift") for h, w in ((1, 1), (1, 2), (2, 2), (1, 8), (3, 3), (4, 5))),
    *(Sample(1, 8, 2, 4, h, w, kernels=(3, 5)) for h, w in ((1, 33), (1, 700), (3, 300), (2, 129), (700, 1), (97, 3))),
    Sample(1, 12, 1, 4, 70, 66, kernels=(7,), extras="biases"),
    # Batches.
    *(Sample(batch, 16, 2, 8, 5, 6, extras=ALL) for batch in (1, 5, 17)),
    # Layouts.
    *(
        Sample(2, 24, 2, d, 9, 7, (3, 5), extras, layout)
        for d, extras in ((5, ALL), (16, "shift residual"))
        for layout in ("channels_last", "transposed", "permuted", "sliced", "offset", "expanded")
    ),
    # One extra at a time, and the epsilons: timm's, one that dominates, none.
    *(Sample(2, 16, 2, 8, 8, 8, extras=extra) for extra in ("biases", "scale", "shift", "residual")),
    *(Sample(2, 16, 2, 8, 6, 5, extras="scale shift", eps=eps) for eps in (1e-5, 1e-3, 100.0)),
]  # fmt: skip


def run(arguments: Arguments, backend: str, recompute: bool = False) -> Arguments:
    return results(partial(lite_mla, backend=backend, recompute=recompute), arguments, device=device_of(backend))


def exact(arguments: Arguments) -> Arguments:
    """The results in float64, for grad_outs that are rounded to the dtype of x."""
    return results(reference.lite_mla, in_dtype(arguments, torch.float64), arguments["x"].dtype)


def judge(arguments: Arguments, backend: str, recompute: bool = False) -> dict[str, Verdict]:
    """Rule T for the output and every gradient.

    A token with a tiny denominator dominates the error of a gradient, and how it errs is luck: one rounding of q moves
    the denominator by much. For N <= D the official gradients may even cancel to no error at all. The base is therefore
    whichever errs most: the official formula in the same dtype, or one of a few draws of the exact formula with the
    prescribed roundings (`tests.ops.rounding`).
    """
    ours, truth = run(arguments, backend, recompute), exact(arguments)
    bases = [results(official_lite_mla, arguments)]
    for seeds in (range(2), range(2, 32)):  # the draws are slow, and two mostly do
        bases += [prescribed(arguments, seed) for seed in seeds]
        verdicts = {}
        for name, result in ours.items():
            base = max((base[name] for base in bases), key=lambda base, name=name: largest_error(base, truth[name]))
            verdicts[name] = rule_t(result, truth[name], base)
        if all(verdict.ok for verdict in verdicts.values()):
            break
    return verdicts


def largest_error(result: Tensor, truth: Tensor) -> float:
    """-1 where the result is not finite (the official quadratic path in float16), so that it is never the base."""
    error = float((result.double() - truth).abs().max()) if truth.numel() else 0.0
    return error if math.isfinite(error) else -1.0


def dtypes_are_kept(arguments: Arguments, found: Arguments) -> bool:
    """x's dtype everywhere, and the float32 of the epilogue's vectors."""
    x = arguments["x"].dtype
    vectors = ("grad_proj_scale", "grad_proj_shift")
    return all(
        result.dtype == (torch.promote_types(x, torch.float32) if name in vectors else x)
        for name, result in found.items()
    )


def state_and_tolerance(qkv: Tensor, arguments: Arguments, dtype: torch.dtype) -> tuple[Tensor, float, float]:
    """Of the stored qkv, in float64; its largest sum of absolute terms times the roundings of both operands.

    16 bits: to 11 bits, of sums of up to a hundred terms that may cancel, hence 8 roundings; float32: as many of 24.
    """
    names = ("depthwise_weights", "pointwise_weights", "depthwise_biases", "pointwise_biases")
    weights = in_dtype({name: arguments.get(name) for name in names}, torch.float64)
    qkv, head_dim = qkv.double(), arguments["head_dim"]
    maps = [qkv, *reference.multiscale_aggregate(qkv, **weights, head_dim=head_dim)]
    _, k, v = torch.cat(maps, dim=1).reshape(qkv.shape[0], -1, 3 * head_dim, qkv[0, 0].numel()).split(head_dim, dim=2)
    k = k.relu()
    state = torch.cat([v @ k.mT, k.sum(dim=-1).unsqueeze(2)], dim=2)
    largest = float(torch.maximum(v.abs() @ k.mT, k.sum(dim=-1).unsqueeze(2)).max())
    return state, 0.0, 8 * (2.0**-24 if dtype == torch.float32 else 2.0**-11) * largest
