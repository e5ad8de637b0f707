"""The launchers and kernels of csrc/cuda without torch (see plain_torch/plain_torch.h), held against the specification.

check_attention(library)  # raises where a result is wrong, or memory is touched that must not be
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import reference
from efficientvit_kernels.testing import gradients, make_qkv, rule_t
from tests.cuda_emulator import build
from tests.ops.common import grad_out_like, truth_and_base

PLAIN = build.EMULATOR / "plain_torch"
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
LAYOUTS = ["nchw", "channels_last", "sliced", "transposed", "offset", "far channels", "far tokens"]


class Call(ctypes.Structure):
    """As in plain_torch/plain_attention.cu."""

    _names = ("type", "layout", "far", "batch", "channels", "height", "width", "count", "head_dim", "scale_count")
    _fields_ = (
        *((name, ctypes.c_int64) for name in _names),
        ("eps", ctypes.c_double),
        ("scales", ctypes.c_int64 * 8),
        ("qkv", ctypes.c_void_p * 8),
        ("grad_out", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("grads", ctypes.c_void_p * 8),
    )


def called(function: Callable[..., bytes | None], call: ctypes.Structure) -> None:
    """Raises RuntimeError with the words of the library."""
    function.restype = ctypes.c_char_p  # type: ignore[attr-defined]
    if (words := function(ctypes.byref(call))) is not None:
        raise RuntimeError(words.decode())


@dataclass(frozen=True)
class Sample:
    """One problem of relu_linear_attention, in one memory layout."""

    dtype: torch.dtype
    head_dim: int
    height: int
    width: int
    layout: str = "nchw"
    batch: int = 2
    heads: int = 2
    scales: int = 1
    eps: float = 1e-15
    values: str = "random"  # "integers": every sum is exact; "special": NaN and infinities; "cancelling": see `qkv`

    @property
    def backward_scales(self) -> list[int]:
        """Of three or more, some in another order."""
        return [2, 0] if self.scales == 3 else list(range(self.scales))

    def qkv(self) -> list[Tensor]:
        made = make_qkv(
            *(self.batch, self.heads, self.head_dim, self.height, self.width), scales=self.scales, dtype=self.dtype
        )
        if self.values == "integers":
            made = [torch.randint(-3, 4, x.shape, generator=torch.Generator().manual_seed(i)).to(x) for i, x in
                    enumerate(made)]  # fmt: skip
        if self.values == "cancelling":
            # Splits of 256 tokens whose sums are 2^25, 1, 1 and -2^25: 2, if what each addition rounds away is kept.
            packed = made[0].zero_().view(self.batch, self.heads, 3, self.head_dim, -1)
            for token, k, v in ((5, 1024, 32768), (300, 1, 1), (600, 1, 1), (900, 1024, -32768)):
                packed[:, :, 1, :, token], packed[:, :, 2, :, token] = k, v
        if self.values == "special":
            packed = made[0].view(self.batch, self.heads, 3, self.head_dim, -1)
            packed[0, 0, 0, 1, 3] = math.nan  # q: one token of one head
            packed[0, 1, 1, 2, -1] = math.nan  # k: what reads column 2
            packed[-1, 0, 2, 0, 0] = math.inf  # v: one row
            packed[-1, 1, 0, :, 5] = 0  # a denominator that is eps alone
            packed[-1, 1, 0, :, 6] = -1
        return made


@dataclass(frozen=True)
class Expected:
    """qkv and grad_out, and what must come of them: [out, gradients...] exactly, and as the official formula errs."""

    qkv: list[Tensor]
    grad_out: Tensor
    truth: list[Tensor]
    base: list[Tensor]
    state: Tensor


def states_of(scales: list[Tensor], heads: int, head_dim: int) -> Tensor:
    """The exact states [B, G, D + 1, D] of qkv tensors."""
    states = []
    for x in scales:
        _, k, v = x.double().reshape(x.shape[0], heads, 3, head_dim, -1).unbind(2)
        k = k.relu()
        states.append(torch.cat([v @ k.mT, k.sum(-1).unsqueeze(2)], dim=2))
    return torch.cat(states, dim=1)


@cache
def expected(sample: Sample) -> Expected:
    qkv = sample.qkv()
    if sample.values == "special":
        leaves = [x.double().requires_grad_() for x in qkv]
        out = reference.relu_linear_attention(leaves, sample.head_dim, eps=sample.eps)
        grad_out = grad_out_like(out).to(sample.dtype)
        truth = [out.detach(), *gradients(out, grad_out.double(), leaves)]
        base = truth
    else:
        truth, base = truth_and_base(qkv, sample.head_dim, sample.eps)
        grad_out = grad_out_like(truth[0]).to(sample.dtype)
    return Expected(qkv, grad_out, truth, base, states_of(qkv, sample.heads, sample.head_dim))


def run(library: ctypes.CDLL, sample: Sample, *, far: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, state and the gradients of `backward_scales`. Raises RuntimeError with the library's words."""
    inputs, d = expected(sample), sample.head_dim
    shape = inputs.qkv[0].shape
    groups = sample.heads * sample.scales
    out = torch.empty(sample.batch, groups * d, sample.height, sample.width, dtype=sample.dtype)
    state = torch.empty(sample.batch, groups, d + 1, d)
    grads = [torch.empty(shape, dtype=sample.dtype) for _ in sample.backward_scales]
    call = Call(TYPES[sample.dtype], LAYOUTS.index(sample.layout), far, shape[0], *shape[1:], sample.scales, d)
    call.scale_count, call.eps = len(grads), sample.eps
    for i, x in enumerate(inputs.qkv):
        call.qkv[i] = x.data_ptr()
    for i, (scale, x) in enumerate(zip(sample.backward_scales, grads, strict=True)):
        call.scales[i], call.grads[i] = scale, x.data_ptr()
    call.grad_out, call.out, call.state = inputs.grad_out.data_ptr(), out.data_ptr(), state.data_ptr()
    called(library.relu_linear_attention, call)
    return out, state, grads


