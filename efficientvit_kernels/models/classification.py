"""Classification: a backbone and the head of `efficientvit-b0` ... `-b3`, `-l1` ... `-l3`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..nn.conv import ConvLayer
from ..ops._checks import check_positive_int
from .backbones import BACKBONES, EfficientViTBackbone, create_backbone
from .blocks import LinearLayer, OpSequential, set_norm_eps

# Widths of the head's convolution and of its hidden linear layer.
HEADS: dict[str, tuple[int, int]] = {
    "b0": (1024, 1280),
    "b1": (1536, 1600),
    "b2": (2304, 2560),
    "b3": (2304, 2560),
    "l1": (3072, 3200),
    "l2": (3072, 3200),
    "l3": (6144, 6400),
}


class ClsHead(OpSequential):
    """stage_final -> 1 x 1 convolution, mean over the pixels, linear + LayerNorm, linear to logits [B, n_classes]."""

    def __init__(
        self, in_channels: int, widths: tuple[int, int], n_classes: int, act_func: str, dropout: float = 0.0
    ) -> None:
        super().__init__(
            [
                ConvLayer(in_channels, widths[0], 1, act_func=act_func),
                nn.AdaptiveAvgPool2d(1),
                LinearLayer(widths[0], widths[1], use_bias=False, norm="ln", act_func=act_func),
                LinearLayer(widths[1], n_classes, dropout=dropout),
            ]
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(features["stage_final"])


class EfficientViTCls(nn.Module):
    """[B, 3, H, W], normalised RGB -> logits [B, n_classes]; any H, W >= 1."""

    def __init__(self, backbone: EfficientViTBackbone, head: ClsHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))  # type: ignore[no-any-return]


def create_cls(
    name: str, attention: str = "fused", *, n_classes: int = 1000, in_channels: int = 3, dropout: float = 0.0
) -> EfficientViTCls:
    """The classifier "efficientvit-b0" ... "-b3", "-l1" ... "-l3", with torch's default initialisation.

    Args:
        name: which one; the prefix may be left out.
        attention: "fused" (the kernels) or "reference" (plain torch); both have the same state-dict keys.
        n_classes, in_channels: of the logits and of the images.
        dropout: before the last linear layer.

    Raises: ValueError for an unknown name or attention.
    Source: H. Cai et al., "EfficientViT", ICCV 2023.
    """
    variant = name.removeprefix("efficientvit-")
    if variant not in HEADS:
        raise ValueError(f"create_cls: name must be one of {', '.join(HEADS)}, got {name!r}")
    check_positive_int("create_cls", "n_classes", n_classes)
    config = BACKBONES[variant]
    backbone = create_backbone(variant, attention, in_channels=in_channels)
    model = EfficientViTCls(backbone, ClsHead(backbone.widths[-1], HEADS[variant], n_classes, config.act_func, dropout))
    set_norm_eps(model, config.norm_eps)
    return model
