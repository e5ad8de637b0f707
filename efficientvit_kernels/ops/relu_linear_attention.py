"""relu_linear_attention: checks, choice of the backend, autograd, fake kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._autograd import apply_backward, keep_nothing, keep_signatures, needs_autograd, refuse_second_order
from ._backends import choose, registered
from ._checks import check_eps, check_qkv
from ._fakes import empty_image, empty_state, register_fakes
from ._python_ops import register_python

OP = "relu_linear_attention"


def relu_linear_attention(
    qkv: Tensor | Sequence[Tensor], head_dim: int, *, eps: float = 1e-15, backend: str = "auto"
) -> Tensor:
    """Multi-head ReLU linear attention over all pixels of each image, from packed qkv.

    Per head, with q' = relu(q), k' = relu(k) and sums over the tokens m of one image:
    out_n = (sum_m v_m k'_m^T) q'_n / (sum_m k'_m . q'_n + eps).

    Args:
        qkv: [B, heads * 3 * D, H, W], head-major, and inside a head [q(D) | k(D) | v(D)]; or a sequence of such
            tensors, one per scale, of one shape, dtype and device. float16, bfloat16, float32 or float64. Any strides,
            which may differ between scales: NCHW, channels_last, slices and transposes are read in place. B, H and W
            may be 0.
        head_dim: D, at least 1.
        eps: added to the denominator, in float32 (float64 for float64). With eps > 0 a zero denominator gives exact 0.
        backend: "auto", "reference", "cpu", "triton" or "cuda". A named backend runs or raises.

    Returns:
        [B, scales * heads * D, H, W], scale-major, then head; qkv's dtype; channels_last if the (first) qkv is.

    Numerics: products and sums in float32 (float64 for float64) from the stored values, one rounding at the end. NaN
    and inf go where the formula in float32 sends them. The cpu backend gives the same bits from run to run, at any
    thread count and in any layout. Backward saves qkv and a [B, scales * heads, D + 1, D] state; a second
    differentiation and forward-mode differentiation raise.

    Raises:
        TypeError: qkv, head_dim or eps of a wrong type or dtype.
        ValueError: wrong rank, channels, device, eps or backend name.
        NotImplementedError: the named backend cannot run here; the message says why.

    Source: H. Cai et al., "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction", 2023.
    """
    tensors = (qkv,) if isinstance(qkv, Tensor) else _as_tuple(qkv)
    check_qkv(OP, tensors, head_dim)
    check_eps(OP, eps)
    backend = choose(OP, backend, tensors[0].device.type, tensors[0].dtype, head_dim)
    if backend == "reference":
        return reference.relu_linear_attention(tensors, head_dim, eps=eps)
    if needs_autograd(tensors):
        out: Tensor = _ReluLinearAttention.apply(backend, head_dim, float(eps), *tensors)[0]
        return out
    result: Tensor = registered(OP, "fwd", backend)(list(tensors), head_dim, float(eps))[0]
    return result


def _as_tuple(qkv: object) -> tuple[Tensor, ...]:
    if not isinstance(qkv, Sequence):
        raise TypeError(f"{OP}: qkv must be a tensor or a sequence of tensors, got {type(qkv).__name__}")
    return tuple(qkv)


class _ReluLinearAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(backend: str, head_dim: int, eps: float, *qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, state = registered(OP, "fwd", backend)(list(qkv), head_dim, eps)
        return out, state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.backend, ctx.head_dim, ctx.eps, *qkv = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *qkv)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        state, *qkv = ctx.saved_tensors
        scales = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        grads: Sequence[Tensor] = apply_backward(
            _ReluLinearAttentionBackward, ctx.backend, ctx.head_dim, ctx.eps, scales, grad_out, state, *qkv
        )
        by_scale = dict(zip(scales, grads, strict=True))
        return (None, None, None, *(by_scale.get(i) for i in range(len(qkv))))


class _ReluLinearAttentionBackward(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(keep_nothing)
    backward = staticmethod(refuse_second_order(OP))

    @staticmethod
    def forward(
        backend: str, head_dim: int, eps: float, scales: list[int], grad_out: Tensor, state: Tensor, *qkv: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(registered(OP, "bwd", backend)(grad_out, list(qkv), state, head_dim, eps, scales))


keep_signatures(_ReluLinearAttention, _ReluLinearAttentionBackward)


def _fwd_fake(qkv: list[Tensor], head_dim: int, eps: float) -> tuple[Tensor, Tensor]:
    first = qkv[0]
    groups = first.shape[1] // (3 * head_dim) * len(qkv)
    return empty_image(first, groups * head_dim), empty_state(first, groups, head_dim)


def _bwd_fake(
    grad_out: Tensor, qkv: list[Tensor], state: Tensor, head_dim: int, eps: float, scales: list[int]
) -> list[Tensor]:
    return [empty_image(qkv[i], qkv[i].shape[1]) for i in scales]


register_fakes(OP, _fwd_fake, _bwd_fake)
register_python(OP, "fwd", "triton", "(Tensor[] qkv, int head_dim, float eps) -> (Tensor, Tensor)", _fwd_fake)
register_python(
    OP,
    "bwd",
    "triton",
    "(Tensor grad_out, Tensor[] qkv, Tensor state, int head_dim, float eps, int[] scales) -> Tensor[]",
    _bwd_fake,
)
