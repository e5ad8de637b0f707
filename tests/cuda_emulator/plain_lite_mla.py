"""What CUDA kernels do between and behind the products of lite_mla, without torch; see plain_runs.py."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import reference
from efficientvit_kernels.testing import official_multiscale_aggregate, official_relu_linear_attention, rule_t
from tests.cuda_emulator import plain_aggregate
from tests.cuda_emulator.plain_runs import FLOAT, HALF, LAYOUTS, TYPES, called, states_of
from tests.ops.block_common import Arguments, in_dtype

MOST = 4
WEIGHTS = ("depthwise_weights", "pointwise_weights", "depthwise_biases", "pointwise_biases")


class FusedCall(ctypes.Structure):
    """As `Call` in plain_torch/plain_aggregate_attention.cu."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("type", "layout", "far", "batch", "channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("head_dim", "scales", "biases", "channels_last")),
        ("eps", ctypes.c_double),
        ("sizes", ctypes.c_int64 * MOST),
        ("qkv", ctypes.c_void_p),
        *((name, ctypes.c_void_p * MOST) for name in WEIGHTS),
        ("out", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
    )


class ProjectionCall(ctypes.Structure):
    """As `Call` in plain_torch/plain_projection.cu."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("type", "layout", "batch", "channels", "out_channels")),
        *((name, ctypes.c_int64) for name in ("height", "width", "multiprocessors")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "shift", "residual", "y")),
    )


# --- aggregation and attention ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fused:
    """A sample of the aggregation, and how its attention is computed and stored."""

    aggregated: plain_aggregate.Sample
    eps: float = 1e-15
    channels_last: bool = False


@cache
def expected(sample: Fused) -> tuple[Arguments, Tensor, Tensor, Tensor]:
    """The arguments of the aggregation; the output exactly and as the official formula errs; the exact state."""
    part = sample.aggregated
    arguments = part.arguments()
    if part.values == "integers":  # so small that every product is exact in TF32, too
        arguments = {name: value if name == "head_dim" else _small(value) for name, value in arguments.items()}
    wide = in_dtype(arguments, torch.float64)
    scales = [wide["qkv"], *reference.multiscale_aggregate(**wide)]
    truth = reference.relu_linear_attention(scales, part.head_dim, eps=sample.eps)
    rounded = [arguments["qkv"], *official_multiscale_aggregate(**arguments)]
    base = official_relu_linear_attention(rounded, part.head_dim, sample.eps)
    return arguments, truth, base, states_of(scales, part.heads, part.head_dim)


def _small(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return [x.clamp(-1, 1) for x in value] if isinstance(value, list) else value.clamp(-1, 1)


def run_fused(library: ctypes.CDLL, sample: Fused, *, far: bool) -> tuple[Tensor, Tensor]:
    part, (arguments, truth, _, states) = sample.aggregated, expected(sample)
    shape, scales = arguments["qkv"].shape, len(part.kernels)
    out, state = torch.empty(truth.shape, dtype=part.dtype), torch.empty(states.shape)
    call = FusedCall(TYPES[part.dtype], LAYOUTS.index(part.layout), far, *shape, part.head_dim, scales, part.biases)
    call.channels_last, call.eps = sample.channels_last, sample.eps
    call.qkv, call.out, call.state = arguments["qkv"].data_ptr(), out.data_ptr(), state.data_ptr()
    for s in range(scales):
        call.sizes[s] = part.kernels[s]
        for name in WEIGHTS:
            if name in arguments:
                getattr(call, name)[s] = arguments[name][s].data_ptr()
    called(library.aggregate_attention, call)
    return out, state


def check_one_fused(library: ctypes.CDLL, sample: Fused, order: str, *, far: bool = False) -> None:
    """Rule T; the state, of integers exactly; special values where they belong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVK_EMULATOR_ORDER", order)
        out, state = run_fused(library, sample, far=far)
    _, truth, base, states = expected(sample)
    values = sample.aggregated.values
    if values == "special":
        torch.testing.assert_close(out, truth.to(out), rtol=0.02, atol=0.05, equal_nan=True)
    else:
        verdict = rule_t(out, truth, base)
        assert verdict.ok, f"{sample}, {order}: {verdict}"
    # D * qkv + b is rounded to 11 bits.
    tolerance = 0 if values == "integers" else 1e-3 * float(states.abs().nan_to_num(0, 0, 0).max())
    torch.testing.assert_close(state.double(), states, rtol=0, atol=tolerance, equal_nan=True)


