"""relu_linear_attention on bad input: the error's class and its whole text, before anything is launched."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from efficientvit_kernels import _library, relu_linear_attention
from efficientvit_kernels.testing import native_calls

QKV = torch.zeros(2, 96, 4, 4)

# What is called with what, the class, and the text after "relu_linear_attention: ".
ERRORS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("rank 3", lambda: relu_linear_attention(QKV[0], 16), ValueError, "qkv must be of shape [B, channels, H, W], got [96, 4, 4]"),
    ("rank 5", lambda: relu_linear_attention(QKV[None], 16), ValueError, "qkv must be of shape [B, channels, H, W], got [1, 2, 96, 4, 4]"),
    ("rank 0", lambda: relu_linear_attention(torch.tensor(1.0), 16), ValueError, "qkv must be of shape [B, channels, H, W], got []"),
    ("channels not divisible by 3 D", lambda: relu_linear_attention(QKV[:, :95], 16), ValueError, "qkv must have a multiple of 3 * head_dim = 48 channels, got 95"),
    ("head_dim too large", lambda: relu_linear_attention(QKV, 64), ValueError, "qkv must have a multiple of 3 * head_dim = 192 channels, got 96"),
    ("head_dim 0", lambda: relu_linear_attention(QKV, 0), ValueError, "head_dim must be positive, got 0"),
    ("head_dim negative", lambda: relu_linear_attention(QKV, -16), ValueError, "head_dim must be positive, got -16"),
    ("head_dim float", lambda: relu_linear_attention(QKV, 16.0), TypeError, "head_dim must be an int, got float"),  # type: ignore[arg-type]
    ("head_dim bool", lambda: relu_linear_attention(QKV, True), TypeError, "head_dim must be an int, got bool"),
    ("head_dim string", lambda: relu_linear_attention(QKV, "16"), TypeError, "head_dim must be an int, got str"),  # type: ignore[arg-type]
    ("no tensor", lambda: relu_linear_attention(3, 16), TypeError, "qkv must be a tensor or a sequence of tensors, got int"),  # type: ignore[arg-type]
    ("None", lambda: relu_linear_attention(None, 16), TypeError, "qkv must be a tensor or a sequence of tensors, got NoneType"),  # type: ignore[arg-type]
    ("a generator", lambda: relu_linear_attention((x for x in [QKV]), 16), TypeError, "qkv must be a tensor or a sequence of tensors, got generator"),  # type: ignore[arg-type]
    ("array in the list", lambda: relu_linear_attention([QKV, [1.0]], 16), TypeError, "qkv[1] must be a tensor, got list"),  # type: ignore[list-item]
    ("empty list", lambda: relu_linear_attention([], 16), ValueError, "qkv must be a tensor or at least one tensor in a sequence, got an empty sequence"),
    ("shapes differ", lambda: relu_linear_attention([QKV, QKV[:1]], 16), ValueError, "qkv[1] must be of qkv[0]'s shape [2, 96, 4, 4], got [1, 96, 4, 4]"),
    ("dtypes differ", lambda: relu_linear_attention([QKV, QKV.half()], 16), TypeError, "qkv[1] must be of qkv[0]'s dtype torch.float32, got torch.float16"),
    ("devices differ", lambda: relu_linear_attention([QKV, QKV.to("meta")], 16), ValueError, "qkv[1] must be on qkv[0]'s device cpu, got meta"),
    *(
        (str(dtype), lambda dtype=dtype: relu_linear_attention(QKV.to(dtype), 16), TypeError, f"qkv must be of dtype float16, bfloat16, float32, float64, got {str(dtype)[6:]}")
        for dtype in (torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    ("sparse", lambda: relu_linear_attention(QKV.to_sparse(), 16), ValueError, "qkv must be a strided (dense) tensor, got layout torch.sparse_coo"),
    ("eps negative", lambda: relu_linear_attention(QKV, 16, eps=-1e-5), ValueError, "eps must be finite and not negative, got -1e-05"),
    ("eps NaN", lambda: relu_linear_attention(QKV, 16, eps=float("nan")), ValueError, "eps must be finite and not negative, got nan"),
    ("eps inf", lambda: relu_linear_attention(QKV, 16, eps=float("inf")), ValueError, "eps must be finite and not negative, got inf"),
    ("eps string", lambda: relu_linear_attention(QKV, 16, eps="1e-5"), TypeError, "eps must be a float, got str"),  # type: ignore[arg-type]
    ("eps None", lambda: relu_linear_attention(QKV, 16, eps=None), TypeError, "eps must be a float, got NoneType"),  # type: ignore[arg-type]
    ("unknown backend", lambda: relu_linear_attention(QKV, 16, backend="CPU"), ValueError, "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'CPU'"),
    ("backend None", lambda: relu_linear_attention(QKV, 16, backend=None), ValueError, "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got None"),  # type: ignore[arg-type]
    ("cpu backend, meta tensor", lambda: relu_linear_attention(QKV.to("meta"), 16, backend="cpu"), NotImplementedError, "backend must be one that can run here, got 'cpu': it needs CPU tensors, these are on meta"),
    ("triton, meta tensors", lambda: relu_linear_attention(QKV.to("meta"), 16, backend="triton"), NotImplementedError, "backend must be one that can run here, got 'triton': it needs CUDA tensors, these are on meta"),
    ("cuda", lambda: relu_linear_attention(QKV, 16, backend="cuda"), NotImplementedError, f"backend must be one that can run here, got 'cuda': {_library.WHY_NOT_CUDA or 'it needs CUDA tensors, these are on cpu'}"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])
def test_bad_input(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    before = native_calls()
    with pytest.raises(error, match=re.escape(f"relu_linear_attention: {text}") + "$") as caught:
        call()
    assert caught.type is error
    assert native_calls() == before


def test_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        relu_linear_attention(QKV, 16, 1e-15)  # type: ignore[misc]


def raw_errors() -> list[tuple[str, Callable[[], Any]]]:
    """Calls of the registered ops that bypass the public function: the launcher's own checks keep memory safe."""
    ops = torch.ops.efficientvit_kernels
    state = torch.zeros(2, 2, 17, 16)
    out = torch.zeros(2, 32, 4, 4)
    return [
        ("channels", lambda: ops.relu_linear_attention_fwd([QKV[:, :95]], 16, 1e-15)),
        ("head_dim", lambda: ops.relu_linear_attention_fwd([QKV], 0, 1e-15)),
        ("rank", lambda: ops.relu_linear_attention_fwd([QKV[0]], 16, 1e-15)),
        ("dtype", lambda: ops.relu_linear_attention_fwd([QKV.long()], 16, 1e-15)),
        ("mixed dtypes", lambda: ops.relu_linear_attention_fwd([QKV, QKV.half()], 16, 1e-15)),
        ("mixed shapes", lambda: ops.relu_linear_attention_fwd([QKV, QKV[:1]], 16, 1e-15)),
        ("state's shape", lambda: ops.relu_linear_attention_bwd(out, [QKV], state[:1], 16, 1e-15, [0])),
        ("state's dtype", lambda: ops.relu_linear_attention_bwd(out, [QKV], state.double(), 16, 1e-15, [0])),
        (
            "state's strides",
            lambda: ops.relu_linear_attention_bwd(out, [QKV], state.mT.contiguous().mT, 16, 1e-15, [0]),
        ),
        ("grad_out's shape", lambda: ops.relu_linear_attention_bwd(out[:1], [QKV], state, 16, 1e-15, [0])),
        ("grad_out's dtype", lambda: ops.relu_linear_attention_bwd(out.half(), [QKV], state, 16, 1e-15, [0])),
        ("scale out of range", lambda: ops.relu_linear_attention_bwd(out, [QKV], state, 16, 1e-15, [1])),
        ("negative scale", lambda: ops.relu_linear_attention_bwd(out, [QKV], state, 16, 1e-15, [-1])),
    ]


@pytest.mark.parametrize("call", [case[1] for case in raw_errors()], ids=[case[0] for case in raw_errors()])
def test_raw_ops_check_what_memory_safety_needs(call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"relu_linear_attention\w*: .+ must .+"):
        call()
