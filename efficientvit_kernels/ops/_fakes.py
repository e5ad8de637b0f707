"""Fake kernels: what the registered ops return, in shape, dtype and strides, without computing it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _library
from ..reference.relu_linear_attention import output_format


def empty_image(like: Tensor, channels: int | torch.SymInt) -> Tensor:
    """[B, channels, H, W] with the B, H, W, dtype, device and memory format of `like`, as the kernels allocate it."""
    batch, _, height, width = like.shape
    return torch.empty(
        (batch, channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=output_format(like),
    )


def empty_state(like: Tensor, groups: int | torch.SymInt, head_dim: int) -> Tensor:
    """[B, G, D + 1, D]: per head the sums KV and, in the last row, z; at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return like.new_empty((like.shape[0], groups, head_dim + 1, head_dim), dtype=dtype)


def register_fakes(op: str, forward: Callable[..., object], backward: Callable[..., object]) -> None:
    """For the ops of the native library, where it is loaded."""
    if _library.WHY_NOT_CPU is None:
        torch.library.register_fake(f"efficientvit_kernels::{op}_fwd", forward)
        torch.library.register_fake(f"efficientvit_kernels::{op}_bwd", backward)
