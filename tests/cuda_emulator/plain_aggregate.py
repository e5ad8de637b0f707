"""multiscale_aggregate of csrc/cuda without torch, held against the specification; see plain_runs.py."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import reference
from efficientvit_kernels.testing import official_multiscale_aggregate, rule_t
from tests.cuda_emulator.plain_runs import FLOAT, HALF, LAYOUTS, TYPES, called
from tests.ops.block_common import Arguments, grad_outs_like, in_dtype, results

MOST = 4


class Call(ctypes.Structure):
    """As in plain_torch/plain_aggregate.cu."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("type", "layout", "far", "batch", "channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("head_dim", "scales", "biases")),
        *((name, ctypes.c_int64) for name in ("needs_qkv", "needs_weights", "needs_biases", "adds")),
        ("sizes", ctypes.c_int64 * MOST),
        ("qkv", ctypes.c_void_p),
        *(
            (name, ctypes.c_void_p * MOST)
            for name in ("depthwise_weights", "pointwise_weights", "depthwise_biases", "pointwise_biases")
        ),
        ("grad_outs", ctypes.c_void_p * MOST),
        ("outs", ctypes.c_void_p * MOST),
        ("grads", ctypes.c_void_p * (1 + 4 * MOST)),
    )


@dataclass(frozen=True)
class Sample:
    """One problem of multiscale_aggregate, in one memory layout."""

    dtype: torch.dtype
    head_dim: int
    height: int
    width: int
    kernels: tuple[int, ...]
    layout: str = "nchw"
    batch: int = 2
    heads: int = 1
    biases: bool = True
    needs: tuple[bool, bool, bool] = (True, True, True)  # qkv, weights, biases
    adds: bool = False  # grad_qkv to what is there
    values: str = "random"  # or "integers", of which every sum is exact; "special": NaN and infinities among them

    @property
    def channels(self) -> int:
        return 3 * self.heads * self.head_dim

    def arguments(self) -> Arguments:
        generator = torch.Generator().manual_seed(0)

        def values(*shape: int, scale: float = 1.0) -> Tensor:
            if self.values == "integers":
                return torch.randint(-2, 3, shape, generator=generator).to(self.dtype)
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(self.dtype)

        made: Arguments = {
            "qkv": values(self.batch, self.channels, self.height, self.width),
            "depthwise_weights": [values(self.channels, 1, k, k, scale=1 / k) for k in self.kernels],
            "pointwise_weights": [
                values(self.channels, self.head_dim, 1, 1, scale=1 / math.sqrt(self.head_dim)) for _ in self.kernels
            ],
            "head_dim": self.head_dim,
        }
        if self.values == "special":
            made["qkv"][0, 1, 0, 0], made["qkv"][-1, -1, -1, -1] = math.inf, math.nan
        if self.biases:
            for name in ("depthwise_biases", "pointwise_biases"):
                made[name] = [values(self.channels, scale=0.5) for _ in self.kernels]
        return made


@dataclass(frozen=True)
class Expected:
    """Arguments and gradients of the outputs; what must come of them exactly, and as the official formula errs."""

    arguments: Arguments
    grad_outs: list[Tensor]
    truth: Arguments
    base: Arguments
    addend: Tensor


@cache
def expected(sample: Sample) -> Expected:
    arguments = sample.arguments()
    truth = results(reference.multiscale_aggregate, in_dtype(arguments, torch.float64), sample.dtype)
    base = results(official_multiscale_aggregate, arguments)
    if sample.values == "special":
        base = results(partial(reference.multiscale_aggregate), arguments)
    outs = {name: out for name, out in base.items() if name.startswith("out")}
    addend = arguments["qkv"].flip(1).contiguous()
    if sample.adds:
        truth["grad_qkv"] = truth["grad_qkv"] + addend.double()
        base["grad_qkv"] = base["grad_qkv"] + addend
    return Expected(arguments, grad_outs_like(outs, sample.dtype), truth, base, addend)


