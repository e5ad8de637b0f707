"""The golden Segment Anything models and their prompts; a toy model whose masks are known."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientvit_kernels.models.sam.build import create_sam
from efficientvit_kernels.models.sam.model import EfficientViTSam
from efficientvit_kernels.models.sam.prompt_encoder import PromptEncoder
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


def small_l0() -> EfficientViTSam:
    """The modules of `sam_l0` with an encoder input of 128 x 128, which takes a tenth of the time."""
    model = sam_l0()
    return EfficientViTSam(model.image_encoder, model.prompt_encoder, model.mask_decoder, (1024, 128)).eval()


class ToyEncoder(nn.Module):
    """The image itself, as an embedding of 256 x 256."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, (256, 256), mode="area") * self.scale


class ToySam(EfficientViTSam):
    """A model without training that finds what has the colour of the first point, and two worse masks."""

    def __init__(self) -> None:
        parts: list[Any] = [ToyEncoder(), PromptEncoder(), nn.Identity()]
        super().__init__(*parts, (1024, 512))

    def decode(
        self,
        image_embedding: Tensor,
        points: Points | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        assert points is not None
        assert list(points[1].shape) == list(points[0].shape[:2])
        column, row = (points[0][:, 0] / 4).long().clamp(0, 255).unbind(1)
        colours = image_embedding[0][:, row, column].T  # [B, 3]
        distance = (image_embedding - colours[:, :, None, None]).abs().amax(1)
        # 0 where the colours differ by 86 of 255 values, half way from one rectangle of `toy_image` to the next.
        found = (4.5 - 3 * distance).clamp(min=-4.5)
        logits = torch.stack([found, found + 1000, found - 1000], dim=1)
        ious = torch.tensor([0.95, 0.5, 0.3]).expand(len(colours), 3)
        return (logits, ious) if multimask_output else (logits[:, :1], ious[:, :1])


BACKGROUND, RED, GREEN, BLUE = (240, 240, 240), (200, 30, 30), (20, 160, 40), (30, 40, 220)


def toy_image() -> npt.NDArray[np.uint8]:
    """96 x 128: a red and a green rectangle, and a blue one that touches the right edge, on light grey."""
    image = np.full((96, 128, 3), BACKGROUND, dtype=np.uint8)
    image[10:40, 8:56] = RED
    image[50:90, 30:60] = GREEN
    image[20:70, 100:128] = BLUE
    return image


def colour_mask(image: npt.NDArray[np.uint8], colour: tuple[int, int, int]) -> npt.NDArray[np.bool_]:
    return np.asarray((image == colour).all(axis=2))


def overlap(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """IoU of two masks."""
    return float((a & b).sum() / (a | b).sum())
