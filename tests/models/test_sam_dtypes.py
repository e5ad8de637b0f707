"""Whole models in 16 bits and under autocast, in channels_last, in training."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from efficientvit_kernels.models.sam import EfficientViTSam
from tests.models.golden_models import golden_image
from tests.models.model_checks import RMS_16_BITS
from tests.models.sam_common import BOXES, POINTS, embedding_l0, golden_prompts, mask_prompt, small_l0

pytestmark = pytest.mark.usefixtures("one_thread")


def results(model: EfficientViTSam, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        embedding = model.image_encoder(x)
        masks, ious = model.decode(embedding, *golden_prompts()["points_box_mask"], True)
    return {"embedding": embedding, "masks": masks, "ious": ious}


@pytest.mark.parametrize("dtype", RMS_16_BITS)
def test_16_bits(dtype: torch.dtype) -> None:
    """Pure 16 bits and CPU autocast against float32; the most that was measured is 1.5e-3 and 1.2e-2."""
    model, x = small_l0(), golden_image(128, 128)
    expected = results(model, x)
    with torch.autocast("cpu", dtype):
        autocast = results(model, x)
    pure = results(deepcopy(model).to(dtype), x.to(dtype))
    assert all(value.dtype == dtype for value in pure.values())
    for key, value in expected.items():
        for kind, result in (("pure", pure[key]), ("autocast", autocast[key])):
            assert bool(result.isfinite().all()), f"{kind} {key}"
            error = (result.double() - value.double()).square().mean().sqrt() / value.double().std()
            assert error <= RMS_16_BITS[dtype], f"{kind} {key}: {error:.2e}"


def test_channels_last() -> None:
    model = deepcopy(small_l0()).to(memory_format=torch.channels_last)
    with torch.no_grad():
        embedding = model.image_encoder(golden_image(128, 128).to(memory_format=torch.channels_last))
    assert embedding.is_contiguous(memory_format=torch.channels_last)
    # Two float32 runs, each as near to float64 as the golden tolerance says.
    torch.testing.assert_close(embedding, embedding_l0(), rtol=0, atol=2e-5 * float(embedding.std()))


def test_batch_0() -> None:
    assert list(small_l0().image_encoder(golden_image(64, 96, batch=0)).shape) == [0, 256, 64, 64]


def test_training() -> None:
    """One step of the training API on two images: finite gradients for all that is used."""
    model = deepcopy(small_l0()).train()
    images = golden_image(32, 32, batch=2)
    coords, labels, boxes, mask_inputs = (prompt[:1] for prompt in (*POINTS, BOXES, mask_prompt()))
    prompts = {"point_coords": coords, "point_labels": labels, "boxes": boxes, "mask_inputs": mask_inputs}
    masks, ious = model([{"image": image, **prompts} for image in images], multimask_output=True)
    assert (list(masks.shape), list(ious.shape)) == ([2, 1, 3, 256, 256], [2, 1, 3])
    (masks.square().mean() + ious.square().mean()).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"prompt_encoder.no_mask_embed.weight"}
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_forward_is_encoder_and_decoder() -> None:
    model, image = small_l0(), golden_image(128, 128)[0]
    with torch.no_grad():
        records = [{"image": image, "boxes": BOXES}, {"image": image, "boxes": BOXES.flip(0)}]
        masks, ious = model(records, multimask_output=False)
        one = model.decode(embedding_l0(), None, BOXES, None, False)
    for found, expected in zip((masks, ious), one, strict=True):
        for i, order in enumerate((expected, expected.flip(0))):
            # float32; a batch of two goes through other kernels than a batch of one.
            torch.testing.assert_close(found[i], order, rtol=0, atol=1e-4 * float(expected.std()))


def test_errors() -> None:
    model, image = small_l0(), golden_image(64, 64)[0]
    with pytest.raises(ValueError, match="batched_input must be at least one image, got none"):
        model([])
    with pytest.raises(ValueError, match=r"point_coords and point_labels must be given together, got .*'point_coords'"):
        model([{"image": image, "point_coords": POINTS[0]}])
    with pytest.raises(ValueError, match=r"must have equally many prompts per image, got \[2, 1\]"):
        model([{"image": image, "boxes": BOXES}, {"image": image, "boxes": BOXES[:1]}])
    with pytest.raises(ValueError, match=r"SamImageEncoder: x must be \[B, 3, H > 0, W > 0\], got \[1, 1, 64, 64\]"):
        model.image_encoder(torch.zeros(1, 1, 64, 64))
    with pytest.raises(TypeError, match=r"SamImageEncoder: x must be of dtype .*, got uint8"):
        model.image_encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"image must be \[..., 3, h <= 128, w <= 128\], got \[3, 129, 4\]"):
        model.preprocess(torch.zeros(3, 129, 4))
