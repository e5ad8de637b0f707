"""ReLU linear attention on packed qkv: the specification."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._autocast import without_autocast


def output_format(qkv: Tensor) -> torch.memory_format:
    """channels_last for a channels_last-like input (a slice of one, too), else contiguous. csrc has the same rule."""
    if qkv.stride(1) == 1 and not qkv.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def relu_linear_attention(
    qkv: Tensor | Sequence[Tensor],
    head_dim: int,
    *,
    eps: float = 1e-15,
    feature_map: Callable[[Tensor], Tensor] = torch.relu,
) -> Tensor:
    """out_n = (sum_m v_m phi(k_m)^T) phi(q_n) / (sum_m phi(k_m) . phi(q_n) + eps), per head and image.

    Shapes as in `efficientvit_kernels.relu_linear_attention`. float16 and bfloat16 are computed in float32 and rounded
    once at the end, where the official module rounds in between; a zero denominator gives exact 0 (for eps > 0).
    `feature_map` is phi: relu here, anything elementwise for modules with another kernel function.
    """
    tensors = [qkv] if isinstance(qkv, Tensor) else list(qkv)
    batch, _, height, width = tensors[0].shape
    outputs = []
    with without_autocast(tensors[0].device.type):
        for tensor in tensors:
            heads = tensor.shape[1] // (3 * head_dim)
            compute = torch.promote_types(tensor.dtype, torch.float32)
            packed = tensor.to(compute).reshape(batch, heads, 3 * head_dim, height * width)
            q, k, v = packed.split(head_dim, dim=2)  # type: ignore[no-untyped-call]  # [B, heads, D, N]
            q, k = feature_map(q), feature_map(k)
            kv = v @ k.transpose(-1, -2)  # [B, heads, D, D]
            z = k.sum(dim=-1, keepdim=True)  # [B, heads, D, 1]
            out = (kv @ q) / (z.transpose(-1, -2) @ q + eps)
            outputs.append(out.to(tensor.dtype).reshape(batch, heads * head_dim, height, width))
    return torch.cat(outputs, dim=1).contiguous(memory_format=output_format(tensors[0]))
