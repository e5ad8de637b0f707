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


def check_bool(op: str, arg: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {arg} must be a bool, got {type(value).__name__}")


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


def check_like(op: str, arg: str, tensor: object, like_arg: str, like: Tensor) -> None:
    """A strided tensor of the dtype and device of `like`, the argument called `like_arg`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {arg} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {arg} must be of {like_arg}'s dtype {like.dtype}, got {tensor.dtype}")
    check_place(op, arg, tensor, like_arg, like)


def check_place(op: str, arg: str, tensor: Tensor, like_arg: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{op}: {arg} must be on {like_arg}'s device {like.device}, got {tensor.device}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{op}: {arg} must be a strided (dense) tensor, got layout {tensor.layout}")


def check_shape(op: str, arg: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        expected = "[" + ", ".join(str(size) for size in shape) + "]"
        raise ValueError(f"{op}: {arg} must be of shape {expected}, got {shape_text(tensor)}")


def check_list(op: str, arg: str, tensors: object, length: int | None = None, like_arg: str = "") -> None:
    """A sequence, of the length of the argument called `like_arg` where one is given."""
    if not isinstance(tensors, Sequence):
        raise TypeError(f"{op}: {arg} must be a sequence of tensors, got {type(tensors).__name__}")
    if length is not None and len(tensors) != length:
        raise ValueError(f"{op}: {arg} must be of {like_arg}' length {length}, got {len(tensors)}")


def check_aggregation(
    op: str,
    like_arg: str,
    like: Tensor,
    channels: int,
    head_dim: int,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    depthwise_biases: Sequence[Tensor] | None,
    pointwise_biases: Sequence[Tensor] | None,
) -> None:
    """Per scale a depthwise [channels, 1, k, k], k odd, and a pointwise [channels, head_dim, 1, 1] weight; for all
    scales both biases [channels], or none."""
    check_list(op, "depthwise_weights", depthwise_weights)
    scales = len(depthwise_weights)
    check_list(op, "pointwise_weights", pointwise_weights, scales, "depthwise_weights")
    if (depthwise_biases is None) != (pointwise_biases is None):
        missing = "depthwise" if depthwise_biases is None else "pointwise"
        other = "pointwise" if depthwise_biases is None else "depthwise"
        raise ValueError(f"{op}: {missing}_biases must be given where {other}_biases are, got None")
    for arg, biases in (("depthwise_biases", depthwise_biases), ("pointwise_biases", pointwise_biases)):
        if biases is None:
            continue
        check_list(op, arg, biases, scales, "depthwise_weights")
        for s, bias in enumerate(biases):
            check_like(op, f"{arg}[{s}]", bias, like_arg, like)
            check_shape(op, f"{arg}[{s}]", bias, (channels,))
    for s, (depthwise, pointwise) in enumerate(zip(depthwise_weights, pointwise_weights, strict=True)):
        arg = f"depthwise_weights[{s}]"
        check_like(op, arg, depthwise, like_arg, like)
        side = depthwise.shape[-1] if depthwise.dim() == 4 else 0
        if side % 2 == 0 or depthwise.shape != (channels, 1, side, side):
            expected = f"[{channels}, 1, k, k] with an odd k"
            raise ValueError(f"{op}: {arg} must be of shape {expected}, got {shape_text(depthwise)}")
        check_like(op, f"pointwise_weights[{s}]", pointwise, like_arg, like)
        check_shape(op, f"pointwise_weights[{s}]", pointwise, (channels, head_dim, 1, 1))
