"""How much of a LiteMLA the kernels may take over, judged from its submodules at every call.

A convolution is read, not called, only where nobody could tell: exactly `nn.Conv2d`, without hooks, parametrizations,
tensor subclasses or a forward of its own. Everything else (LoRA, weight norm, quantised or wrapped convolutions, hooks)
is called as a module, and the ops serve what lies between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .hosts import CONV_LAYER_CLASSES, CONV_LAYER_SUBMODULES, class_name

DROPOUTS = (nn.Dropout, nn.Dropout2d)


@dataclass(frozen=True)
class FusionPlan:
    """What the kernels compute of one LiteMLA, and why not more.

    path: "whole" (one op from x to the projection, with an eval-mode BatchNorm in it), "aggregation and attention"
        (between the qkv and proj submodules), "attention" alone, or "none" (another kernel function: plain torch).
    reason: what keeps it from the next larger path; empty for "whole".
    """

    path: Literal["whole", "aggregation and attention", "attention", "none"]
    reason: str = ""

    def __str__(self) -> str:
        return self.path if not self.reason else f"{self.path} only: {self.reason}"


Path = tuple[Literal["whole", "aggregation and attention", "attention", "none"], str]


def largest_path(lite_mla: Any) -> Path:
    """The path that reproduces what calling the submodules would do, and the reason; a tuple, as it is made often."""
    if type(lite_mla.kernel_func) is not nn.ReLU:
        return "none", f"the kernel function is {type(lite_mla.kernel_func).__name__}"
    if torch_module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "attention", "a hook is registered for all modules"
    reason = _why_not_aggregation(lite_mla.aggreg, lite_mla.dim)
    if reason is not None:
        return "attention", reason
    reason = _why_not_qkv(lite_mla.qkv) or _why_not_conv_layer("proj", lite_mla.proj)
    return ("whole", "") if reason is None else ("aggregation and attention", reason)


def _why_not_aggregation(aggregations: Any, dim: int) -> str | None:
    biased = None
    for s, aggregation in enumerate(aggregations._modules.values()):
        name = f"aggreg.{s}"
        reason = why_not_called(name, aggregation)
        if reason is not None:
            return reason
        convs = list(aggregation._modules.values())
        if type(aggregation) is not nn.Sequential or len(convs) != 2:
            return f"{name} is no nn.Sequential of two convolutions"
        depthwise, pointwise = convs
        reason = _why_not_conv(f"{name}.0", depthwise) or _why_not_conv(f"{name}.1", pointwise)
        if reason is not None:
            return reason
        channels, side = depthwise.in_channels, depthwise.kernel_size[0]
        same = depthwise.kernel_size == (side, side) and side % 2 == 1 and depthwise.padding == (side // 2, side // 2)
        if not same or depthwise.groups != channels or depthwise.out_channels != channels:
            return f"{name}.0 is no depthwise convolution that keeps the size"
        if not _is_pointwise(pointwise, dim) or pointwise.out_channels != channels:
            return f"{name}.1 is no 1 x 1 convolution in groups of dim"
        biases = (depthwise.bias is not None, pointwise.bias is not None)
        if biased not in (None, biases) or biases[0] != biases[1]:
            return f"{name} has a bias where another convolution of aggreg has none"
        biased = biases
    return None


def _why_not_qkv(qkv: Any) -> str | None:
    reason = _why_not_conv_layer("qkv", qkv)
    if reason is None and not _is_absent(qkv.norm):
        reason = "qkv has a norm"
    if reason is None and not _is_absent(qkv.act):
        reason = "qkv has an activation"
    return reason


def _why_not_conv_layer(name: str, layer: Any) -> str | None:
    reason = why_not_called(name, layer)
    if reason is not None:
        return reason
    if class_name(layer) not in CONV_LAYER_CLASSES:
        return f"{name} is a {type(layer).__name__}"
    if not all(key in CONV_LAYER_SUBMODULES for key in layer._modules) or layer._parameters:
        return f"{name} has submodules or parameters of its own"
    dropout = getattr(layer, "dropout", None)
    if dropout is not None:
        reason = why_not_called(f"{name}.dropout", dropout)
        if reason is not None:
            return reason
        if type(dropout) not in DROPOUTS or (dropout.training and dropout.p > 0):
            return f"{name} has a dropout"
    conv = layer.conv
    reason = _why_not_conv(f"{name}.conv", conv)
    if reason is None and not _is_pointwise(conv, conv.in_channels):
        reason = f"{name}.conv is no dense 1 x 1 convolution"
    return reason


def _why_not_conv(name: str, conv: Any) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"{name} is a {type(conv).__name__}"
    reason = why_not_called(name, conv)
    if reason is not None:
        return reason
    if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        return f"{name} has a stride, dilation or padding mode of its own"
    # A wrapper such as a DTensor or a quantised weight computes its convolution itself.
    if hasattr(type(conv.weight), "__tensor_flatten__"):
        return f"{name} has a weight of type {type(conv.weight).__name__}"
    return None


def _is_pointwise(conv: nn.Conv2d, group: int) -> bool:
    return conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups * group == conv.in_channels


def why_not_called(name: str, module: nn.Module) -> str | None:
    """Why calling `module` could do more than its class says; None if it could not."""
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        kinds = ("forward_pre", "forward", "backward_pre", "backward")
        kind = next(kind for kind in kinds if getattr(module, f"_{kind}_hooks"))
        return f"{name} has a {kind.replace('_', ' ')} hook"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own"
    return None


def _is_absent(module: nn.Module | None) -> bool:
    return module is None or (type(module) is nn.Identity and why_not_called("", module) is None)


def foldable(norm: Any) -> bool:
    """Whether `norm` is, at this moment, an affine map of its input: a BatchNorm in eval mode that nobody watches."""
    if type(norm) is not nn.BatchNorm2d or norm.training or why_not_called("", norm) is not None:
        return False
    return norm.running_mean is not None and norm.running_var is not None


def folded(norm: Any, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale = weight / sqrt(running_var + eps), shift = bias_norm + (bias - running_mean) * scale, in at least float32.

    Read from the norm's vectors at every call, so that nothing can go stale; gradients flow into weight and bias.
    """
    compute = torch.promote_types(dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(compute) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(compute)
    mean = norm.running_mean.to(compute)
    mean = mean if bias is None else mean - bias.to(compute)
    if norm.bias is None:
        return scale, -mean * scale
    return scale, torch.addcmul(norm.bias.to(compute), mean, scale, value=-1)


def autocast_of(device_type: str) -> Callable[[Tensor], Tensor]:
    """What autocast makes of an argument of a convolution at this moment."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return _as_it_is
    lower = torch.get_autocast_dtype(device_type)
    return lambda tensor: tensor if tensor.dtype == torch.float64 else tensor.to(lower)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