def run(library: ctypes.CDLL, sample: Sample, *, far: bool = False) -> dict[str, Tensor]:
    """Results by their names in `Expected`; those alone that the sample needs."""
    known = expected(sample)
    arguments, (qkv, weights, biases) = known.arguments, sample.needs
    shape, scales = arguments["qkv"].shape, range(len(sample.kernels))
    call = Call(TYPES[sample.dtype], LAYOUTS.index(sample.layout), far, *shape, sample.head_dim, len(scales))
    call.biases, (call.needs_qkv, call.needs_weights, call.needs_biases) = sample.biases, sample.needs
    call.adds = sample.adds
    call.qkv = arguments["qkv"].data_ptr()
    found = {f"out[{s}]": torch.empty(shape, dtype=sample.dtype) for s in scales}
    for s in scales:
        call.sizes[s], call.outs[s] = sample.kernels[s], found[f"out[{s}]"].data_ptr()
        call.grad_outs[s] = known.grad_outs[s].data_ptr()
        for name in ("depthwise_weights", "pointwise_weights", "depthwise_biases", "pointwise_biases"):
            if name in arguments:
                getattr(call, name)[s] = arguments[name][s].data_ptr()
    wanted = [("depthwise_weights", weights), ("pointwise_weights", weights)]
    wanted += [("depthwise_biases", biases), ("pointwise_biases", biases)]
    grads = {"grad_qkv": known.addend.clone()} if qkv else {}
    for name, needed in wanted:
        if needed:
            grads |= {f"grad_{name}[{s}]": torch.empty_like(arguments[name][s]) for s in scales}
    for i, grad in enumerate(grads.values()):
        call.grads[i] = grad.data_ptr()
    called(library.multiscale_aggregate, call)
    return found | grads


def check(library: ctypes.CDLL, sample: Sample, order: str, *, far: bool = False) -> None:
    """Rule T; of integers, the exact outputs; special values where they belong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVK_EMULATOR_ORDER", order)
        found = run(library, sample, far=far)
    known = expected(sample)
    for name, ours in found.items():
        truth, base = known.truth[name], known.base[name]
        if sample.values == "special":
            torch.testing.assert_close(ours, truth.to(ours), rtol=0.02, atol=0.1, equal_nan=True)
        elif sample.values == "integers" and name.startswith("out"):
            assert torch.equal(ours, truth.to(ours)), f"{sample}, {order}, {name}"
        else:
            verdict = rule_t(ours, truth, base)
            assert verdict.ok, f"{sample}, {order}, {name}: {verdict}"


# What the tables for EVK_TRIAL_AGGREGATE=1 can compute.
QUICK = [
    Sample(HALF, 16, 9, 14, (3,)),  # rows that are not aligned
    Sample(HALF, 16, 5, 16, (3, 3, 3), values="integers"),  # aligned rows; sums over scales
    Sample(HALF, 16, 5, 16, (3, 3), adds=True),
    Sample(HALF, 16, 7, 9, (3,), "channels_last", biases=False, needs=(True, True, False)),
]
MORE = [
    Sample(HALF, 16, 20, 40, (3,), batch=1),  # several tiles, whose halos lie within the image
    Sample(HALF, 16, 18, 34, (3,), "channels_last", batch=1),
    Sample(HALF, 16, 6, 7, (3, 3), "sliced", needs=(False, True, True)),
    Sample(HALF, 16, 6, 7, (3,), "transposed", needs=(True, False, False)),
    Sample(HALF, 16, 6, 7, (3,), "offset", heads=2, needs=(False, False, True)),
    Sample(HALF, 16, 6, 8, (3,), biases=False, needs=(True, True, False), values="special"),
    Sample(HALF, 16, 5, 7, (3,), biases=False, needs=(True, True, False), values="special"),
    Sample(HALF, 8, 6, 5, (7,), batch=35),  # several tiles in a run
    Sample(HALF, 8, 20, 24, (7,), batch=1, heads=2),
    Sample(HALF, 8, 20, 23, (7,), "channels_last", batch=1, adds=True),
    Sample(HALF, 64, 9, 16, (5,), batch=1),
    Sample(FLOAT, 16, 9, 12, (5, 5)),
    Sample(FLOAT, 16, 5, 7, (5,), "channels_last", values="integers"),
    Sample(FLOAT, 16, 18, 21, (5,), "sliced", batch=1, adds=True),
    Sample(FLOAT, 16, 6, 8, (5,), biases=False, needs=(True, True, False), values="special"),
]
# Elements more than 2^31 apart, of inputs and results.
FAR = [
    Sample(HALF, 16, 5, 8, (3,), "far channels", batch=1),
    Sample(HALF, 16, 5, 7, (3,), "far channels", batch=1),
    Sample(HALF, 16, 5, 7, (3,), "far tokens", batch=2),
]


def check_aggregate(path: Path, level: int, *, far: bool = True) -> None:
    """With the library of this level of EVK_TRIAL_AGGREGATE: in two orders of threads and blocks."""
    library = ctypes.CDLL(str(path))
    for sample in [*QUICK, *(MORE if level >= 2 else [])]:
        for order in ("forward", "reverse"):
            check(library, sample, order)
    for sample in FAR if far and level >= 2 else []:
        check(library, sample, "forward", far=True)


def expect_all(level: int) -> None:
    """Computes what is expected, once, before processes are forked that need it."""
    for sample in [*QUICK, *([*MORE, *FAR] if level >= 2 else [])]:
        expected(sample)