def check(library: ctypes.CDLL, sample: Sample, order: str, *, far: bool = False) -> None:
    """Rule T, and the state; of integers, the exact state; special values where they belong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVK_EMULATOR_ORDER", order)
        out, state, grads = run(library, sample, far=far)
    known = expected(sample)
    ours = {0: out}
    if sample.eps == 0 or sample.eps > 2.0**-126:  # quotients by less leave float16
        ours |= {1 + i: x for i, x in zip(sample.backward_scales, grads, strict=True)}
    for i, x in ours.items() if sample.values != "cancelling" else ():
        truth, base = known.truth[i], known.base[i]
        if sample.values == "special":
            torch.testing.assert_close(x, truth.to(x), rtol=0.02, atol=0.02, equal_nan=True)
        else:
            verdict = rule_t(x, truth, base)
            assert verdict.ok, f"{sample}, {order}, result {i}: {verdict}"
    exact = sample.values in ("integers", "cancelling")
    size = 1.0 if exact else float(known.state.abs().nan_to_num(0, 0, 0).max())
    tolerance = 0 if exact else 2e-6 * size
    torch.testing.assert_close(state.double(), known.state, rtol=0, atol=tolerance, equal_nan=True)


HALF, FLOAT = torch.float16, torch.float32
# What the tables for EVK_TRIAL_HALF=1 can compute: two accesses of D = 16.
HALF_QUICK = [
    Sample(HALF, 16, 6, 14, scales=3, eps=0.5),  # rows aligned to 4 tokens; tiles that end within an image
    Sample(HALF, 16, 5, 8, values="integers"),  # to 8
    Sample(HALF, 16, 5, 7, "sliced", eps=0.0),
]
HALF_MORE = [
    Sample(HALF, 16, 20, 28, batch=1, eps=0.5),  # several splits, several warps
    Sample(HALF, 16, 46, 50, batch=1, heads=1),  # so many that a kernel of its own adds them up
    Sample(HALF, 16, 9, 8, "channels_last", values="integers"),
    Sample(HALF, 16, 32, 32, batch=1, heads=1, values="cancelling"),
    Sample(HALF, 16, 7, 19, "channels_last", scales=2, eps=0.0),
    Sample(HALF, 16, 7, 19, "offset", batch=3),
    Sample(HALF, 16, 13, 5, "transposed"),
    Sample(HALF, 16, 4, 8, values="special", eps=1e-40),
    Sample(HALF, 16, 3, 5, values="special"),
    Sample(HALF, 8, 10, 14, eps=0.5),
    Sample(HALF, 8, 7, 19, "channels_last"),
    Sample(HALF, 64, 6, 24, batch=1, values="integers"),
    Sample(HALF, 64, 10, 14, batch=1, eps=0.5),
    Sample(torch.bfloat16, 8, 6, 14),
]
FLOAT_QUICK = [
    Sample(FLOAT, 8, 9, 15),
    Sample(FLOAT, 8, 5, 7, "channels_last", values="integers", eps=0.5),
    Sample(FLOAT, 8, 5, 7, values="special"),
]
FLOAT_MORE = [
    Sample(FLOAT, 8, 46, 50, batch=1, heads=1),
    Sample(FLOAT, 8, 7, 9, "sliced", eps=0.0),
    Sample(FLOAT, 8, 32, 32, batch=1, heads=1, values="cancelling"),
    Sample(FLOAT, 8, 20, 20, "channels_last", scales=3),
    Sample(FLOAT, 64, 9, 15, batch=1, eps=0.0),  # so many channels that no q is all negative
]
# Elements more than 2^31 apart, of inputs and results.
HALF_FAR = [
    Sample(HALF, 16, 5, 8, "far channels", batch=1),
    Sample(HALF, 16, 5, 7, "far tokens", batch=1, heads=1),
    Sample(HALF, 8, 5, 7, "far tokens", batch=2, heads=1),
]
FLOAT_FAR = [Sample(FLOAT, 8, 5, 8, "far channels", batch=1), Sample(FLOAT, 8, 5, 7, "far tokens", batch=1)]


def check_attention(path: Path, half: int, fp32: int, *, far: bool = True) -> None:
    """With the library of these levels of EVK_TRIAL_HALF and EVK_TRIAL_FP32: in two orders of threads and blocks."""
    library = ctypes.CDLL(str(path))
    for sample in chosen(half, fp32):
        for order in ("forward", "reverse"):
            check(library, sample, order)
    for sample in far_apart(half, fp32) if far else []:
        check(library, sample, "forward", far=True)


def chosen(half: int, fp32: int) -> list[Sample]:
    parts = [(half >= 1, HALF_QUICK), (half >= 2, HALF_MORE), (fp32 >= 1, FLOAT_QUICK), (fp32 >= 2, FLOAT_MORE)]
    return [sample for take, part in parts if take for sample in part]


def far_apart(half: int, fp32: int) -> list[Sample]:
    parts = [(half >= 1, HALF_FAR[:1]), (half >= 2, HALF_FAR[1:]), (fp32 >= 1, FLOAT_FAR)]
    return [sample for take, part in parts if take for sample in part]


def expect_all(half: int, fp32: int) -> None:
    """Computes what is expected, once, before processes are forked that need it."""
    for sample in [*chosen(half, fp32), *far_apart(half, fp32)]:
        expected(sample)