def _of(*shape: int, kernels: tuple[int, ...] = (3,), eps: float = 1e-15, last: bool = False, **rest: object) -> Fused:
    """D, height, width."""
    return Fused(plain_aggregate.Sample(HALF, *shape, kernels, **rest), eps, last)  # type: ignore[arg-type]


# What the tables for EVK_TRIAL_AGGREGATE_ATTENTION=1 can compute.
FUSED_QUICK = [
    _of(16, 9, 14, eps=0.5),  # rows that are not aligned, several warps
    _of(16, 5, 16, kernels=(3, 3), values="integers", heads=2),
    _of(16, 6, 7, layout="channels_last", biases=False, eps=0.0),
]
FUSED_MORE = [
    _of(16, 20, 40, batch=1, last=True),  # several tiles, several splits
    _of(16, 7, 7, layout="sliced", last=True),
    _of(16, 6, 8, layout="transposed"),
    _of(16, 5, 9, layout="offset"),
    _of(16, 6, 8, values="special", biases=False),
    _of(16, 5, 7, values="special"),
    _of(8, 80, 128, kernels=(5,), batch=1),  # more splits than a reader adds up, several tiles each
    _of(8, 6, 16, kernels=(5,), values="integers"),
    _of(8, 7, 9, kernels=(5,), layout="channels_last", eps=1e-40),
    _of(32, 9, 24, kernels=(7,), batch=1),
    _of(32, 6, 9, kernels=(7, 7), layout="channels_last", batch=1, last=True),
]
FUSED_FAR = [
    _of(16, 5, 8, layout="far channels", batch=1),
    _of(16, 5, 7, layout="far tokens", batch=2),
    _of(16, 5, 7, layout="far channels", batch=1),
]


def check_fused(path: Path, level: int, *, far: bool = True) -> None:
    """With the library of this level of EVK_TRIAL_AGGREGATE_ATTENTION: in two orders of threads and blocks."""
    library = ctypes.CDLL(str(path))
    for sample in [*FUSED_QUICK, *(FUSED_MORE if level >= 2 else [])]:
        for order in ("forward", "reverse"):
            check_one_fused(library, sample, order)
    for sample in FUSED_FAR if far else []:
        check_one_fused(library, sample, "forward", far=True)


def expect_fused(level: int) -> None:
    """Computes what is expected, once, before processes are forked that need it."""
    for sample in [*FUSED_QUICK, *FUSED_FAR, *(FUSED_MORE if level >= 2 else [])]:
        expected(sample)


