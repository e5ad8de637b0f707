"""lite_mla with the CUDA kernels: torch's products (cuBLAS), and between and behind them kernels of our own.

Forward, in 16 bits and with D up to 32: the product for qkv; aggregation fused with the sum of the states; aggregation
fused with their application; the projection with its epilogue, or, where it is wide, cuBLAS's with an epilogue in
place. Otherwise aggregation and attention run op by op.
Backward: what lies between the products is computed again from qkv, by the kernels of the two other ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ._backends import registered
from ._fakes import empty_image
from ._products import product, projection_grads, weight_gradient, zero_grads

# A product of so few channels is bound by the bytes of its operands, which an epilogue of its own would move once more.
# Beyond, cuBLAS is faster than mma.sync by more than that. Predicted.
WIDEST_PROJECTION = 256


def lite_mla_fwd(
    x: Tensor,
    qkv_weight: Tensor,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    proj_weight: Tensor,
    qkv_bias: Tensor | None,
    depthwise_biases: Sequence[Tensor],
    pointwise_biases: Sequence[Tensor],
    proj_scale: Tensor | None,
    proj_shift: Tensor | None,
    residual: Tensor | None,
    head_dim: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and with `save` qkv, in the format of x, and the fp32 state [B, heads * (1 + S), D + 1, D]; empty without."""
    channels = qkv_weight.shape[0]
    if x.numel() == 0:
        groups = channels // (3 * head_dim) * (1 + len(depthwise_weights))
        state = x.new_empty((x.shape[0], groups, head_dim + 1, head_dim) if save else 0, dtype=torch.float32)
        return empty_image(x, proj_weight.shape[0]), empty_image(x, channels) if save else x.new_empty(0), state
    qkv = product(qkv_weight, x, qkv_bias)
    aggregation = (depthwise_weights, pointwise_weights, depthwise_biases, pointwise_biases)
    narrow = x.dtype != torch.float32 and proj_weight.shape[0] <= WIDEST_PROJECTION
    out, state = registered("aggregate_attention", "fwd", "cuda")(qkv, *aggregation, head_dim, eps, narrow)
    vectors = [None if vector is None else vector.contiguous() for vector in (proj_scale, proj_shift)]
    if narrow and out.is_contiguous(memory_format=torch.channels_last):  # the fused kernels have written it
        y = empty_image(x, proj_weight.shape[0])
        _native_ops().projection(_aligned(proj_weight.flatten(1)), out, *vectors, residual, y)
    else:
        y = product(proj_weight, out)
        if not (proj_scale is None and proj_shift is None and residual is None):
            _native_ops().projection_epilogue(y, *vectors, residual)
    if save:
        return y, qkv, state
    return y, x.new_empty(0), state.new_empty(0)


def _aligned(matrix: Tensor) -> Tensor:
    """Contiguous, on a boundary of 16 bytes."""
    matrix = matrix.contiguous()
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


def _native_ops() -> Any:
    return torch.ops.efficientvit_kernels_emulated if _library.CUDA_EMULATED else torch.ops.efficientvit_kernels


def lite_mla_bwd(
    grad_y: Tensor,
    x: Tensor,
    qkv: Tensor | None,
    state: Tensor | None,
    qkv_weight: Tensor,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    proj_weight: Tensor,
    qkv_bias: Tensor | None,
    depthwise_biases: Sequence[Tensor],
    pointwise_biases: Sequence[Tensor],
    proj_scale: Tensor | None,
    has_shift: bool,
    head_dim: int,
    eps: float,
    needs_x: bool,
    needs_weights: bool,
) -> list[Tensor]:
    """grad_x, where needed; where needed, the gradients of the weights, of the vectors, of proj_scale and proj_shift.

    The scales are computed and stored again, rounded; their states are those of what is stored, so that the gradients
    are those of one and the same formula, to the last term that cancels.
    """
    aggregate, attend = (registered(op, "fwd", "cuda") for op in ("multiscale_aggregate", "relu_linear_attention"))
    vectors = [vector for vector in (qkv_bias, *depthwise_biases, *pointwise_biases) if vector is not None]
    weights = [qkv_weight, *depthwise_weights, *pointwise_weights, proj_weight]
    if x.numel() == 0:
        grads = zero_grads(x, [*weights, *vectors], proj_weight, proj_scale, has_shift)
        return [empty_image(x, x.shape[1])] * needs_x + grads * needs_weights
    qkv = product(qkv_weight, x, qkv_bias) if qkv is None else qkv
    scales = aggregate(qkv, depthwise_weights, pointwise_weights, depthwise_biases, pointwise_biases, head_dim)
    multi_scale = [qkv, *scales]
    out, state = attend(multi_scale, head_dim, eps)
    scaled = grad_y if proj_scale is None else (grad_y * proj_scale.view(1, -1, 1, 1)).to(x.dtype)
    grad_out = product(proj_weight.transpose(0, 1), scaled)
    grad_qkv, *grad_scales = registered("relu_linear_attention", "bwd", "cuda")(
        grad_out, multi_scale, state, head_dim, eps, list(range(len(multi_scale)))
    )
    has_biases = needs_weights and len(depthwise_biases) > 0
    aggregation: list[Tensor] = []
    if scales:
        grad_of_scales, *aggregation = registered("multiscale_aggregate", "bwd", "cuda")(
            *(grad_scales, qkv, depthwise_weights, pointwise_weights, depthwise_biases, head_dim),
            *(True, needs_weights, has_biases),
        )
        grad_qkv = grad_qkv.add_(grad_of_scales)
    grads = [product(qkv_weight.transpose(0, 1), grad_qkv)] if needs_x else []
    if not needs_weights:
        return grads
    grad_proj, *grad_epilogue = projection_grads(grad_y, out, proj_weight, proj_scale, has_shift)
    count = 2 * len(scales)
    grad_qkv_weight = weight_gradient(grad_qkv, x).to(x.dtype).view(qkv_weight.shape)
    grads += [grad_qkv_weight, *aggregation[:count], grad_proj]
    grads += [] if qkv_bias is None else [grad_qkv.sum(dim=(0, 2, 3), dtype=torch.float32).to(x.dtype)]
    return [*grads, *aggregation[count:], *grad_epilogue]
