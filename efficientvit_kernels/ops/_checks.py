"""Checks that several ops share. Every message reads `<op>: <arg> must be <expected>, got <actual>`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_text(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def check_positive_int(op: str, arg: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {arg} must be an int, got {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{op}: {arg} must be positive, got {value}")


def check_eps(op: str, eps: object) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a float, got {type(eps).__name__}")
    if not (0 <= eps < math.inf):
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")


def check_image(op: str, arg: str, tensor: object) -> None:
    """A strided rank-4 tensor of a supported dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {arg} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 4:
        raise ValueError(f"{op}: {arg} must be of shape [B, channels, H, W], got {shape_text(tensor)}")
    if tensor.dtype not in DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{op}: {arg} must be of dtype {expected}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{op}: {arg} must be a strided (dense) tensor, got layout {tensor.layout}")


def check_qkv(op: str, qkv: Sequence[Tensor], head_dim: int) -> None:
    """One or more [B, heads * 3 * head_dim, H, W] tensors of one shape, dtype and device."""
    check_positive_int(op, "head_dim", head_dim)
    if len(qkv) == 0:
        raise ValueError(f"{op}: qkv must be a tensor or at least one tensor in a sequence, got an empty sequence")
    first = qkv[0]
    for i, tensor in enumerate(qkv):
        arg = "qkv" if len(qkv) == 1 else f"qkv[{i}]"
        check_image(op, arg, tensor)
        if tensor.shape != first.shape:
            raise ValueError(f"{op}: {arg} must be of qkv[0]'s shape {shape_text(first)}, got {shape_text(tensor)}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {arg} must be of qkv[0]'s dtype {first.dtype}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {arg} must be on qkv[0]'s device {first.device}, got {tensor.device}")
    if first.shape[1] % (3 * head_dim) != 0:
        raise ValueError(
            f"{op}: qkv must have a multiple of 3 * head_dim = {3 * head_dim} channels, got {first.shape[1]}"
        )
