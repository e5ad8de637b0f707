"""Segment Anything against the official models: state dicts, sizes, and what they compute with rule-made weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficientvit_kernels.models.sam.build import SAM_CONFIGS, create_sam
from efficientvit_kernels.models.sam.model import EfficientViTSam
from tests.models.golden_models import TOLERANCE, compare, golden_image
from tests.models.model_checks import TOLERANCE_64, check_macs, check_state_and_size
from tests.models.sam_common import golden_prompts, make_golden_sam, sam_l0

pytestmark = pytest.mark.usefixtures("one_thread")

NIGHTLY_SIZES = [pytest.param(size, marks=pytest.mark.nightly) for size in ("l1", "xl1")]


@pytest.mark.parametrize("size", SAM_CONFIGS)
def test_state_dict_and_params(size: str) -> None:
    check_state_and_size(
        lambda attention: create_sam(f"efficientvit-sam-{size}", attention), f"efficientvit_sam_{size}"
    )


@pytest.mark.parametrize("size", SAM_CONFIGS)
def test_macs_of_the_encoder(size: str) -> None:
    check_macs(lambda attention: create_sam(size, attention).image_encoder, f"efficientvit_sam_{size}")


def encoder_features(model: EfficientViTSam, image: Tensor) -> dict[str, Tensor]:
    """Every stage, the neck's result and the embedding, of one forward."""
    seen: dict[str, Tensor] = {}
    hook = model.image_encoder.neck.register_forward_hook(lambda module, inputs, features: seen.update(features))
    with torch.no_grad():
        out = model.image_encoder(image)
    hook.remove()
    stages = {key: value for key, value in seen.items() if key.startswith("stage") and key != "stage_final"}
    return {**stages, "neck": seen["sam_encoder"], "out": out}


def prompt_results(model: EfficientViTSam, embedding: Tensor, prompt: str) -> dict[str, Tensor]:
    """Prompt embeddings, masks and IoU for one golden prompt."""
    prompts = golden_prompts()[prompt]
    with torch.no_grad():
        sparse, dense = model.prompt_encoder(*prompts)
        results = {"sparse": sparse, "dense": dense}
        for multi in (0, 1):
            masks, ious = model.decode(embedding, *prompts, bool(multi))
            results |= {f"multi{multi}/masks": masks, f"multi{multi}/iou": ious}
    return results


def decoder_results(model: EfficientViTSam, embedding: Tensor) -> dict[str, Tensor]:
    """The dense positional encoding, and the results of every golden prompt; of one also masks of an image's size."""
    results = {"dense_pe": model.prompt_encoder.get_dense_pe()}
    for prompt in golden_prompts():
        results |= {f"{prompt}/{key}": value for key, value in prompt_results(model, embedding, prompt).items()}
    restored = model.postprocess_masks(results["points/multi1/masks"], (768, 1024), (48, 64))
    return {**results, "points/multi1/postprocessed_768x1024_48x64": restored}


def check_golden(size: str, model: EfficientViTSam, sizes: list[tuple[int, int]], tolerance: float) -> dict[str, float]:
    name = f"efficientvit_sam_{size}"
    errors = {}
    for height, width in sizes:
        prefix = f"{height}x{width}"
        features = encoder_features(model, golden_image(height, width).to(model.dtype))
        found = compare(name, prefix, features, tolerance)
        errors |= {f"{prefix}/{key}": error for key, error in found.items()}
        if (height, width) == (128, 128):
            found = compare(name, "decoder", decoder_results(model, features["out"]), tolerance)
            errors |= {f"decoder/{key}": error for key, error in found.items()}
    return errors


def test_l0_is_golden() -> None:
    check_golden("l0", sam_l0(), [(128, 128), (96, 160)], TOLERANCE)


def test_l0_reference_attention_is_golden() -> None:
    check_golden("l0", make_golden_sam("l0", attention="reference"), [(96, 160)], TOLERANCE)


@pytest.mark.nightly
def test_l0_in_float64() -> None:
    model = make_golden_sam("l0").double()
    features = encoder_features(model, golden_image(128, 128).double())
    compare("efficientvit_sam_l0", "128x128", features, TOLERANCE_64)
    # The golden masks come from float32 encodings and from the float32 embedding.
    results = prompt_results(model, features["out"], "box")
    compare("efficientvit_sam_l0", "decoder/box", results, 1e-5)


@pytest.mark.nightly
def test_l0_at_its_own_size_is_golden() -> None:
    check_golden("l0", sam_l0(), [(512, 512)], TOLERANCE)


@pytest.mark.parametrize("attention", ["fused", "reference"])
@pytest.mark.parametrize("size", NIGHTLY_SIZES)
def test_larger_models_are_golden(size: str, attention: str) -> None:
    check_golden(size, make_golden_sam(size, attention), [(128, 128), (96, 160)], TOLERANCE)
