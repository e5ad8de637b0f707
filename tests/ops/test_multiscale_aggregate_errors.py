"""multiscale_aggregate on bad input: the error's class and its whole text, before anything is launched."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import _library, multiscale_aggregate
from efficientvit_kernels.testing import native_calls

QKV = torch.zeros(2, 96, 4, 4)
DEPTHWISE, POINTWISE, BIAS = torch.zeros(96, 1, 5, 5), torch.zeros(96, 16, 1, 1), torch.zeros(96)


def call(qkv: Any = QKV, depthwise: Any = (DEPTHWISE,), pointwise: Any = (POINTWISE,), **kwargs: Any) -> list[Tensor]:
    return multiscale_aggregate(qkv, depthwise, pointwise, **{"head_dim": 16} | kwargs)


def biases(depthwise: Any = (BIAS,), pointwise: Any = (BIAS,)) -> list[Tensor]:
    return call(depthwise_biases=depthwise, pointwise_biases=pointwise)


# What is called with what, the class, and the text after "multiscale_aggregate: ".
ERRORS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("rank 3", lambda: call(QKV[0]), ValueError, "qkv must be of shape [B, channels, H, W], got [96, 4, 4]"),
    ("rank 5", lambda: call(QKV[None]), ValueError, "qkv must be of shape [B, channels, H, W], got [1, 2, 96, 4, 4]"),
    ("channels not divisible by 3 D", lambda: call(QKV[:, :95]), ValueError, "qkv must have a multiple of 3 * head_dim = 48 channels, got 95"),
    ("a list of qkv", lambda: call([QKV]), TypeError, "qkv must be a tensor, got list"),
    ("no qkv", lambda: call(None), TypeError, "qkv must be a tensor, got NoneType"),
    ("integers", lambda: call(QKV.long()), TypeError, "qkv must be of dtype float16, bfloat16, float32, float64, got int64"),
    ("complex", lambda: call(QKV.cfloat()), TypeError, "qkv must be of dtype float16, bfloat16, float32, float64, got complex64"),
    ("float8", lambda: call(QKV.to(torch.float8_e4m3fn)), TypeError, "qkv must be of dtype float16, bfloat16, float32, float64, got float8_e4m3fn"),
    ("sparse", lambda: call(QKV.to_sparse()), ValueError, "qkv must be a strided (dense) tensor, got layout torch.sparse_coo"),
    ("head_dim 0", lambda: call(head_dim=0), ValueError, "head_dim must be positive, got 0"),
    ("head_dim float", lambda: call(head_dim=16.0), TypeError, "head_dim must be an int, got float"),
    ("head_dim bool", lambda: call(head_dim=True), TypeError, "head_dim must be an int, got bool"),
    ("head_dim of other weights", lambda: call(head_dim=8), ValueError, "pointwise_weights[0] must be of shape [96, 8, 1, 1], got [96, 16, 1, 1]"),
    ("one weight, no list", lambda: call(depthwise=DEPTHWISE), TypeError, "depthwise_weights must be a sequence of tensors, got Tensor"),
    ("a generator", lambda: call(pointwise=(w for w in [POINTWISE])), TypeError, "pointwise_weights must be a sequence of tensors, got generator"),
    ("None for the weights", lambda: call(depthwise=None), TypeError, "depthwise_weights must be a sequence of tensors, got NoneType"),
    ("lengths differ", lambda: call(pointwise=[POINTWISE] * 2), ValueError, "pointwise_weights must be of depthwise_weights' length 1, got 2"),
    ("no pointwise weights", lambda: call(pointwise=[]), ValueError, "pointwise_weights must be of depthwise_weights' length 1, got 0"),
    ("None among the weights", lambda: call(pointwise=[None]), TypeError, "pointwise_weights[0] must be a tensor, got NoneType"),
    ("an array", lambda: call(depthwise=[DEPTHWISE.numpy()]), TypeError, "depthwise_weights[0] must be a tensor, got ndarray"),
    ("even kernel", lambda: call(depthwise=[DEPTHWISE[..., :4, :4]]), ValueError, "depthwise_weights[0] must be of shape [96, 1, k, k] with an odd k, got [96, 1, 4, 4]"),
    ("kernel not square", lambda: call(depthwise=[DEPTHWISE[..., :3]]), ValueError, "depthwise_weights[0] must be of shape [96, 1, k, k] with an odd k, got [96, 1, 5, 3]"),
    ("kernel of no taps", lambda: call(depthwise=[DEPTHWISE[..., :0, :0]]), ValueError, "depthwise_weights[0] must be of shape [96, 1, k, k] with an odd k, got [96, 1, 0, 0]"),
    ("dense kernel", lambda: call(depthwise=[torch.zeros(96, 96, 5, 5)]), ValueError, "depthwise_weights[0] must be of shape [96, 1, k, k] with an odd k, got [96, 96, 5, 5]"),
    ("kernel of rank 3", lambda: call(depthwise=[DEPTHWISE[:, 0]]), ValueError, "depthwise_weights[0] must be of shape [96, 1, k, k] with an odd k, got [96, 5, 5]"),
    ("depthwise channels", lambda: call(depthwise=[DEPTHWISE, DEPTHWISE[:48]], pointwise=[POINTWISE] * 2), ValueError, "depthwise_weights[1] must be of shape [96, 1, k, k] with an odd k, got [48, 1, 5, 5]"),
    ("pointwise channels", lambda: call(pointwise=[POINTWISE[:48]]), ValueError, "pointwise_weights[0] must be of shape [96, 16, 1, 1], got [48, 16, 1, 1]"),
    ("pointwise of rank 2", lambda: call(pointwise=[POINTWISE[..., 0, 0]]), ValueError, "pointwise_weights[0] must be of shape [96, 16, 1, 1], got [96, 16]"),
    ("depthwise dtype", lambda: call(depthwise=[DEPTHWISE.half()]), TypeError, "depthwise_weights[0] must be of qkv's dtype torch.float32, got torch.float16"),
    ("pointwise dtype", lambda: call(QKV.bfloat16(), depthwise=[DEPTHWISE.bfloat16()]), TypeError, "pointwise_weights[0] must be of qkv's dtype torch.bfloat16, got torch.float32"),
    ("depthwise device", lambda: call(depthwise=[DEPTHWISE.to("meta")]), ValueError, "depthwise_weights[0] must be on qkv's device cpu, got meta"),
    ("sparse weight", lambda: call(pointwise=[POINTWISE.to_sparse()]), ValueError, "pointwise_weights[0] must be a strided (dense) tensor, got layout torch.sparse_coo"),
    ("depthwise biases alone", lambda: biases(pointwise=None), ValueError, "pointwise_biases must be given where depthwise_biases are, got None"),
    ("pointwise biases alone", lambda: biases(depthwise=None), ValueError, "depthwise_biases must be given where pointwise_biases are, got None"),
    ("one bias, no list", lambda: biases(depthwise=BIAS), TypeError, "depthwise_biases must be a sequence of tensors, got Tensor"),
    ("too many biases", lambda: biases(pointwise=[BIAS] * 3), ValueError, "pointwise_biases must be of depthwise_weights' length 1, got 3"),
    ("None among the biases", lambda: biases(depthwise=[None]), TypeError, "depthwise_biases[0] must be a tensor, got NoneType"),
    ("bias shape", lambda: biases(pointwise=[BIAS[:95]]), ValueError, "pointwise_biases[0] must be of shape [96], got [95]"),
    ("bias dtype", lambda: biases(depthwise=[BIAS.double()]), TypeError, "depthwise_biases[0] must be of qkv's dtype torch.float32, got torch.float64"),
    ("unknown backend", lambda: call(backend="gpu"), ValueError, "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'gpu'"),
    ("unknown backend, no scales", lambda: call(depthwise=[], pointwise=[], backend="gpu"), ValueError, "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'gpu'"),
    ("cpu backend, meta tensors", lambda: call(QKV.to("meta"), [DEPTHWISE.to("meta")], [POINTWISE.to("meta")], backend="cpu"), NotImplementedError, "backend must be one that can run here, got 'cpu': it needs CPU tensors, these are on meta"),
    ("triton, meta tensors", lambda: call(QKV.to("meta"), [DEPTHWISE.to("meta")], [POINTWISE.to("meta")], backend="triton"), NotImplementedError, "backend must be one that can run here, got 'triton': it needs CUDA tensors, these are on meta"),
    ("cuda", lambda: call(backend="cuda"), NotImplementedError, f"backend must be one that can run here, got 'cuda': {_library.WHY_NOT_CUDA or 'it needs CUDA tensors, these are on cpu'}"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])
def test_bad_input(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    before = native_calls()
    with pytest.raises(error, match="^" + re.escape(f"multiscale_aggregate: {text}") + "$") as caught:
        call()
    assert caught.type is error
    assert native_calls() == before


def test_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        multiscale_aggregate(QKV, [DEPTHWISE], [POINTWISE], 16)  # type: ignore[misc]


def raw_errors() -> list[tuple[str, Callable[[], Any]]]:
    """Calls of the registered ops that bypass the public function: the launcher's own checks keep memory safe."""
    forward = torch.ops.efficientvit_kernels.multiscale_aggregate_fwd
    backward = torch.ops.efficientvit_kernels.multiscale_aggregate_bwd
    one, two = [DEPTHWISE], [POINTWISE]
    grads = [torch.zeros_like(QKV)]
    return [
        ("channels", lambda: forward(QKV[:, :95], one, two, [], [], 16)),
        ("head_dim", lambda: forward(QKV, one, two, [], [], 0)),
        ("rank", lambda: forward(QKV[0], one, two, [], [], 16)),
        ("dtype", lambda: forward(QKV.long(), one, two, [], [], 16)),
        ("weight's dtype", lambda: forward(QKV, [DEPTHWISE.half()], two, [], [], 16)),
        ("weight's shape", lambda: forward(QKV, [DEPTHWISE[:48]], two, [], [], 16)),
        ("even kernel", lambda: forward(QKV, [DEPTHWISE[..., :4, :4]], two, [], [], 16)),
        ("pointwise shape", lambda: forward(QKV, one, [POINTWISE[:, :8]], [], [], 16)),
        ("lengths", lambda: forward(QKV, one, two * 2, [], [], 16)),
        ("biases' length", lambda: forward(QKV, one, two, [BIAS] * 2, [BIAS] * 2, 16)),
        ("bias's shape", lambda: forward(QKV, one, two, [BIAS[:8]], [BIAS], 16)),
        ("bias's dtype", lambda: forward(QKV, one, two, [BIAS], [BIAS.half()], 16)),
        ("grad_outs' length", lambda: backward([], QKV, one, two, [], 16, True, True, False)),
        ("grad_out's shape", lambda: backward([grads[0][:1]], QKV, one, two, [], 16, True, True, False)),
        ("grad_out's dtype", lambda: backward([grads[0].half()], QKV, one, two, [], 16, True, True, False)),
    ]


@pytest.mark.parametrize("call", [case[1] for case in raw_errors()], ids=[case[0] for case in raw_errors()])
def test_raw_ops_check_what_memory_safety_needs(call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"multiscale_aggregate\w*: .+ must .+"):
        call()
