"""LiteMLA, EfficientViT's multi-scale linear attention: the reference module and its fused replacement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import reference
from ..ops import lite_mla, multiscale_aggregate, relu_linear_attention
from ..ops._backends import check_backend
from ..ops._checks import check_bool, check_eps, check_image, check_positive_int
from .conv import ConvLayer, make_activation
from .fusion import FusionPlan, autocast_of, foldable, folded, largest_path
from .hosts import why_not_lite_mla

T = TypeVar("T")


def _pair(value: T | Sequence[T]) -> tuple[T, T]:
    """Scalars are broadcast, as the official constructor does."""
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            raise ValueError(f"LiteMLA: a pair must be a scalar or two values, got {len(value)} values")
        return value[0], value[1]
    return value, value  # type: ignore[return-value]


class LiteMLA(nn.Module):
    """Multi-scale ReLU linear attention on [B, C, H, W]; the official constructor, state-dict keys and channel order.

    qkv = 1x1 conv of x; per scale s, aggreg_s = grouped 1x1 conv of a depthwise s x s conv of qkv; ReLU linear
    attention on qkv and on every aggreg_s; proj = 1x1 conv of the concatenated results, and a norm.

    Args:
        in_channels, out_channels: C of input and output.
        heads: number of heads per scale; default int(in_channels // dim * heads_ratio).
        dim: head dimension D.
        use_bias, norm, act_func: for (qkv, proj); a scalar stands for both. The aggregation convs take qkv's bias flag.
            norm: "bn2d", "ln2d", "trms2d" or None. act_func: "relu", "relu6", "hswish", "silu", "gelu" or None.
        kernel_func: feature map of the attention; other than "relu", the reference path serves.
        scales: odd kernel sizes of the aggregations.
        eps: added to the attention's denominator in float32.

    This class computes the attention with the plain-torch specification; `FusedLiteMLA` with the kernels.
    """

    backend = "reference"
    recompute = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int | None = None,
        heads_ratio: float = 1.0,
        dim: int = 8,
        use_bias: bool | tuple[bool, bool] = False,
        norm: str | tuple[str | None, str | None] | None = (None, "bn2d"),
        act_func: str | tuple[str | None, str | None] | None = (None, None),
        kernel_func: str = "relu",
        scales: tuple[int, ...] = (5,),
        eps: float = 1e-15,
    ) -> None:
        super().__init__()
        check_positive_int("LiteMLA", "dim", dim)
        check_eps("LiteMLA", eps)
        qkv_bias, proj_bias = _pair(use_bias)
        qkv_norm, proj_norm = _pair(norm)
        qkv_act, proj_act = _pair(act_func)
        heads = int(in_channels // dim * heads_ratio) if heads is None else heads
        if heads < 1:
            raise ValueError(f"LiteMLA: in_channels must give at least one head of dim {dim}, got {in_channels}")
        if any(scale < 1 or scale % 2 == 0 for scale in scales):
            raise ValueError(f"LiteMLA: scales must be odd and positive, got {tuple(scales)}")
        feature_map = make_activation(kernel_func)
        if feature_map is None:
            raise ValueError("LiteMLA: kernel_func must be the name of an activation, got None")
        total = heads * dim
        self.dim, self.eps = dim, eps
        self.qkv = ConvLayer(in_channels, 3 * total, 1, use_bias=qkv_bias, norm=qkv_norm, act_func=qkv_act)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * total, 3 * total, scale, padding=scale // 2, groups=3 * total, bias=qkv_bias),
                nn.Conv2d(3 * total, 3 * total, 1, groups=3 * heads, bias=qkv_bias),
            )
            for scale in scales
        )
        self.kernel_func = feature_map
        width = total * (1 + len(scales))
        self.proj = ConvLayer(width, out_channels, 1, use_bias=proj_bias, norm=proj_norm, act_func=proj_act)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        qkv = self.qkv(x)
        multi_scale = [qkv, *(aggregate(qkv) for aggregate in self.aggreg)]
        return self.proj(self._attend(multi_scale))  # type: ignore[no-any-return]

    def _attend(self, multi_scale: list[Tensor]) -> Tensor:
        if type(self.kernel_func) is nn.ReLU:
            return relu_linear_attention(multi_scale, self.dim, eps=self.eps, backend=self.backend)
        check_backend(type(self).__name__, self.backend, multi_scale[0].device.type)
        return reference.relu_linear_attention(
            multi_scale, self.dim, eps=self.eps, feature_map=self.kernel_func.forward
        )

    def _check_input(self, x: Tensor) -> None:
        name = type(self).__name__
        check_image(name, "x", x)
        conv = getattr(self.qkv, "conv", None)
        if not isinstance(conv, nn.Conv2d):
            return  # wrapped by somebody's adapter, which knows what it accepts
        if x.shape[1] != conv.in_channels or x.shape[2] == 0 or x.shape[3] == 0:
            expected = f"[B, {conv.in_channels}, H > 0, W > 0]"
            raise ValueError(f"{name}: x must be of shape {expected}, got {list(x.shape)}")
        if x.dtype != conv.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name}: x must be of the weights' dtype {conv.weight.dtype}, got {x.dtype}")


class FusedLiteMLA(LiteMLA):
    """LiteMLA on the fused kernels: a drop-in replacement with the same constructor, weights, keys and outputs.

    Where the submodules are plain, one op computes the block from x to the projection, an eval-mode BatchNorm included;
    it saves x and qkv for the backward, where separate convolutions and attention save many times as much. Submodules
    that are not plain (adapters, hooks, parametrizations, other norms) are called as they are, and the ops serve what
    lies between. This is judged at every call; `fusion_plan()` tells. Nothing derived from the weights is kept.

    Args: as `LiteMLA`, and
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `efficientvit_kernels.relu_linear_attention`.
        recompute: save x alone for the backward, and compute qkv again there (where the block is fused whole).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int | None = None,
        heads_ratio: float = 1.0,
        dim: int = 8,
        use_bias: bool | tuple[bool, bool] = False,
        norm: str | tuple[str | None, str | None] | None = (None, "bn2d"),
        act_func: str | tuple[str | None, str | None] | None = (None, None),
        kernel_func: str = "relu",
        scales: tuple[int, ...] = (5,),
        eps: float = 1e-15,
        *,
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, heads, heads_ratio, dim, use_bias, norm, act_func, kernel_func, scales, eps
        )
        check_backend("FusedLiteMLA", backend)
        check_bool("FusedLiteMLA", "recompute", recompute)
        self.backend, self.recompute = backend, recompute

    @classmethod
    def from_module(cls, module: nn.Module, backend: str = "auto", *, recompute: bool = False) -> FusedLiteMLA:
        """A FusedLiteMLA over the submodules and hooks of an official, timm or own LiteMLA: everything is shared.

        Raises:
            TypeError: `module` is not one of the known LiteMLA classes, or not built like them; the message says why.
            ValueError, NotImplementedError: as `relu_linear_attention`, for the backend.
        """
        reason = why_not_lite_mla(module)
        if reason is not None:
            raise TypeError(f"FusedLiteMLA.from_module: module must be a known LiteMLA, got one that {reason}")
        check_backend("FusedLiteMLA.from_module", backend)
        check_bool("FusedLiteMLA.from_module", "recompute", recompute)
        fused = cls.__new__(cls)
        # The very dictionaries of submodules and hooks: what is registered or replaced on one is on the other, too.
        fused.__dict__.update(module.__dict__)
        fused.backend, fused.recompute = backend, recompute
        return fused

    def fusion_plan(self) -> FusionPlan:
        """What the kernels would compute at a call now, and why not more."""
        return FusionPlan(*largest_path(self))

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        path, _ = largest_path(self)
        if path == "whole":
            return self._forward_whole(x)
        qkv = self.qkv(x)
        if path == "aggregation and attention":
            multi_scale = self._aggregate(qkv)
        else:
            multi_scale = [qkv, *(aggregate(qkv) for aggregate in self.aggreg)]
        return self.proj(self._attend(multi_scale))  # type: ignore[no-any-return]

    def _forward_whole(self, x: Tensor) -> Tensor:
        qkv, layer = self.qkv.conv, self.proj
        proj, norm, act = layer.conv, layer.norm, layer.act
        cast = autocast_of(x.device.type)
        x = cast(x)
        scale, shift = None, proj.bias
        fold = foldable(norm)
        if fold:
            scale, shift = folded(norm, proj.bias, x.dtype)
        elif shift is not None:
            shift = shift.to(torch.promote_types(x.dtype, torch.float32))
        y = lite_mla(
            x,
            cast(qkv.weight),
            proj_weight=cast(proj.weight),
            head_dim=self.dim,
            qkv_bias=None if qkv.bias is None else cast(qkv.bias),
            proj_scale=scale,
            proj_shift=shift,
            eps=self.eps,
            recompute=self.recompute,
            backend=self.backend,
            **self._aggregation(cast),
        )
        if norm is not None and not fold:
            y = norm(y)
        return y if act is None else act(y)

    def _aggregate(self, qkv: Tensor) -> list[Tensor]:
        cast = autocast_of(qkv.device.type)
        qkv = cast(qkv)
        return [qkv, *multiscale_aggregate(qkv, head_dim=self.dim, backend=self.backend, **self._aggregation(cast))]

    def _aggregation(self, cast: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Weights and biases of the aggregation convolutions, as the ops take them."""
        pairs: list[Any] = [tuple(pair._modules.values()) for pair in self.aggreg]
        depthwise, pointwise = ([pair[i] for pair in pairs] for i in range(2))
        biased = len(depthwise) > 0 and depthwise[0].bias is not None
        return {
            "depthwise_weights": [cast(conv.weight) for conv in depthwise],
            "pointwise_weights": [cast(conv.weight) for conv in pointwise],
            "depthwise_biases": [cast(conv.bias) for conv in depthwise] if biased else None,
            "pointwise_biases": [cast(conv.bias) for conv in pointwise] if biased else None,
        }

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, eps={self.eps}, backend={self.backend!r}"
        return f"{text}, recompute=True" if self.recompute else text
