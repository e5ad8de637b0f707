"""Multi-scale token aggregation on packed qkv: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autocast import without_autocast
from .relu_linear_attention import output_format


def multiscale_aggregate(
    qkv: Tensor,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    *,
    head_dim: int,
    depthwise_biases: Sequence[Tensor] | None = None,
    pointwise_biases: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """out_s = P_s (D_s * qkv) per scale s: a depthwise k x k convolution, then a 1 x 1 one in groups of head_dim.

    Shapes as in `efficientvit_kernels.multiscale_aggregate`. float16 and bfloat16 are computed in float32 and rounded
    once at the end. Without pixels or images the results are empty, and the gradients of the weights zero.
    """
    compute = torch.promote_types(qkv.dtype, torch.float32)
    channels, wide = qkv.shape[1], qkv.to(compute)
    outputs = []
    with without_autocast(qkv.device.type):
        for s, weights in enumerate(zip(depthwise_weights, pointwise_weights, strict=True)):
            depthwise, pointwise = (weight.to(compute) for weight in weights)
            first = None if depthwise_biases is None else depthwise_biases[s].to(compute)
            second = None if pointwise_biases is None else pointwise_biases[s].to(compute)
            if qkv.numel() == 0:  # which the convolutions refuse
                out = wide
                for parameter in (depthwise, pointwise, first, second):
                    out = out if parameter is None else out * parameter.sum()
            else:
                out = F.conv2d(wide, depthwise, first, padding=depthwise.shape[-1] // 2, groups=channels)
                out = F.conv2d(out, pointwise, second, groups=channels // head_dim)
            outputs.append(out.to(qkv.dtype).contiguous(memory_format=output_format(qkv)))
    return outputs
