"""The backbones B0-B3, L0-L3, XL0 and XL1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.conv import ConvLayer
from ..ops._checks import check_image, check_positive_int, shape_text
from .blocks import (
    DSConv,
    EfficientViTBlock,
    FusedMBConv,
    MBConv,
    OpSequential,
    ResBlock,
    ResidualBlock,
    residual,
    set_norm_eps,
)

CONV_BLOCKS: dict[str, type[MBConv] | type[FusedMBConv]] = {"mb": MBConv, "fmb": FusedMBConv}
ATTENTION_SCALES = {"att": (5,), "att@3": (3,)}


@dataclass(frozen=True)
class Stage:
    """One stage after the first: a block with stride 2, whose output has `width` channels, then `depth` residual ones.

    block: "mb", "fmb", "att" (with 5 x 5 aggregation) or "att@3"; the first block is an "mb" where this is attention.
    expand, down_expand: of the residual blocks and of the first block.
    fewer_norm, down_fewer_norm: their form; the convolutions beside an attention always have fewer norms.
    """

    width: int
    depth: int
    block: str
    expand: float = 4.0
    down_expand: float = 4.0
    fewer_norm: bool = False
    down_fewer_norm: bool = False


@dataclass(frozen=True)
class BackboneConfig:
    """stem_width, stem_depth: stage 0, a 3 x 3 convolution with stride 2, then residual blocks of type stem_block.

    stem_key: whether stage 0 is filed under `input_stem` (B) or as the first of `stages` (L, XL).
    norm_eps: eps of all norms of the models on this backbone.
    """

    stem_width: int
    stem_depth: int
    stem_block: type[DSConv] | type[ResBlock]
    stem_key: bool
    stages: tuple[Stage, ...]
    dim: int
    act_func: str
    norm_eps: float


def _b_series(widths: tuple[int, ...], depths: tuple[int, ...], dim: int) -> BackboneConfig:
    # In the convolutional stages the block with stride 2 counts towards the depth; in those with attention it does not.
    convs = [Stage(width, depth - 1, "mb") for width, depth in zip(widths[1:3], depths[1:3], strict=True)]
    attention = [
        Stage(width, depth, "att", down_fewer_norm=True) for width, depth in zip(widths[3:], depths[3:], strict=True)
    ]
    return BackboneConfig(widths[0], depths[0], DSConv, True, (*convs, *attention), dim, "hswish", 1e-5)


def _l_series(
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    blocks: tuple[str, ...] = ("fmb", "fmb", "mb", "att"),
    expands: tuple[int, ...] = (4, 4, 4, 6),
    fewer_norms: tuple[bool, ...] = (False, False, True, True),
    norm_eps: float = 1e-7,
) -> BackboneConfig:
    stages = tuple(
        Stage(width, depth, block, expand, 4 * expand, fewer, fewer)
        for width, depth, block, expand, fewer in zip(widths[1:], depths[1:], blocks, expands, fewer_norms, strict=True)
    )
    return BackboneConfig(widths[0], depths[0], ResBlock, False, stages, 32, "gelu", norm_eps)


def _xl_series(depths: tuple[int, ...]) -> BackboneConfig:
    blocks = ("fmb", "fmb", "fmb", "att@3", "att@3")
    fewer_norms = (False, False, False, True, True)
    return _l_series((32, 64, 128, 256, 512, 1024), depths, blocks, (4, 4, 4, 4, 6), fewer_norms, norm_eps=1e-6)


BACKBONES: dict[str, BackboneConfig] = {
    "b0": _b_series((8, 16, 32, 64, 128), (1, 2, 2, 2, 2), 16),
    "b1": _b_series((16, 32, 64, 128, 256), (1, 2, 3, 3, 4), 16),
    "b2": _b_series((24, 48, 96, 192, 384), (1, 3, 4, 4, 6), 32),
    "b3": _b_series((32, 64, 128, 256, 512), (1, 4, 6, 6, 9), 32),
    "l0": _l_series((32, 64, 128, 256, 512), (1, 1, 1, 4, 4)),
    "l1": _l_series((32, 64, 128, 256, 512), (1, 1, 1, 6, 6)),
    "l2": _l_series((32, 64, 128, 256, 512), (1, 2, 2, 8, 8)),
    "l3": _l_series((64, 128, 256, 512, 1024), (1, 2, 2, 8, 8)),
    "xl0": _xl_series((0, 1, 1, 2, 3, 3)),
    "xl1": _xl_series((1, 2, 2, 4, 6, 6)),
}


class EfficientViTBackbone(nn.Module):
    """[B, in_channels, H, W] -> the dict of features "input", "stage0", "stage1", ..., "stage_final".

    Stage i has stride 2^(i+1) and `widths[i]` channels; sizes that a stride does not divide are rounded up.
    "stage_final" is the last stage. Any H, W >= 1 and batch 0 are accepted; channels_last in, channels_last out.
    """

    def __init__(self, config: BackboneConfig, in_channels: int = 3, attention: str = "fused") -> None:
        super().__init__()
        check_positive_int("EfficientViTBackbone", "in_channels", in_channels)
        self.in_channels = in_channels
        self.widths = [config.stem_width, *(stage.width for stage in config.stages)]
        stem = _make_stem(config, in_channels)
        stages = [
            _make_stage(width, stage, config, attention)
            for width, stage in zip(self.widths[:-1], config.stages, strict=True)
        ]
        self.input_stem = stem if config.stem_key else None
        self.stages = nn.ModuleList(stages if config.stem_key else [stem, *stages])
        set_norm_eps(self, config.norm_eps)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Raises: ValueError, TypeError where x is no [B, in_channels, H > 0, W > 0] in the dtype of the weights."""
        self._check_input(x)
        features = {"input": x}
        ops = [*self.stages] if self.input_stem is None else [self.input_stem, *self.stages]
        for i, op in enumerate(ops):
            x = op(x)
            features[f"stage{i}"] = x
        features["stage_final"] = x
        return features

    def _check_input(self, x: Tensor) -> None:
        name = type(self).__name__
        check_image(name, "x", x)
        if x.shape[1] != self.in_channels or x.shape[2] == 0 or x.shape[3] == 0:
            raise ValueError(f"{name}: x must be of shape [B, {self.in_channels}, H > 0, W > 0], got {shape_text(x)}")
        parameter = next(self.parameters(), x)
        if x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name}: x must be of the weights' dtype {parameter.dtype}, got {x.dtype}")


