"""The whole LiteMLA block up to an affine epilogue: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autocast import without_autocast
from .multiscale_aggregate import multiscale_aggregate
from .relu_linear_attention import output_format, relu_linear_attention


def lite_mla(
    x: Tensor,
    qkv_weight: Tensor,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    proj_weight: Tensor,
    *,
    head_dim: int,
    qkv_bias: Tensor | None = None,
    depthwise_biases: Sequence[Tensor] | None = None,
    pointwise_biases: Sequence[Tensor] | None = None,
    proj_scale: Tensor | None = None,
    proj_shift: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-15,
    recompute: bool = False,
) -> Tensor:
    """y = proj_scale * (W_proj attention([qkv, aggregate(qkv)...])) + proj_shift + residual, with qkv = W_qkv x.

    Shapes as in `efficientvit_kernels.lite_mla`. float16 and bfloat16: qkv is rounded to x's dtype, as it is stored;
    everything from there to y is float32, and y is rounded once. `recompute` changes nothing here.
    """
    compute = torch.promote_types(x.dtype, torch.float32)

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(compute)

    def wides(tensors: Sequence[Tensor] | None) -> list[Tensor] | None:
        return None if tensors is None else [tensor.to(compute) for tensor in tensors]

    with without_autocast(x.device.type):
        qkv = F.conv2d(x.to(compute), qkv_weight.to(compute), wide(qkv_bias)).to(x.dtype).to(compute)
        aggregated = multiscale_aggregate(
            qkv,
            [weight.to(compute) for weight in depthwise_weights],
            [weight.to(compute) for weight in pointwise_weights],
            head_dim=head_dim,
            depthwise_biases=wides(depthwise_biases),
            pointwise_biases=wides(pointwise_biases),
        )
        y = F.conv2d(relu_linear_attention([qkv, *aggregated], head_dim, eps=eps), proj_weight.to(compute))
        if proj_scale is not None:
            y = y * proj_scale.to(compute).view(1, -1, 1, 1)
        if proj_shift is not None:
            y = y + proj_shift.to(compute).view(1, -1, 1, 1)
        if residual is not None:
            y = y + residual.to(compute)
    return y.to(x.dtype).contiguous(memory_format=output_format(x))
