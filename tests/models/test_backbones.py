"""The backbones: official keys, sizes and numbers; what they accept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from efficientvit_kernels import FusedLiteMLA, LiteMLA
from efficientvit_kernels.models.backbones import BACKBONES, create_backbone
from tests.models.golden_models import golden_image, manifest, state_entries
from tests.models.model_checks import (
    Build,
    check_16_bits,
    check_batch_0,
    check_channels_last,
    check_golden,
    check_macs,
    check_state_and_size,
    check_training,
    golden_model,
    on_meta,
    outputs,
)

pytestmark = pytest.mark.usefixtures("one_thread")
PUBLISHED = ["b0", "b1", "b2", "b3", "l0", "l1", "l2", "l3"]
WITH_GOLDEN = PUBLISHED[:-1]
SMALL = ["b0", "l0"]
DTYPES = [torch.float16, torch.bfloat16]


def case(name: str) -> tuple[Build, str]:
    return partial(create_backbone, name), f"efficientvit_backbone_{name}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_sizes_and_eps(name: str) -> None:
    check_state_and_size(*case(name))


@pytest.mark.parametrize("name", ["l0", "l1", "l2", "xl0", "xl1"])
def test_keys_inside_segment_anything(name: str) -> None:
    prefix = "image_encoder.backbone."
    entries = [entry for entry in manifest(f"efficientvit_sam_{name}") if entry[0].startswith(prefix)]
    model = on_meta(partial(create_backbone, name))
    assert state_entries(model) == [(key.removeprefix(prefix), shape, dtype) for key, shape, dtype in entries]


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs(name: str) -> None:
    check_macs(*case(name))


@pytest.mark.parametrize("name", WITH_GOLDEN)
def test_golden(name: str) -> None:
    check_golden(*case(name))


@pytest.mark.parametrize("name", SMALL)
def test_golden_float64(name: str) -> None:
    check_golden(*case(name), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    check_16_bits(*case(name), dtype)


@pytest.mark.parametrize("check", [check_channels_last, check_batch_0])
@pytest.mark.parametrize("name", SMALL)
def test_behaviour(name: str, check: Callable[[Build, str], None]) -> None:
    check(*case(name))


@pytest.mark.parametrize("name", ["b0", pytest.param("l0", marks=pytest.mark.nightly)])
def test_training(name: str) -> None:
    check_training(*case(name))


@pytest.mark.parametrize("name", list(BACKBONES))
def test_widths_and_strides(name: str) -> None:
    model = on_meta(partial(create_backbone, name, in_channels=1)).eval()
    features = model(torch.empty(2, 1, 256, 320, device="meta"))
    widths = [features[f"stage{i}"].shape[1] for i in range(len(features) - 2)]
    assert widths == model.widths
    assert len(widths) == (6 if name.startswith("xl") else 5)
    for i, width in enumerate(widths):
        assert features[f"stage{i}"].shape == (2, width, 256 >> (i + 1), 320 >> (i + 1))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (33, 31), (17, 100)])
def test_any_size(size: tuple[int, int]) -> None:
    fused, reference = (golden_model(*case("b0"), attention) for attention in ("fused", "reference"))
    x = golden_image(*size)
    expected = outputs(reference, x)
    for key, value in outputs(fused, x).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-5)
    assert expected["stage4"].shape[-2:] == tuple(-(-side // 32) for side in size)


def test_attention_names_the_module() -> None:
    for attention, cls in {"fused": FusedLiteMLA, "reference": LiteMLA}.items():
        model = on_meta(partial(create_backbone, "b0"), attention)
        assert {type(m) for m in model.modules() if isinstance(m, LiteMLA)} == {cls}


ERRORS: dict[str, tuple[Callable[[nn.Module], object], type[Exception], str]] = {
    "rank": (
        lambda m: m(torch.zeros(3, 32, 32)),
        ValueError,
        r"must be of shape \[B, channels, H, W\], got \[3, 32, 32\]",
    ),
    "channels": (lambda m: m(torch.zeros(1, 4, 32, 32)), ValueError, r"\[B, 3, H > 0, W > 0\], got \[1, 4, 32, 32\]"),
    "no pixels": (lambda m: m(torch.zeros(1, 3, 0, 32)), ValueError, r"\[B, 3, H > 0, W > 0\], got \[1, 3, 0, 32\]"),
    "dtype": (
        lambda m: m(torch.zeros(1, 3, 8, 8).half()),
        TypeError,
        "weights' dtype torch.float32, got torch.float16",
    ),
    "integers": (lambda m: m(torch.zeros(1, 3, 8, 8).int()), TypeError, "must be of dtype float16.* got int32"),
    "no tensor": (lambda m: m([1]), TypeError, "EfficientViTBackbone: x must be a tensor, got list"),
    "name": (lambda m: create_backbone("b4"), ValueError, "create_backbone: name must be one of b0, .*, xl1, got 'b4'"),
    "attention": (lambda m: create_backbone("b0", "fast"), ValueError, "must be one of fused, reference, got 'fast'"),
    "in_channels": (lambda m: create_backbone("b0", in_channels=0), ValueError, "in_channels must be positive, got 0"),
}


@pytest.mark.parametrize("name", list(ERRORS))
def test_errors(name: str) -> None:
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call(create_backbone("b0"))
