"""lite_mla in two launches of csrc/cuda, without torch; see plain_runs.py."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import reference
from efficientvit_kernels.testing import official_lite_mla, rule_t
from tests.cuda_emulator.plain_runs import HALF, LAYOUTS, TYPES, called
from tests.ops.block_common import Arguments, in_dtype
from tests.ops.lite_mla_samples import ALL, Sample

POINTERS = {  # of a call, by the arguments of lite_mla
    "x": "x",
    "qkv_weight": "qkv_weight",
    "depthwise": "depthwise_weights",
    "pointwise": "pointwise_weights",
    "proj_weight": "proj_weight",
    "qkv_bias": "qkv_bias",
    "depthwise_bias": "depthwise_biases",
    "pointwise_bias": "pointwise_biases",
    "scale": "proj_scale",
    "shift": "proj_shift",
    "residual": "residual",
}


class Call(ctypes.Structure):
    """As in plain_torch/plain_two_launches.cu."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("type", "layout", "far", "batch", "channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("heads", "head_dim", "size", "out_channels")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (*POINTERS, "y")),
    )


@cache
def expected(sample: Sample, special: bool = False) -> tuple[Arguments, Tensor, Tensor]:
    """Arguments, dense; the output exactly, and as the official formula errs."""
    arguments = Sample(**{**vars(sample), "layout": "nchw"}).make(HALF)
    if special:
        arguments["x"][0, 1, 0, 0], arguments["x"][-1, -1, -1, -1] = math.inf, math.nan
    truth = reference.lite_mla(**in_dtype(arguments, torch.float64))
    return arguments, truth, official_lite_mla(**arguments)


def check(library: ctypes.CDLL, sample: Sample, order: str, *, far: bool = False, special: bool = False) -> None:
    """Rule T; special values where they belong."""
    arguments, truth, base = expected(sample, special)
    y = torch.empty(truth.shape, dtype=HALF)
    call = Call(TYPES[HALF], LAYOUTS.index(sample.layout), far, *arguments["x"].shape, sample.heads, sample.head_dim)
    call.size, call.out_channels, call.eps = sample.kernels[0], truth.shape[1], sample.eps
    for pointer, name in POINTERS.items():
        given = arguments.get(name)
        tensor = given[0] if isinstance(given, list) else given
        if tensor is not None:
            setattr(call, pointer, tensor.data_ptr())
    call.y = y.data_ptr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVK_EMULATOR_ORDER", order)
        called(library.two_launches, call)
    if special:
        assert torch.equal(y.isfinite(), truth.isfinite()), f"{sample}, {order}"
    else:
        verdict = rule_t(y, truth, base)
        assert verdict.ok, f"{sample}, {order}: {verdict}"


def _of(in_channels: int, heads: int, head_dim: int, height: int, width: int, size: int = 3, **rest: object) -> Sample:
    rest = {"batch": 2, "extras": ALL, "out_channels": 16} | rest
    return Sample(
        in_channels=in_channels, heads=heads, head_dim=head_dim, height=height, width=width, kernels=(size,), **rest
    )  # type: ignore[arg-type]


# What the tables for EVK_TRIAL_TWO_LAUNCHES=1 can compute.
QUICK = [
    _of(16, 1, 16, 9, 14, eps=0.5),  # pairs of pixels
    _of(32, 2, 16, 5, 7, out_channels=48, extras="scale"),  # one pixel at a time
    _of(48, 1, 16, 6, 8, layout="channels_last", extras="biases residual"),
]
MORE = [
    _of(16, 3, 16, 20, 40, batch=1, out_channels=32),  # several tiles, several splits
    _of(64, 8, 16, 7, 7, out_channels=128, extras="shift", batch=1),
    _of(32, 1, 16, 18, 34, layout="channels_last", batch=1, out_channels=32, eps=0.0),
    _of(16, 1, 16, 6, 7, layout="sliced"),
    _of(16, 2, 16, 6, 8, layout="transposed", extras="residual"),
    _of(16, 1, 16, 5, 8, layout="offset", extras="biases"),
    _of(16, 1, 8, 80, 128, 5, batch=1, extras=""),  # more splits than a reader adds up, several tiles each
    _of(128, 5, 8, 7, 18, 5, eps=1e-40),
    _of(16, 8, 8, 12, 10, 5, layout="channels_last", out_channels=80),
    _of(32, 1, 32, 9, 24, 7, batch=1),
    _of(16, 3, 32, 6, 9, 7, layout="channels_last", batch=1, out_channels=64, extras="scale shift"),
]
SPECIAL = [_of(16, 1, 16, 9, 12, extras=""), _of(16, 2, 16, 9, 11, extras="")]
# Elements more than 2^31 apart, of inputs and results.
FAR = [
    _of(16, 1, 16, 5, 8, layout="far channels", batch=1),
    _of(16, 1, 16, 5, 7, layout="far tokens"),
    _of(16, 1, 16, 5, 7, layout="far channels", batch=1),
]


def check_two_launches(path: Path, level: int, *, far: bool = True) -> None:
    """With the library of this level of EVK_TRIAL_TWO_LAUNCHES: in two orders of threads and blocks."""
    library = ctypes.CDLL(str(path))
    for sample in [*QUICK, *(MORE if level >= 2 else [])]:
        for order in ("forward", "reverse"):
            check(library, sample, order)
    for sample in SPECIAL if level >= 2 else []:
        check(library, sample, "forward", special=True)
    for sample in FAR if far and level >= 2 else []:
        check(library, sample, "forward", far=True)


def expect_two_launches(level: int) -> None:
    """Computes what is expected, once, before processes are forked that need it."""
    for sample in [*QUICK, *([*MORE, *FAR] if level >= 2 else [])]:
        expected(sample)
    for sample in SPECIAL if level >= 2 else []:
        expected(sample, True)
