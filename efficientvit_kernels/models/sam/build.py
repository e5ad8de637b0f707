"""The five models of the EfficientViT-SAM family."""

from __future__ import annotations

from typing import NamedTuple

from ..backbones import create_backbone
from ..blocks import set_norm_eps
from .image_encoder import SamImageEncoder, SamNeck
from .mask_decoder import MaskDecoder
from .model import EfficientViTSam
from .prompt_encoder import PromptEncoder


class SamConfig(NamedTuple):
    """Backbone, its three last stages (deepest first), depth and expansion of the neck, side of the encoder's input."""

    backbone: str
    stages: tuple[int, int, int]
    neck_depth: int
    neck_expand: int
    image_size: int


SAM_CONFIGS = {
    "l0": SamConfig("l0", (4, 3, 2), 4, 1, 512),
    "l1": SamConfig("l1", (4, 3, 2), 8, 1, 512),
    "l2": SamConfig("l2", (4, 3, 2), 12, 1, 512),
    "xl0": SamConfig("xl0", (5, 4, 3), 6, 4, 1024),
    "xl1": SamConfig("xl1", (5, 4, 3), 12, 4, 1024),
}
PREFIX = "efficientvit-sam-"
PROMPT_FRAME = 1024
NORM_EPS = 1e-6


def create_sam(name: str, attention: str = "fused") -> EfficientViTSam:
    """A Segment Anything model on an EfficientViT image encoder, with the official state-dict keys.

    Args:
        name: "l0", "l1", "l2", "xl0" or "xl1", with or without "efficientvit-sam-" before it.
        attention: "fused" (the kernels) or "reference" (plain torch); the same keys.

    Raises:
        ValueError: unknown name or attention.

    Source: Zhang, Cai and Han, "EfficientViT-SAM" (CVPR workshops 2024).
    """
    config = SAM_CONFIGS.get(name.removeprefix(PREFIX))
    if config is None:
        names = ", ".join(PREFIX + size for size in SAM_CONFIGS)
        raise ValueError(f"create_sam: name must be one of {names}, got {name!r}")
    backbone = create_backbone(config.backbone, attention=attention)
    widths = {f"stage{stage}": backbone.widths[stage] for stage in config.stages}
    encoder = SamImageEncoder(backbone, SamNeck(widths, config.neck_depth, config.neck_expand))
    model = EfficientViTSam(encoder, PromptEncoder(), MaskDecoder(), (PROMPT_FRAME, config.image_size))
    set_norm_eps(model, NORM_EPS)
    return model
