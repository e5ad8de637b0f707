"""The blocks that every model of the family is built of, with the official parameter names.

A block's layers are `ConvLayer`s. All but the last have the activation `act_func`. In the normal form every layer has
the norm and no bias; with `fewer_norm` only the last has the norm, and the others a bias instead.

ConvLayer, norms and activations are in `nn/conv.py`, the attention in `nn/lite_mla.py`. What only the autoencoders have
between two stages is in `dc_ae.py`, the transformer of the mask decoder in `sam/transformer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import FusedLiteMLA, LiteMLA
from ..nn.conv import ConvLayer, make_activation

ATTENTIONS: dict[str, type[LiteMLA]] = {"fused": FusedLiteMLA, "reference": LiteMLA}


def attention_class(attention: str) -> type[LiteMLA]:
    """The module that `attention` names: "fused" (the kernels) or "reference" (plain torch), with the same keys."""
    if attention not in ATTENTIONS:
        raise ValueError(f"attention_class: attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    return ATTENTIONS[attention]


def _layer_forms(count: int, norm: str | None, act_func: str | None, fewer_norm: bool) -> list[dict[str, Any]]:
    """Bias, norm and activation of each of a block's `count` layers."""
    first = {"use_bias": fewer_norm, "norm": None if fewer_norm else norm, "act_func": act_func}
    last = {"use_bias": False, "norm": norm, "act_func": None}
    return [first] * (count - 1) + [last]


class LinearLayer(nn.Module):
    """Flatten to [B, features], dropout, linear, LayerNorm (`norm="ln"`), activation; the last three have keys."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        use_bias: bool = True,
        dropout: float = 0.0,
        norm: str | None = None,
        act_func: str | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("ln", None):
            raise ValueError(f"LinearLayer: norm must be 'ln' or None, got {norm!r}")
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.linear = nn.Linear(in_features, out_features, use_bias)
        self.norm = None if norm is None else nn.LayerNorm(out_features)
        self.act = make_activation(act_func)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1) if x.dim() > 2 else x
        for module in (self.dropout, self.linear, self.norm, self.act):
            x = x if module is None else module(x)
        return x


class DSConv(nn.Module):
    """3 x 3 depthwise (with the stride), 1 x 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        norm: str | None = "bn2d",
        act_func: str | None = "relu6",
        fewer_norm: bool = False,
    ) -> None:
        super().__init__()
        depth, point = _layer_forms(2, norm, act_func, fewer_norm)
        self.depth_conv = ConvLayer(in_channels, in_channels, 3, stride, groups=in_channels, **depth)
        self.point_conv = ConvLayer(in_channels, out_channels, 1, **point)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(x))  # type: ignore[no-any-return]


class MBConv(nn.Module):
    """1 x 1 to round(in_channels * expand_ratio), 3 x 3 depthwise (with the stride), 1 x 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expand_ratio: float = 6.0,
        norm: str | None = "bn2d",
        act_func: str | None = "relu6",
        fewer_norm: bool = False,
    ) -> None:
        super().__init__()
        hidden = round(in_channels * expand_ratio)
        inverted, depth, point = _layer_forms(3, norm, act_func, fewer_norm)
        self.inverted_conv = ConvLayer(in_channels, hidden, 1, **inverted)
        self.depth_conv = ConvLayer(hidden, hidden, 3, stride, groups=hidden, **depth)
        self.point_conv = ConvLayer(hidden, out_channels, 1, **point)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(self.inverted_conv(x)))  # type: ignore[no-any-return]


class FusedMBConv(nn.Module):
    """3 x 3 (with the stride) to round(in_channels * expand_ratio), 1 x 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expand_ratio: float = 6.0,
        norm: str | None = "bn2d",
        act_func: str | None = "relu6",
        fewer_norm: bool = False,
    ) -> None:
        super().__init__()
        hidden = round(in_channels * expand_ratio)
        spatial, point = _layer_forms(2, norm, act_func, fewer_norm)
        self.spatial_conv = ConvLayer(in_channels, hidden, 3, stride, **spatial)
        self.point_conv = ConvLayer(hidden, out_channels, 1, **point)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.spatial_conv(x))  # type: ignore[no-any-return]