def _make_stem(config: BackboneConfig, in_channels: int) -> OpSequential:
    width = config.stem_width
    blocks = [residual(config.stem_block(width, width, act_func=config.act_func)) for _ in range(config.stem_depth)]
    return OpSequential([ConvLayer(in_channels, width, 3, 2, act_func=config.act_func), *blocks])


def _make_stage(in_width: int, stage: Stage, config: BackboneConfig, attention: str) -> OpSequential:
    act_func, width = config.act_func, stage.width
    down = CONV_BLOCKS.get(stage.block, MBConv)(
        in_width,
        width,
        stride=2,
        expand_ratio=stage.down_expand,
        act_func=act_func,
        fewer_norm=stage.down_fewer_norm,
    )
    return OpSequential(
        [ResidualBlock(down, None), *(_make_block(stage, config, attention) for _ in range(stage.depth))]
    )


def _make_block(stage: Stage, config: BackboneConfig, attention: str) -> nn.Module:
    act_func, width = config.act_func, stage.width
    if stage.block in ATTENTION_SCALES:
        scales = ATTENTION_SCALES[stage.block]
        return EfficientViTBlock(width, config.dim, stage.expand, scales, act_func=act_func, attention=attention)
    return residual(
        CONV_BLOCKS[stage.block](
            width, width, expand_ratio=stage.expand, act_func=act_func, fewer_norm=stage.fewer_norm
        )
    )


def create_backbone(name: str, attention: str = "fused", *, in_channels: int = 3) -> EfficientViTBackbone:
    """The backbone "b0" ... "b3", "l0" ... "l3", "xl0" or "xl1", with torch's default initialisation.

    Args:
        name: which one.
        attention: "fused" (the kernels) or "reference" (plain torch); both have the same state-dict keys.
        in_channels: of the images.

    Returns: a module from [B, in_channels, H, W] to the dict of features; `widths` has the channels of each stage.
    Raises: ValueError for an unknown name or attention.
    Source: H. Cai et al., "EfficientViT", ICCV 2023; XL0 and XL1 are the encoders of its Segment Anything models.
    """
    if name not in BACKBONES:
        raise ValueError(f"create_backbone: name must be one of {', '.join(BACKBONES)}, got {name!r}")
    return EfficientViTBackbone(BACKBONES[name], in_channels, attention)
