"""1 x 1 convolutions and their gradients through torch's matrix products (cuBLAS), for the GPU backends."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.relu_linear_attention import output_format


def product(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + bias with torch: weight [O, C, 1, 1], x [B, C, H, W]; channels_last if x is, and then in place.

    Through matrix products and not torch's convolution, which may convert between the formats for it.
    """
    batch, channels, height, width = x.shape
    matrix = weight.flatten(1)
    if output_format(x) == torch.channels_last:
        tokens = torch.nn.functional.linear(x.permute(0, 2, 3, 1), matrix, bias)
        return tokens.permute(0, 3, 1, 2)
    planes = x.reshape(batch, channels, height * width)
    matrices = matrix.expand(batch, -1, -1)
    y = torch.bmm(matrices, planes) if bias is None else torch.baddbmm(bias.view(1, -1, 1), matrices, planes)
    return y.view(batch, -1, height, width)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """sum over images and tokens of grad x^T in fp32: [O, C] for grad [B, O, H, W] and x [B, C, H, W].

    Not torch's convolution backward, which may add up in an order that differs from run to run.
    """
    if x.shape[0] == 1 or {output_format(x), output_format(grad)} == {torch.channels_last}:
        rows = grad.transpose(0, 1).reshape(grad.shape[1], -1)
        return _product_in_fp32(rows[None], x.transpose(0, 1).reshape(x.shape[1], -1)[None])[0]
    return _product_in_fp32(grad.flatten(2), x.flatten(2)).sum(dim=0)


def _product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a b^T, [B, O, N] and [B, C, N], not rounded to 16 bits."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b.mT)
    if a.is_cuda:
        return torch.bmm(a, b.mT, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.mT.float())