class ResBlock(nn.Module):
    """3 x 3 (with the stride) to round(in_channels * expand_ratio), 3 x 3."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expand_ratio: float = 1.0,
        norm: str | None = "bn2d",
        act_func: str | None = "relu6",
        fewer_norm: bool = False,
    ) -> None:
        super().__init__()
        hidden = round(in_channels * expand_ratio)
        first, second = _layer_forms(2, norm, act_func, fewer_norm)
        self.conv1 = ConvLayer(in_channels, hidden, 3, stride, **first)
        self.conv2 = ConvLayer(hidden, out_channels, 3, **second)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))  # type: ignore[no-any-return]


class GLUMBConv(nn.Module):
    """1 x 1 to 2 * round(in_channels * expand_ratio), 3 x 3 depthwise, x * act(gate) of the two halves, 1 x 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expand_ratio: float = 6.0,
        norm: str | None = "bn2d",
        act_func: str | None = "silu",
        fewer_norm: bool = False,
    ) -> None:
        super().__init__()
        hidden = round(in_channels * expand_ratio)
        inverted, depth, point = _layer_forms(3, norm, act_func, fewer_norm)
        depth = {**depth, "act_func": None}  # its activation acts on the gate alone
        self.inverted_conv = ConvLayer(in_channels, 2 * hidden, 1, **inverted)
        self.depth_conv = ConvLayer(2 * hidden, 2 * hidden, 3, stride, groups=2 * hidden, **depth)
        self.glu_act = make_activation(act_func)
        self.point_conv = ConvLayer(hidden, out_channels, 1, **point)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.depth_conv(self.inverted_conv(x)).chunk(2, dim=1)
        x = x * (gate if self.glu_act is None else self.glu_act(gate))
        return self.point_conv(x)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """main(x) + shortcut(x); without a shortcut main(x), without a main x. Keys begin with `main.`.

    `drop_path` > 0 drops the main branch of that share of the images during training and scales up the others by
    1 / (1 - drop_path); `training.apply_drop_path` sets it.
    """

    def __init__(self, main: nn.Module | None, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.main, self.shortcut = main, shortcut
        self.drop_path = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.main is None:
            return x
        y: Tensor = self.main(x)
        if self.shortcut is None:
            return y
        if self.training and self.drop_path > 0:
            keep = 1 - self.drop_path
            kept = torch.rand((y.shape[0], 1, 1, 1), device=y.device) < keep
            y = y * (kept.to(y.dtype) / keep)
        return y + self.shortcut(x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path}" if self.drop_path > 0 else ""


def residual(main: nn.Module) -> ResidualBlock:
    """main(x) + x."""
    return ResidualBlock(main, nn.Identity())


class OpSequential(nn.Module):
    """The modules one after the other, under `op_list.{i}`; None is dropped before they are numbered."""

    def __init__(self, ops: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(op for op in ops if op is not None)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.op_list:
            x = op(x)
        return x


class EfficientViTBlock(nn.Module):
    """x + LiteMLA(x), then x + local(x), where local is an MBConv or GLUMBConv in the `fewer_norm` form.

    Args:
        in_channels: C of input and output.
        dim: head dimension of the attention.
        expand_ratio: of the local module.
        scales: kernel sizes of the attention's aggregations; may be empty.
        norm, act_func: names, see `nn.conv`.
        local_module: "mbconv" or "glumbconv".
        attention: "fused" or "reference".
    """

    def __init__(
        self,
        in_channels: int,
        dim: int = 32,
        expand_ratio: float = 4.0,
        scales: tuple[int, ...] = (5,),
        norm: str = "bn2d",
        act_func: str = "hswish",
        local_module: str = "mbconv",
        attention: str = "fused",
    ) -> None:
        super().__init__()
        if local_module not in LOCAL_MODULES:
            names = ", ".join(LOCAL_MODULES)
            raise ValueError(f"EfficientViTBlock: local_module must be one of {names}, got {local_module!r}")
        lite_mla = attention_class(attention)(in_channels, in_channels, dim=dim, norm=(None, norm), scales=scales)
        local = LOCAL_MODULES[local_module](
            in_channels, in_channels, expand_ratio=expand_ratio, norm=norm, act_func=act_func, fewer_norm=True
        )
        self.context_module = residual(lite_mla)
        self.local_module = residual(local)

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))  # type: ignore[no-any-return]


LOCAL_MODULES: dict[str, Any] = {"mbconv": MBConv, "glumbconv": GLUMBConv}


class UpSampleLayer(nn.Module):
    """Bicubic interpolation (align_corners False, a = -0.75) to `size`, or by `factor`; in float32 for 16-bit input.

    The result has the input's dtype, so that what follows runs in half precision.
    """

    def __init__(self, size: tuple[int, int] | None = None, factor: float = 2.0) -> None:
        super().__init__()
        self.size, self.factor = size, factor

    def forward(self, x: Tensor) -> Tensor:
        # Resampling to the same grid is the exact identity.
        if self.factor == 1 if self.size is None else tuple(x.shape[-2:]) == self.size:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.size is None:
            y = F.interpolate(wide, scale_factor=self.factor, mode="bicubic")
        else:
            y = F.interpolate(wide, size=self.size, mode="bicubic")
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"factor={self.factor}" if self.size is None else f"size={self.size}"


def pixel_unshuffle(x: Tensor) -> Tensor:
    """2 x 2 pixels to channels; torch's function hands back an empty tensor as it came."""
    batch, channels, height, width = x.shape
    return F.pixel_unshuffle(x, 2) if batch else x.reshape(0, 4 * channels, height // 2, width // 2)


class DAGBlock(nn.Module):
    """Named features, each through its op, added up, through `middle`, and from there to each named output.

    Args:
        inputs: name of a feature -> the op on it; keys `input_ops.{i}`. They are added from the right: x0 + (x1 + x2).
        middle: keys `middle.*`.
        outputs: name of a result -> the op that makes it; keys `output_ops.{i}`.
    """

    def __init__(self, inputs: Mapping[str, nn.Module], middle: nn.Module, outputs: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.input_keys, self.output_keys = list(inputs), list(outputs)
        self.input_ops = nn.ModuleList(inputs.values())
        self.middle = middle
        self.output_ops = nn.ModuleList(outputs.values())

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features with the outputs added."""
        branches = [op(features[key]) for key, op in zip(self.input_keys, self.input_ops, strict=True)]
        merged = branches.pop()
        while branches:
            merged = branches.pop() + merged
        merged = self.middle(merged)
        outputs = {key: op(merged) for key, op in zip(self.output_keys, self.output_ops, strict=True)}
        return {**features, **outputs}


def set_norm_eps(model: nn.Module, eps: float) -> None:
    """Sets eps of every BatchNorm, LayerNorm (with its subclasses) and GroupNorm; LiteMLA's eps stays."""
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            module.eps = eps
