"""Semantic segmentation: a backbone and the head of `efficientvit-seg-{b0,b1,b2,b3,l1,l2}-{cityscapes,ade20k}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..nn.conv import ConvLayer
from ..ops._checks import check_positive_int, shape_text
from .backbones import BACKBONES, EfficientViTBackbone, create_backbone
from .blocks import DAGBlock, FusedMBConv, MBConv, OpSequential, UpSampleLayer, residual, set_norm_eps

STRIDE = 32  # of the deepest feature; the head adds it, enlarged, to the others
CLASSES = {"cityscapes": 19, "ade20k": 150}


@dataclass(frozen=True)
class SegHeadConfig:
    """width, depth, expand, block: of the residual blocks in the middle; final_expand: of the convolution after."""

    width: int
    depth: int
    expand: float = 4
    final_expand: float | None = None
    block: type[MBConv] | type[FusedMBConv] = MBConv


HEADS: dict[str, dict[str, SegHeadConfig]] = {
    "cityscapes": {
        "b0": SegHeadConfig(32, 1, final_expand=4),
        "b1": SegHeadConfig(64, 3, final_expand=4),
        "b2": SegHeadConfig(96, 3, final_expand=4),
        "b3": SegHeadConfig(128, 3, final_expand=4),
        "l1": SegHeadConfig(256, 3, expand=1, block=FusedMBConv),
        "l2": SegHeadConfig(256, 5, expand=1, block=FusedMBConv),
    },
    "ade20k": {
        "b1": SegHeadConfig(64, 3),
        "b2": SegHeadConfig(96, 3),
        "b3": SegHeadConfig(128, 3),
        "l1": SegHeadConfig(128, 3, final_expand=8, block=FusedMBConv),
        "l2": SegHeadConfig(128, 3, final_expand=8, block=FusedMBConv),
    },
}


class SegHead(DAGBlock):
    """stage4, 3 and 2 to one width and to stride 8, added; residual blocks; logits [B, n_classes, H/8, W/8]."""

    def __init__(self, widths: list[int], config: SegHeadConfig, n_classes: int, act_func: str) -> None:
        width, expanded = config.width, config.width
        inputs: dict[str, nn.Module] = {}
        for stage in (4, 3, 2):
            conv = ConvLayer(widths[stage], width, 1, act_func=None)
            inputs[f"stage{stage}"] = (
                conv if stage == 2 else OpSequential([conv, UpSampleLayer(factor=2 ** (stage - 2))])
            )
        blocks = [
            residual(config.block(width, width, expand_ratio=config.expand, act_func=act_func))
            for _ in range(config.depth)
        ]
        final = None
        if config.final_expand is not None:
            expanded = round(width * config.final_expand)
            final = ConvLayer(width, expanded, 1, act_func=act_func)
        logits = ConvLayer(expanded, n_classes, 1, use_bias=True, norm=None, act_func=None)
        super().__init__(inputs, OpSequential(blocks), {"segout": OpSequential([final, logits])})


class EfficientViTSeg(nn.Module):
    """[B, 3, H, W], normalised RGB, H and W multiples of 32 -> logits [B, n_classes, H/8, W/8]."""

    def __init__(self, backbone: EfficientViTBackbone, head: SegHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        """Raises: ValueError where H or W is not a multiple of 32."""
        if isinstance(x, Tensor) and x.dim() == 4 and (x.shape[2] % STRIDE or x.shape[3] % STRIDE):
            raise ValueError(
                f"{type(self).__name__}: x must be of H and W that are multiples of {STRIDE}, got {shape_text(x)}"
            )
        features: Mapping[str, Tensor] = self.backbone(x)
        return self.head(features)["segout"]  # type: ignore[no-any-return]


def create_seg(
    name: str, attention: str = "fused", *, n_classes: int | None = None, in_channels: int = 3
) -> EfficientViTSeg:
    """The segmentation model "efficientvit-seg-<backbone>-<dataset>", with torch's default initialisation.

    Args:
        name: which one: b0, b1, b2, b3, l1, l2 for cityscapes; b1, b2, b3, l1, l2 for ade20k. The prefix
            "efficientvit-seg-" may be left out.
        attention: "fused" (the kernels) or "reference" (plain torch); both have the same state-dict keys.
        n_classes: of the logits; default that of the dataset.
        in_channels: of the images.

    Raises: ValueError for an unknown name or attention.
    Source: H. Cai et al., "EfficientViT", ICCV 2023.
    """
    variant, _, dataset = name.removeprefix("efficientvit-seg-").partition("-")
    if variant not in HEADS.get(dataset, {}):
        known = ", ".join(f"{backbone}-{dataset}" for dataset, heads in HEADS.items() for backbone in heads)
        raise ValueError(f"create_seg: name must be one of {known}, got {name!r}")
    n_classes = CLASSES[dataset] if n_classes is None else n_classes
    check_positive_int("create_seg", "n_classes", n_classes)
    config = BACKBONES[variant]
    backbone = create_backbone(variant, attention, in_channels=in_channels)
    model = EfficientViTSeg(backbone, SegHead(backbone.widths, HEADS[dataset][variant], n_classes, config.act_func))
    set_norm_eps(model, config.norm_eps)
    return model