# --- the projection ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """y = scale * (W x) + shift + residual, or of y itself where `channels` is 0."""

    dtype: torch.dtype
    channels: int
    out_channels: int
    height: int
    width: int
    layout: str = "nchw"
    batch: int = 2
    extras: str = "scale shift residual"
    multiprocessors: int = 132  # where there are many, blocks have fewer tokens

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def values(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        image = (self.batch, self.out_channels, self.height, self.width)
        found = {"y": values(*image).to(self.dtype), "residual": values(*image).to(self.dtype)}
        found |= {"scale": values(self.out_channels), "shift": values(self.out_channels)}
        if self.channels:
            found["x"] = values(self.batch, self.channels, self.height, self.width).to(self.dtype)
            found["weight"] = (values(self.out_channels, self.channels) / self.channels**0.5).to(self.dtype)
        return {n: x for n, x in found.items() if n in ("x", "weight", "y") or n in self.extras.split()}


def check_one_projection(library: ctypes.CDLL, sample: Projection, order: str) -> None:
    """Sums in float32, rounded once; in float32 storage every step is."""
    inputs = sample.inputs()
    wide = {name: x.double() for name, x in inputs.items()}
    call = ProjectionCall(TYPES[sample.dtype], LAYOUTS.index(sample.layout), sample.batch, sample.channels)
    call.out_channels, call.height, call.width = sample.out_channels, sample.height, sample.width
    call.multiprocessors = sample.multiprocessors
    for name, x in inputs.items():
        setattr(call, name, x.data_ptr())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVK_EMULATOR_ORDER", order)
        called(library.projection, call)
    truth = torch.einsum("oc,bchw->bohw", wide["weight"], wide["x"]) if sample.channels else wide["y"]
    if "scale" in wide:
        truth = truth * wide["scale"].view(1, -1, 1, 1)
    if "shift" in wide:
        truth = truth + wide["shift"].view(1, -1, 1, 1)
    if "residual" in wide:
        truth = truth + wide["residual"]
    bound = torch.finfo(sample.dtype).eps * (truth.abs() + (4 if sample.dtype == FLOAT else 1e-3))
    worst = ((inputs["y"].double() - truth).abs() - bound).max()
    assert worst <= 0, f"{sample}, {order}: {float(worst):.3g} beyond the bound"


BFLOAT = torch.bfloat16
PROJECTIONS = [
    Projection(HALF, 40, 70, 5, 7),  # one element at a time
    Projection(HALF, 40, 70, 5, 7, "sliced", extras="scale"),
    Projection(HALF, 32, 64, 6, 8, extras="shift residual"),  # four neighbours
    Projection(HALF, 104, 24, 6, 10, "channels_last", batch=3),  # eight channels
    Projection(HALF, 8, 70, 1, 5, "channels_last", extras="shift"),
    Projection(HALF, 16, 24, 3, 4, extras="scale"),
    Projection(HALF, 16, 24, 3, 3, "channels_last", extras="scale"),
    Projection(HALF, 264, 24, 9, 15, "transposed", batch=1, extras=""),
    Projection(HALF, 136, 72, 9, 12, multiprocessors=1),  # 64 tokens a block
    Projection(BFLOAT, 72, 136, 9, 17, "channels_last", multiprocessors=1),
    Projection(HALF, 16, 16, 3, 4, "far channels", batch=2),
    Projection(HALF, 16, 16, 3, 3, "far tokens", batch=2),
]
EPILOGUES = [
    Projection(HALF, 0, 24, 4, 8),
    Projection(HALF, 0, 24, 4, 8, extras="scale"),
    Projection(HALF, 0, 24, 5, 7, "channels_last", extras="scale residual"),
    Projection(HALF, 0, 11, 5, 7, "channels_last", extras="shift"),
    Projection(HALF, 0, 5, 9, 9, "sliced"),
    Projection(FLOAT, 0, 12, 6, 10),
    Projection(FLOAT, 0, 12, 5, 7, "channels_last"),
    Projection(FLOAT, 0, 3, 5, 7, extras="scale"),
    Projection(FLOAT, 0, 3, 16, 20, "transposed", extras="residual"),
    Projection(BFLOAT, 0, 8, 5, 8, extras="shift residual"),
    Projection(HALF, 0, 16, 3, 4, "far channels", batch=2),
    Projection(HALF, 0, 16, 3, 3, "far tokens", batch=2),
]


def check_projection(path: Path, *, far: bool = True) -> None:
    """In two orders of threads and blocks."""
    library = ctypes.CDLL(str(path))
    for sample in (*PROJECTIONS, *EPILOGUES):
        if far or not sample.layout.startswith("far"):
            for order in ("forward", "reverse"):
                check_one_projection(library, sample, order)


def expect_projection() -> None:
    """What is expected is computed in a moment."""
