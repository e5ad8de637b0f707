"""The backward of lite_mla where products are torch's: what lies between them is computed again from qkv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._fakes import empty_image
from ._products import product, weight_gradient

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Kernels:
    """What a backend computes between the products. `parameters`: depthwise and pointwise weights, then their biases.

    aggregate(qkv, *parameters, head_dim): the scales, stored.
    attend(multi_scale, head_dim, eps): the state [B, G, D + 1, D], and what gives the attention's result when it is
        called.
    attention_grads(grad_out, multi_scale, state, head_dim, eps): of every scale.
    aggregation_grads(grad_scales, qkv, *parameters[:3], head_dim, needs_weights, needs_biases, addend): grad_qkv, to
        which addend is added; the gradients of the weights; those of the biases.
    """

    aggregate: Callable[..., Tensors]
    attend: Callable[..., tuple[Tensor, Callable[[], Tensor]]]
    attention_grads: Callable[..., Tensors]
    aggregation_grads: Callable[..., Tensors]


def composed_backward(
    kernels: Kernels,
    grad_y: Tensor,
    x: Tensor,
    qkv: Tensor | None,
    qkv_weight: Tensor,
    depthwise_weights: Tensors,
    pointwise_weights: Tensors,
    proj_weight: Tensor,
    qkv_bias: Tensor | None,
    depthwise_biases: Tensors,
    pointwise_biases: Tensors,
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
    if x.numel() == 0:
        vectors = [vector for vector in (qkv_bias, *depthwise_biases, *pointwise_biases) if vector is not None]
        parameters = [qkv_weight, *depthwise_weights, *pointwise_weights, proj_weight, *vectors]
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        count = [proj_scale is not None, has_shift].count(True)
        grads += [x.new_zeros(proj_weight.shape[0], dtype=torch.float32) for _ in range(count)]
        return [empty_image(x, x.shape[1])] * needs_x + grads * needs_weights
    qkv = product(qkv_weight, x, qkv_bias) if qkv is None else qkv
    weights = (depthwise_weights, pointwise_weights)
    scales = kernels.aggregate(qkv, *weights, depthwise_biases, pointwise_biases, head_dim)
    multi_scale = [qkv, *scales]
    state, attended = kernels.attend(multi_scale, head_dim, eps)
    scaled = grad_y if proj_scale is None else (grad_y * proj_scale.view(1, -1, 1, 1)).to(x.dtype)
    grad_out = product(proj_weight.transpose(0, 1), scaled)
    grad_qkv, *grad_scales = kernels.attention_grads(grad_out, multi_scale, state, head_dim, eps)
    needs_biases = needs_weights and len(depthwise_biases) > 0
    grad_qkv, *aggregation = kernels.aggregation_grads(
        *(grad_scales, qkv, *weights, depthwise_biases, head_dim, needs_weights, needs_biases, grad_qkv)
    )
    grads = [product(qkv_weight.transpose(0, 1), grad_qkv)] if needs_x else []
    if not needs_weights:
        return grads
    grad_proj, *grad_epilogue = _projection_grads(grad_y, attended(), proj_weight, proj_scale, has_shift)
    count = 2 * len(scales)
    grad_qkv_weight = weight_gradient(grad_qkv, x).to(x.dtype).view(qkv_weight.shape)
    grads += [grad_qkv_weight, *aggregation[:count], grad_proj]
    grads += [] if qkv_bias is None else [grad_qkv.sum(dim=(0, 2, 3), dtype=torch.float32).to(x.dtype)]
    return [*grads, *aggregation[count:], *grad_epilogue]


def _projection_grads(
    grad_y: Tensor, out: Tensor, weight: Tensor, scale: Tensor | None, has_shift: bool
) -> list[Tensor]:
    """Of proj_weight, proj_scale and proj_shift, of which the latter may not be there.

    With R = sum grad_y out^T: dW = scale R, and d scale = the sums of the rows of W R, for which W out is not needed.
    """
    raw = weight_gradient(grad_y, out)
    grad_weight = raw if scale is None else raw * scale.view(-1, 1)
    grads = [grad_weight.to(weight.dtype).view(weight.shape)]
    if scale is not None:
        grads.append((raw * weight.flatten(1)).sum(dim=1))
    if has_shift:
        grads.append(grad_y.sum(dim=(0, 2, 3), dtype=torch.float32))
    return grads
