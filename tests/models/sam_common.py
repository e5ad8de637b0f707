"""The golden Segment Anything models, and the prompts that their golden results belong to."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from efficientvit_kernels.models.sam.build import create_sam
from efficientvit_kernels.models.sam.model import EfficientViTSam
from tests.models.golden_models import golden_image, load_golden

Points = tuple[Tensor, Tensor]

POINTS: Points = (
    torch.tensor([[[200.0, 300.0], [700.5, 512.25]], [[10.0, 1000.0], [900.0, 20.0]]]),
    torch.tensor([[1, 0], [1, 1]]),
)
BOXES = torch.tensor([[100.0, 150.0, 800.0, 900.0], [5.0, 6.0, 70.0, 80.0]])


@cache
def mask_prompt() -> Tensor:
    return torch.from_numpy(np.random.default_rng(7).standard_normal((2, 1, 256, 256)).astype(np.float32))


def golden_prompts() -> dict[str, tuple[Points | None, Tensor | None, Tensor | None]]:
    """Name in the golden files -> points, boxes, masks."""
    return {
        "points": (POINTS, None, None),
        "box": (None, BOXES, None),
        "points_box_mask": (POINTS, BOXES, mask_prompt()),
    }


def make_golden_sam(size: str, attention: str = "fused") -> EfficientViTSam:
    with torch.device("meta"):
        model = create_sam(size, attention)
    load_golden(model, f"efficientvit_sam_{size}")
    return model


@cache
def sam_l0() -> EfficientViTSam:
    """Shared by the tests, which must leave it as it is."""
    return make_golden_sam("l0")


@cache
def embedding_l0() -> Tensor:
    """The image embedding that the golden masks of l0 belong to."""
    with torch.no_grad():
        return sam_l0().image_encoder(golden_image(128, 128))  # type: ignore[no-any-return]
