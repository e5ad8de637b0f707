"""lite_mla on bad input: the error's class and its whole text, before anything is launched."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import _library, lite_mla
from efficientvit_kernels.testing import native_calls

X = torch.zeros(2, 20, 4, 5)
QKV, DEPTHWISE, POINTWISE, PROJ = (
    torch.zeros(96, 20, 1, 1),
    torch.zeros(96, 1, 5, 5),
    torch.zeros(96, 16, 1, 1),
    torch.zeros(12, 64, 1, 1),
)
BIAS, VECTOR, RESIDUAL = torch.zeros(96), torch.zeros(12), torch.zeros(2, 12, 4, 5)


def call(**kwargs: Any) -> Tensor:
    plain = {
        "x": X,
        "qkv_weight": QKV,
        "depthwise_weights": [DEPTHWISE],
        "pointwise_weights": [POINTWISE],
        "proj_weight": PROJ,
        "head_dim": 16,
    }
    return lite_mla(**plain | kwargs)


# What is called with what, the class, and the text after "lite_mla: ".
ERRORS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("rank 3", lambda: call(x=X[0]), ValueError, "x must be of shape [B, channels, H, W], got [20, 4, 5]"),
    ("no tensor", lambda: call(x=[X]), TypeError, "x must be a tensor, got list"),
    ("integers", lambda: call(x=X.long()), TypeError, "x must be of dtype float16, bfloat16, float32, float64, got int64"),
    ("complex", lambda: call(x=X.cfloat()), TypeError, "x must be of dtype float16, bfloat16, float32, float64, got complex64"),
    ("sparse", lambda: call(x=X.to_sparse()), ValueError, "x must be a strided (dense) tensor, got layout torch.sparse_coo"),
    ("H is 0", lambda: call(x=X[:, :, :0]), ValueError, "x must be of shape [B, C > 0, H > 0, W > 0], got [2, 20, 0, 5]"),
    ("W is 0", lambda: call(x=X[..., :0]), ValueError, "x must be of shape [B, C > 0, H > 0, W > 0], got [2, 20, 4, 0]"),
    ("C is 0", lambda: call(x=X[:, :0]), ValueError, "x must be of shape [B, C > 0, H > 0, W > 0], got [2, 0, 4, 5]"),
    ("channels of x", lambda: call(x=X[:, :19]), ValueError, "qkv_weight must be of shape [heads * 3 * 16, 19, 1, 1], got [96, 20, 1, 1]"),
    ("rows of qkv_weight", lambda: call(qkv_weight=QKV[:95]), ValueError, "qkv_weight must be of shape [heads * 3 * 16, 20, 1, 1], got [95, 20, 1, 1]"),
    ("no rows of qkv_weight", lambda: call(qkv_weight=QKV[:0]), ValueError, "qkv_weight must be of shape [heads * 3 * 16, 20, 1, 1], got [0, 20, 1, 1]"),
    ("qkv_weight of rank 2", lambda: call(qkv_weight=QKV[..., 0, 0]), ValueError, "qkv_weight must be of shape [heads * 3 * 16, 20, 1, 1], got [96, 20]"),
    ("qkv_weight is None", lambda: call(qkv_weight=None), TypeError, "qkv_weight must be a tensor, got NoneType"),
    ("dtype of qkv_weight", lambda: call(qkv_weight=QKV.half()), TypeError, "qkv_weight must be of x's dtype torch.float32, got torch.float16"),
    ("dtype of x", lambda: call(x=X.half()), TypeError, "qkv_weight must be of x's dtype torch.float16, got torch.float32"),
    ("device of qkv_weight", lambda: call(qkv_weight=QKV.to("meta")), ValueError, "qkv_weight must be on x's device cpu, got meta"),
    ("head_dim 0", lambda: call(head_dim=0), ValueError, "head_dim must be positive, got 0"),
    ("head_dim float", lambda: call(head_dim=16.0), TypeError, "head_dim must be an int, got float"),
    ("head_dim of other weights", lambda: call(head_dim=8), ValueError, "pointwise_weights[0] must be of shape [96, 8, 1, 1], got [96, 16, 1, 1]"),
    ("one weight, no list", lambda: call(depthwise_weights=DEPTHWISE), TypeError, "depthwise_weights must be a sequence of tensors, got Tensor"),
    ("None for the weights", lambda: call(depthwise_weights=None), TypeError, "depthwise_weights must be a sequence of tensors, got NoneType"),
    ("lengths differ", lambda: call(pointwise_weights=[]), ValueError, "pointwise_weights must be of depthwise_weights' length 1, got 0"),
    ("even kernel", lambda: call(depthwise_weights=[DEPTHWISE[..., :4, :4]]), ValueError, "depthwise_weights[0] must be of shape [96, 1, k, k] with an odd k, got [96, 1, 4, 4]"),
    ("depthwise dtype", lambda: call(depthwise_weights=[DEPTHWISE.double()]), TypeError, "depthwise_weights[0] must be of x's dtype torch.float32, got torch.float64"),
    ("pointwise shape", lambda: call(pointwise_weights=[POINTWISE[:, :8]]), ValueError, "pointwise_weights[0] must be of shape [96, 16, 1, 1], got [96, 8, 1, 1]"),
    ("columns of proj_weight", lambda: call(proj_weight=PROJ[:, :32]), ValueError, "proj_weight must be of shape [C_out, 64, 1, 1], got [12, 32, 1, 1]"),
    ("columns without a scale", lambda: call(depthwise_weights=[], pointwise_weights=[]), ValueError, "proj_weight must be of shape [C_out, 32, 1, 1], got [12, 64, 1, 1]"),
    ("no rows of proj_weight", lambda: call(proj_weight=PROJ[:0]), ValueError, "proj_weight must be of shape [C_out, 64, 1, 1], got [0, 64, 1, 1]"),
    ("proj_weight of rank 2", lambda: call(proj_weight=PROJ[..., 0, 0]), ValueError, "proj_weight must be of shape [C_out, 64, 1, 1], got [12, 64]"),
    ("dtype of proj_weight", lambda: call(proj_weight=PROJ.bfloat16()), TypeError, "proj_weight must be of x's dtype torch.float32, got torch.bfloat16"),
    ("qkv_bias shape", lambda: call(qkv_bias=BIAS[:95]), ValueError, "qkv_bias must be of shape [96], got [95]"),
    ("qkv_bias dtype", lambda: call(qkv_bias=BIAS.half()), TypeError, "qkv_bias must be of x's dtype torch.float32, got torch.float16"),
    ("qkv_bias number", lambda: call(qkv_bias=0.0), TypeError, "qkv_bias must be a tensor, got float"),
    ("depthwise biases alone", lambda: call(depthwise_biases=[BIAS]), ValueError, "pointwise_biases must be given where depthwise_biases are, got None"),
    ("too many biases", lambda: call(depthwise_biases=[BIAS] * 2, pointwise_biases=[BIAS]), ValueError, "depthwise_biases must be of depthwise_weights' length 1, got 2"),
    ("bias shape", lambda: call(depthwise_biases=[BIAS], pointwise_biases=[BIAS[None]]), ValueError, "pointwise_biases[0] must be of shape [96], got [1, 96]"),
    ("proj_scale shape", lambda: call(proj_scale=VECTOR[:1]), ValueError, "proj_scale must be of shape [12], got [1]"),
    ("proj_scale number", lambda: call(proj_scale=2.0), TypeError, "proj_scale must be a tensor, got float"),
    ("proj_scale dtype", lambda: call(proj_scale=VECTOR.double()), TypeError, "proj_scale must be of dtype torch.float32, got torch.float64"),
    ("proj_shift dtype", lambda: call(**halves(), proj_shift=VECTOR.bfloat16()), TypeError, "proj_shift must be of dtype torch.float16 or torch.float32, got torch.bfloat16"),
    ("proj_shift device", lambda: call(proj_shift=VECTOR.to("meta")), ValueError, "proj_shift must be on x's device cpu, got meta"),
    ("proj_shift shape", lambda: call(proj_shift=VECTOR.view(1, 12, 1, 1)), ValueError, "proj_shift must be of shape [12], got [1, 12, 1, 1]"),
    ("residual shape", lambda: call(residual=X), ValueError, "residual must be of shape [2, 12, 4, 5], got [2, 20, 4, 5]"),
    ("residual to broadcast", lambda: call(residual=RESIDUAL[:1]), ValueError, "residual must be of shape [2, 12, 4, 5], got [1, 12, 4, 5]"),
    ("residual dtype", lambda: call(residual=RESIDUAL.double()), TypeError, "residual must be of x's dtype torch.float32, got torch.float64"),
    ("eps negative", lambda: call(eps=-1.0), ValueError, "eps must be finite and not negative, got -1.0"),
    ("eps string", lambda: call(eps="1e-5"), TypeError, "eps must be a float, got str"),
    ("recompute int", lambda: call(recompute=1), TypeError, "recompute must be a bool, got int"),
    ("unknown backend", lambda: call(backend="gpu"), ValueError, "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'gpu'"),
    ("triton, meta tensors", lambda: call(**metas(), backend="triton"), NotImplementedError, "backend must be one that can run here, got 'triton': it needs CUDA tensors, these are on meta"),
    ("cuda", lambda: call(backend="cuda"), NotImplementedError, f"backend must be one that can run here, got 'cuda': {_library.WHY_NOT_CUDA or 'it needs CUDA tensors, these are on cpu'}"),
]  # fmt: skip


def metas() -> dict[str, Any]:
    plain = {"x": X, "qkv_weight": QKV, "proj_weight": PROJ}
    lists = {"depthwise_weights": [DEPTHWISE.to("meta")], "pointwise_weights": [POINTWISE.to("meta")]}
    return {name: tensor.to("meta") for name, tensor in plain.items()} | lists


def halves() -> dict[str, Any]:
    return {
        "x": X.half(),
        "qkv_weight": QKV.half(),
        "depthwise_weights": [DEPTHWISE.half()],
        "pointwise_weights": [POINTWISE.half()],
        "proj_weight": PROJ.half(),
    }


@pytest.mark.parametrize(("call", "error", "text"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])
def test_bad_input(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    before = native_calls()
    with pytest.raises(error, match="^" + re.escape(f"lite_mla: {text}") + "$") as caught:
        call()
    assert caught.type is error
    assert native_calls() == before


def test_cpu_backend_on_meta_tensors() -> None:
    meta = {k: [t.to("meta") for t in v] if isinstance(v, list) else v.to("meta") for k, v in halves().items()}
    with pytest.raises(
        NotImplementedError, match=r"^lite_mla: backend must be one that can run here, got 'cpu': it needs"
    ):
        call(**meta, backend="cpu")


def test_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        lite_mla(X, QKV, [DEPTHWISE], [POINTWISE], PROJ, 16)  # type: ignore[misc]


def raw_forward(**changed: Any) -> Any:
    arguments = {
        "x": X,
        "qkv_weight": QKV,
        "depthwise_weights": [DEPTHWISE],
        "pointwise_weights": [POINTWISE],
        "proj_weight": PROJ,
        "qkv_bias": None,
        "depthwise_biases": [],
        "pointwise_biases": [],
        "proj_scale": None,
        "proj_shift": None,
        "residual": None,
        "head_dim": 16,
        "eps": 1e-15,
        "save": True,
    }
    return torch.ops.efficientvit_kernels.lite_mla_fwd(**arguments | changed)


def raw_backward(**changed: Any) -> Any:
    arguments = {
        "grad_y": RESIDUAL,
        "x": X,
        "qkv": torch.zeros(2, 96, 4, 5),
        "state": torch.zeros(2, 4, 17, 16),
        "qkv_weight": QKV,
        "depthwise_weights": [DEPTHWISE],
        "pointwise_weights": [POINTWISE],
        "proj_weight": PROJ,
        "qkv_bias": None,
        "depthwise_biases": [],
        "pointwise_biases": [],
        "proj_scale": None,
        "has_shift": False,
        "head_dim": 16,
        "eps": 1e-15,
        "needs_x": True,
        "needs_weights": True,
    }
    return torch.ops.efficientvit_kernels.lite_mla_bwd(**arguments | changed)


# Calls of the registered ops that bypass the public function: the launcher's own checks keep memory safe.
RAW_ERRORS: dict[str, Callable[[], Any]] = {
    "rank": lambda: raw_forward(x=X[0]),
    "channels": lambda: raw_forward(x=X[:, :19]),
    "dtype": lambda: raw_forward(x=X.double()),
    "head_dim": lambda: raw_forward(head_dim=0),
    "qkv_weight": lambda: raw_forward(qkv_weight=QKV[:95]),
    "depthwise weight": lambda: raw_forward(depthwise_weights=[DEPTHWISE[:48]]),
    "even kernel": lambda: raw_forward(depthwise_weights=[DEPTHWISE[..., :4, :4]]),
    "pointwise weight": lambda: raw_forward(pointwise_weights=[POINTWISE[:, :8]]),
    "lengths": lambda: raw_forward(pointwise_weights=[]),
    "proj_weight": lambda: raw_forward(proj_weight=PROJ[:, :32]),
    "proj_weight's dtype": lambda: raw_forward(proj_weight=PROJ.double()),
    "qkv_bias": lambda: raw_forward(qkv_bias=BIAS[:8]),
    "qkv_bias's dtype": lambda: raw_forward(qkv_bias=BIAS.double()),
    "biases": lambda: raw_forward(depthwise_biases=[BIAS[:8]], pointwise_biases=[BIAS]),
    "proj_scale": lambda: raw_forward(proj_scale=VECTOR[:3]),
    "proj_shift": lambda: raw_forward(proj_shift=VECTOR[:3]),
    "residual": lambda: raw_forward(residual=RESIDUAL[:1]),
    "residual's dtype": lambda: raw_forward(residual=RESIDUAL.half()),
    "grad_y": lambda: raw_backward(grad_y=RESIDUAL[:1]),
    "grad_y's dtype": lambda: raw_backward(grad_y=RESIDUAL.half()),
    "qkv": lambda: raw_backward(qkv=torch.zeros(2, 95, 4, 5)),
    "qkv's size": lambda: raw_backward(qkv=torch.zeros(2, 96, 4, 4)),
    "qkv's dtype": lambda: raw_backward(qkv=torch.zeros(2, 96, 4, 5).half()),
    "state": lambda: raw_backward(state=torch.zeros(2, 2, 17, 16)),
    "state's dtype": lambda: raw_backward(state=torch.zeros(2, 4, 17, 16).double()),
    "scale in the backward": lambda: raw_backward(proj_scale=VECTOR[:3]),
}


@pytest.mark.parametrize("call", RAW_ERRORS.values(), ids=list(RAW_ERRORS))
def test_raw_ops_check_what_memory_safety_needs(call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"\w+: .+ must .+"):
        call()
