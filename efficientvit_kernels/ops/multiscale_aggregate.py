"""multiscale_aggregate: checks, choice of the backend, autograd, fake kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._autograd import (
    apply_backward,
    by_kind,
    keep_nothing,
    keep_signatures,
    needs_autograd,
    only_needed,
    refuse_second_order,
)
from ._backends import choose, registered
from ._checks import check_aggregation, check_qkv
from ._fakes import empty_image, register_fakes
from ._python_ops import register_python

OP = "multiscale_aggregate"


def multiscale_aggregate(
    qkv: Tensor,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    *,
    head_dim: int,
    depthwise_biases: Sequence[Tensor] | None = None,
    pointwise_biases: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Token aggregation of packed qkv at several scales, all from the same qkv.

    Per scale s: out_s = P_s (D_s * qkv), with D_s a depthwise k x k convolution, zero-padded to keep H x W, and P_s a
    1 x 1 convolution in 3 * heads groups of D channels, each of them the q, k or v of one head.

    Args:
        qkv: [B, 3T, H, W] with T = heads * D, head-major, and inside a head [q(D) | k(D) | v(D)]. float16, bfloat16,
            float32 or float64. Any strides: NCHW, channels_last, slices and transposes are read in place. B, H and W
            may be 0.
        depthwise_weights: S tensors [3T, 1, k, k], each with an odd k of its own; qkv's dtype, any strides. S may be 0.
        pointwise_weights: S tensors [3T, D, 1, 1], qkv's dtype, any strides.
        head_dim: D, at least 1.
        depthwise_biases, pointwise_biases: S tensors [3T] each, or None for both.
        backend: "auto", "reference", "cpu", "triton" or "cuda". A named backend runs or raises.

    Returns:
        S tensors [B, 3T, H, W] of qkv's dtype; channels_last if qkv is. The identity scale, qkv itself, is not among
        them.

    Numerics: products and sums in float32 (float64 for float64) from the stored values, one rounding at the end: the
    result of the depthwise convolution is never rounded to 16 bits. A NaN or inf reaches the k x k pixels around it, in
    the channels of its group. The cpu backend gives the same bits from run to run, at any thread count and in any
    layout. Backward saves qkv and the parameters; a second differentiation and forward-mode differentiation raise.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, number of tensors, device or backend name.
        NotImplementedError: the named backend cannot run here; the message says why.

    Source: H. Cai et al., "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction", 2023.
    """
    check_qkv(OP, (qkv,), head_dim)
    check_aggregation(
        OP, "qkv", qkv, qkv.shape[1], head_dim, depthwise_weights, pointwise_weights, depthwise_biases, pointwise_biases
    )
    sizes = [weight.shape[-1] for weight in depthwise_weights]
    backend = choose(OP, backend, qkv.device.type, qkv.dtype, head_dim, sizes)
    if len(depthwise_weights) == 0:
        return []
    if backend == "reference":
        return reference.multiscale_aggregate(
            qkv,
            depthwise_weights,
            pointwise_weights,
            head_dim=head_dim,
            depthwise_biases=depthwise_biases,
            pointwise_biases=pointwise_biases,
        )
    tensors = (qkv, *depthwise_weights, *pointwise_weights, *(depthwise_biases or ()), *(pointwise_biases or ()))
    function = _MultiscaleAggregate.apply if needs_autograd(tensors) else _MultiscaleAggregate.forward
    return list(function(backend, head_dim, len(depthwise_weights), *tensors))


class _MultiscaleAggregate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(backend: str, head_dim: int, scales: int, qkv: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(registered(OP, "fwd", backend)(qkv, *by_kind(parameters, scales), head_dim))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, ctx.head_dim, ctx.scales, qkv, *parameters = inputs
        # The backward asks for the depthwise biases, not for the pointwise ones.
        ctx.save_for_backward(qkv, *parameters[: 3 * ctx.scales])

    @staticmethod
    def backward(ctx: Any, *grad_outs: Tensor) -> tuple[Tensor | None, ...]:
        _, _, _, needs_qkv, *needed = ctx.needs_input_grad
        needs_weights, needs_biases = any(needed[: 2 * ctx.scales]), any(needed[2 * ctx.scales :])
        needs = (needs_qkv, needs_weights, needs_biases)
        config = (ctx.backend, ctx.head_dim, ctx.scales, needs)
        grads = apply_backward(_MultiscaleAggregateBackward, *config, *grad_outs, *ctx.saved_tensors)
        computed = [needs_qkv, *[needs_weights] * (2 * ctx.scales), *[needs_biases] * len(needed[2 * ctx.scales :])]
        return (None, None, None, *only_needed(grads, computed, ctx.needs_input_grad[3:]))


class _MultiscaleAggregateBackward(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(keep_nothing)
    backward = staticmethod(refuse_second_order(OP))

    @staticmethod
    def forward(
        backend: str, head_dim: int, scales: int, needs: tuple[bool, bool, bool], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        grad_outs, qkv, parameters = tensors[:scales], tensors[scales], tensors[scales + 1 :]
        lists = by_kind(parameters, scales)[:3]
        return tuple(registered(OP, "bwd", backend)(list(grad_outs), qkv, *lists, head_dim, *needs))


keep_signatures(_MultiscaleAggregate, _MultiscaleAggregateBackward)


def _fwd_fake(
    qkv: Tensor,
    depthwise_weights: list[Tensor],
    pointwise_weights: list[Tensor],
    depthwise_biases: list[Tensor],
    pointwise_biases: list[Tensor],
    head_dim: int,
) -> list[Tensor]:
    return [empty_image(qkv, qkv.shape[1]) for _ in depthwise_weights]


def _bwd_fake(
    grad_outs: list[Tensor],
    qkv: Tensor,
    depthwise_weights: list[Tensor],
    pointwise_weights: list[Tensor],
    depthwise_biases: list[Tensor],
    head_dim: int,
    needs_qkv: bool,
    needs_weights: bool,
    needs_biases: bool,
) -> list[Tensor]:
    grads = [empty_image(qkv, qkv.shape[1])] if needs_qkv else []
    if needs_weights:
        grads += [weight.new_empty(weight.shape) for weight in (*depthwise_weights, *pointwise_weights)]
    if needs_biases:
        grads += [qkv.new_empty(qkv.shape[1]) for _ in range(2 * len(depthwise_weights))]
    return grads


register_fakes(OP, _fwd_fake, _bwd_fake)
register_python(
    OP,
    "fwd",
    "triton",
    "(Tensor qkv, Tensor[] depthwise_weights, Tensor[] pointwise_weights, Tensor[] depthwise_biases, "
    "Tensor[] pointwise_biases, int head_dim) -> Tensor[]",
    _fwd_fake,
)
register_python(
    OP,
    "bwd",
    "triton",
    "(Tensor[] grad_outs, Tensor qkv, Tensor[] depthwise_weights, Tensor[] pointwise_weights, "
    "Tensor[] depthwise_biases, int head_dim, bool needs_qkv, bool needs_weights, bool needs_biases) -> Tensor[]",
    _bwd_fake,
)
