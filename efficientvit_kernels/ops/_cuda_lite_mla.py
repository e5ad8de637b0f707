"""lite_mla with the CUDA kernels: torch's products (cuBLAS), and between and behind them kernels of our own.

Forward, in 16 bits and with D up to 32: the product for qkv; aggregation fused with the sum of the states; aggregation
fused with their application; the projection with its epilogue, or, where it is wide, cuBLAS's with an epilogue in
place. In inference with few channels all of that in two launches, where the launch plan predicts a gain. Otherwise
aggregation and attention run op by op.
Backward: what lies between the products is computed again from qkv, by the kernels of the two other ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ._backends import registered
from ._fakes import empty_image
from ._lite_mla_backward import Kernels, composed_backward
from ._products import product

# A product of so few channels is bound by the bytes of its operands, which an epilogue of its own would move once more.
# Beyond, cuBLAS is faster than mma.sync by more than that. Predicted.
WIDEST_PROJECTION = 256
# What a block of the two launches has room for: x, q, the attention's result and W_proj.
WIDEST_OF_TWO_LAUNCHES = 128


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
    aggregation = (depthwise_weights, pointwise_weights, depthwise_biases, pointwise_biases)
    vectors = [None if vector is None else vector.contiguous() for vector in (proj_scale, proj_shift)]
    if not save and channels <= 3 * WIDEST_OF_TWO_LAUNCHES:
        weights = (qkv_weight, depthwise_weights, pointwise_weights, proj_weight)
        rest: tuple[Any, ...] = (qkv_bias, depthwise_biases, pointwise_biases, *vectors, residual, head_dim, eps)
        if found := two_launches(x, *weights, *rest):
            return found[0], x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    qkv = product(qkv_weight, x, qkv_bias)
    narrow = x.dtype != torch.float32 and proj_weight.shape[0] <= WIDEST_PROJECTION
    out, state = registered("aggregate_attention", "fwd", "cuda")(qkv, *aggregation, head_dim, eps, narrow)
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


def two_launches(
    x: Tensor,
    qkv_weight: Tensor,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    proj_weight: Tensor,
    *rest: Any,
    always: bool = False,
) -> list[Tensor]:
    """[y], or nothing where the kernels do not serve the block or, unless `always`, four launches are predicted to be
    faster. `rest`: as in `lite_mla_fwd` up to eps.
    """
    if x.dtype == torch.float32 or len(depthwise_weights) != 1:
        return []
    matrices = [_aligned(weight.flatten(1)) for weight in (qkv_weight, proj_weight)]
    qkv_bias, *others = rest
    bias = None if qkv_bias is None else qkv_bias.contiguous()
    lists = (depthwise_weights, pointwise_weights)
    y: list[Tensor] = _native_ops().lite_mla_two_launches(x, matrices[0], *lists, matrices[1], bias, *others, always)
    return y


def _aligned(matrix: Tensor) -> Tensor:
    """Contiguous, on a boundary of 16 bytes."""
    matrix = matrix.contiguous()
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


def _native_ops() -> Any:
    return torch.ops.efficientvit_kernels_emulated if _library.CUDA_EMULATED else torch.ops.efficientvit_kernels


def _attend(multi_scale: Sequence[Tensor], head_dim: int, eps: float) -> tuple[Tensor, Callable[[], Tensor]]:
    out, state = registered("relu_linear_attention", "fwd", "cuda")(multi_scale, head_dim, eps)
    return state, lambda: out


def _attention_grads(
    grad_out: Tensor, multi_scale: Sequence[Tensor], state: Tensor, head_dim: int, eps: float
) -> list[Tensor]:
    backward = registered("relu_linear_attention", "bwd", "cuda")
    grads: list[Tensor] = backward(grad_out, multi_scale, state, head_dim, eps, list(range(len(multi_scale))))
    return grads


def _aggregate(qkv: Tensor, *arguments: Any) -> list[Tensor]:
    scales: list[Tensor] = registered("multiscale_aggregate", "fwd", "cuda")(qkv, *arguments)
    return scales


def _aggregation_grads(grad_scales: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    grad_qkv = arguments[-1]
    return [grad_qkv, *_native_ops().multiscale_aggregate_bwd_add(grad_scales, *arguments)]


_KERNELS = Kernels(_aggregate, _attend, _attention_grads, _aggregation_grads)


def lite_mla_bwd(grad_y: Tensor, x: Tensor, qkv: Tensor | None, state: Tensor | None, *arguments: Any) -> list[Tensor]:
    """See `composed_backward`; the state of the forward is not that of the scales as they are stored."""
    return composed_backward(_KERNELS, grad_y, x, qkv, *arguments)
