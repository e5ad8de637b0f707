"""LiteMLA and FusedLiteMLA on bad input: the error's class and text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from efficientvit_kernels import FusedLiteMLA, LiteMLA
from efficientvit_kernels.testing import native_calls

X = torch.zeros(2, 32, 4, 4)


def fused(**kwargs: Any) -> FusedLiteMLA:
    return FusedLiteMLA(32, 32, **kwargs)


def changed(**attributes: Any) -> LiteMLA:
    """A LiteMLA with attributes or submodules replaced."""
    module = LiteMLA(32, 32)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class Subclass(LiteMLA):
    pass


FROM = "FusedLiteMLA.from_module: module must be a known LiteMLA, got one that "
BACKENDS = "'auto', 'reference', 'cpu', 'triton', 'cuda'"
ERRORS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("rank", lambda: fused()(X[0]), ValueError, "FusedLiteMLA: x must be of shape [B, channels, H, W], got [32, 4, 4]"),
    ("channels", lambda: fused()(X[:, :31]), ValueError, "FusedLiteMLA: x must be of shape [B, 32, H > 0, W > 0], got [2, 31, 4, 4]"),
    ("H is 0", lambda: fused()(X[:, :, :0]), ValueError, "FusedLiteMLA: x must be of shape [B, 32, H > 0, W > 0], got [2, 32, 0, 4]"),
    ("W is 0", lambda: fused()(X[..., :0]), ValueError, "FusedLiteMLA: x must be of shape [B, 32, H > 0, W > 0], got [2, 32, 4, 0]"),
    ("reference module", lambda: LiteMLA(32, 32)(X[..., :0]), ValueError, "LiteMLA: x must be of shape [B, 32, H > 0, W > 0], got [2, 32, 4, 0]"),
    ("half input", lambda: fused()(X.half()), TypeError, "FusedLiteMLA: x must be of the weights' dtype torch.float32, got torch.float16"),
    ("float input", lambda: fused().half()(X), TypeError, "FusedLiteMLA: x must be of the weights' dtype torch.float16, got torch.float32"),
    ("double input", lambda: fused().bfloat16()(X.double()), TypeError, "FusedLiteMLA: x must be of the weights' dtype torch.bfloat16, got torch.float64"),
    ("integers", lambda: fused()(X.long()), TypeError, "FusedLiteMLA: x must be of dtype float16, bfloat16, float32, float64, got int64"),
    ("complex", lambda: fused()(X.cfloat()), TypeError, "FusedLiteMLA: x must be of dtype float16, bfloat16, float32, float64, got complex64"),
    ("no tensor", lambda: fused()([X]), TypeError, "FusedLiteMLA: x must be a tensor, got list"),
    ("backend cannot run", lambda: fused(backend="cpu").to("meta")(X.to("meta")), NotImplementedError, "lite_mla: backend must be one that can run here, got 'cpu': it needs CPU tensors, these are on meta"),
    ("other kernel function", lambda: fused(kernel_func="gelu", backend="cpu").to("meta")(X.to("meta")), NotImplementedError, "FusedLiteMLA: backend must be one that can run here, got 'cpu': it needs CPU tensors, these are on meta"),
    ("recompute", lambda: fused(recompute=1), TypeError, "FusedLiteMLA: recompute must be a bool, got int"),
    ("from_module, recompute", lambda: FusedLiteMLA.from_module(LiteMLA(32, 32), recompute=None), TypeError, "FusedLiteMLA.from_module: recompute must be a bool, got NoneType"),  # type: ignore[arg-type]
    ("unknown backend", lambda: fused(backend="fast"), ValueError, f"FusedLiteMLA: backend must be one of {BACKENDS}, got 'fast'"),
    ("missing backend", lambda: fused(backend="cuda"), NotImplementedError, "FusedLiteMLA: backend must be one that can run here, got 'cuda': it was left out"),
    ("no head", lambda: fused(dim=64), ValueError, "LiteMLA: in_channels must give at least one head of dim 64, got 32"),
    ("even scale", lambda: fused(scales=(4,)), ValueError, "LiteMLA: scales must be odd and positive, got (4,)"),
    ("negative scale", lambda: fused(scales=(-3,)), ValueError, "LiteMLA: scales must be odd and positive, got (-3,)"),
    ("norm", lambda: fused(norm="bn"), ValueError, "make_norm: name must be one of bn2d, ln2d, trms2d or None, got 'bn'"),
    ("activation", lambda: fused(act_func="swish"), ValueError, "make_activation: name must be one of relu, relu6, hswish, silu, gelu or None, got 'swish'"),
    ("kernel function", lambda: fused(kernel_func=None), ValueError, "LiteMLA: kernel_func must be the name of an activation, got None"),
    ("pair", lambda: fused(norm=("bn2d",) * 3), ValueError, "LiteMLA: a pair must be a scalar or two values, got 3 values"),
    ("dim 0", lambda: fused(dim=0), ValueError, "LiteMLA: dim must be positive, got 0"),
    ("dim float", lambda: fused(dim=8.0), TypeError, "LiteMLA: dim must be an int, got float"),
    ("eps", lambda: fused(eps=-1.0), ValueError, "LiteMLA: eps must be finite and not negative, got -1.0"),
    ("from no module", lambda: FusedLiteMLA.from_module(3), TypeError, FROM + "is of type int, not a torch.nn.Module"),  # type: ignore[arg-type]
    ("from another module", lambda: FusedLiteMLA.from_module(nn.Conv2d(3, 3, 1)), TypeError, FROM + "is a torch.nn.modules.conv.Conv2d, which is none of the known LiteMLA classes"),
    ("from a subclass", lambda: FusedLiteMLA.from_module(Subclass(32, 32)), TypeError, FROM + "is a tests.nn.test_lite_mla_errors.Subclass, a subclass of efficientvit_kernels.nn.lite_mla.LiteMLA that may compute something else"),
    ("from another kernel function", lambda: FusedLiteMLA.from_module(LiteMLA(32, 32, kernel_func="gelu")), TypeError, FROM + "has the kernel function GELU, and the kernels compute ReLU"),
    ("from one with its own forward", lambda: FusedLiteMLA.from_module(changed(forward=torch.nn.Identity().forward)), TypeError, FROM + "has a forward of its own, set on the instance"),
    ("from one with another aggreg", lambda: FusedLiteMLA.from_module(changed(aggreg=nn.Identity())), TypeError, FROM + "has an aggreg of type Identity, where a LiteMLA has a ModuleList"),
    ("from one with more submodules", lambda: FusedLiteMLA.from_module(changed(gate=nn.Identity())), TypeError, FROM + "has the submodules aggreg, gate, kernel_func, proj, qkv, where a LiteMLA has aggreg, kernel_func, proj, qkv"),
    ("from one with a parameter", lambda: FusedLiteMLA.from_module(changed(scale=nn.Parameter(X))), TypeError, FROM + "has parameters or buffers of its own: scale"),
    ("from one without dim", lambda: FusedLiteMLA.from_module(changed(dim=None)), TypeError, FROM + "has no positive integer attribute dim (it is None)"),
    ("from one with a bad eps", lambda: FusedLiteMLA.from_module(changed(eps=float("nan"))), TypeError, FROM + "has no finite, non-negative attribute eps (it is nan)"),
    ("from_module, unknown backend", lambda: FusedLiteMLA.from_module(LiteMLA(32, 32), "gpu"), ValueError, f"FusedLiteMLA.from_module: backend must be one of {BACKENDS}, got 'gpu'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])
@pytest.mark.usefixtures("without_cuda")
def test_bad_input(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    before = native_calls()
    with pytest.raises(error, match="^" + re.escape(text)) as caught:
        call()
    assert caught.type is error
    assert native_calls() == before
