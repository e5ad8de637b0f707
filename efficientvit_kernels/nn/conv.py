"""ConvLayer and the norms and activations that the official model family names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W], computed in float32 for 16-bit input, whose squares may overflow."""

    def forward(self, x: Tensor) -> Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        centred = x.to(compute)
        centred = centred - centred.mean(dim=1, keepdim=True)
        normed = centred / torch.sqrt(centred.square().mean(dim=1, keepdim=True) + self.eps)
        weight, bias = self.weight.to(compute).view(1, -1, 1, 1), self.bias.to(compute).view(1, -1, 1, 1)
        return (normed * weight + bias).to(x.dtype)


class RMSNorm2d(nn.LayerNorm):
    """y = x / sqrt(mean_c(x^2) + eps) * weight + bias over the channels of [B, C, H, W], computed in float32.

    A LayerNorm subclass because the official one is: same parameters, same keys, same eps attribute.
    """

    def forward(self, x: Tensor) -> Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(compute).view(1, -1, 1, 1), self.bias.to(compute).view(1, -1, 1, 1)
        if torch.is_grad_enabled():
            wide = x.to(compute)
            normed = wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + self.eps)
            return (normed * weight + bias).to(x.dtype)
        # The same in place: the largest images of a decoder pass through here, and this halves their memory.
        squares = x.to(compute, copy=True).square_()
        scale = torch.rsqrt(squares.mean(dim=1, keepdim=True) + self.eps)
        del squares
        return (x * scale).mul_(weight).add_(bias).to(x.dtype)


NORMS: dict[str, Callable[[int], nn.Module]] = {"bn2d": nn.BatchNorm2d, "ln2d": LayerNorm2d, "trms2d": RMSNorm2d}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": lambda: nn.GELU(approximate="tanh"),
}


def make_norm(name: str | None, channels: int) -> nn.Module | None:
    if name is not None and name not in NORMS:
        raise ValueError(f"make_norm: name must be one of {', '.join(NORMS)} or None, got {name!r}")
    return None if name is None else NORMS[name](channels)


def make_activation(name: str | None) -> nn.Module | None:
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"make_activation: name must be one of {', '.join(ACTIVATIONS)} or None, got {name!r}")
    return None if name is None else ACTIVATIONS[name]()


class ConvLayer(nn.Module):
    """Conv2d with "same" padding, then norm, then activation; keys `conv`, `norm`, `act`, each where it exists."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        use_bias: bool = False,
        norm: str | None = "bn2d",
        act_func: str | None = "relu",
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=use_bias
        )
        self.norm = make_norm(norm, out_channels)
        self.act = make_activation(act_func)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else self.act(x)
