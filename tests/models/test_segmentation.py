"""The segmentation models: official keys, sizes and numbers; what they accept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from efficientvit_kernels.models.blocks import UpSampleLayer
from efficientvit_kernels.models.segmentation import HEADS, create_seg
from tests.models.golden_models import GOLDEN, golden_image
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
)

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [f"{backbone}-{dataset}" for dataset, heads in HEADS.items() for backbone in heads]
WITH_GOLDEN = [name for name in NAMES if (GOLDEN / f"efficientvit_seg_{name.replace('-', '_')}.npz").exists()]
SMALL = ["b0-cityscapes", "l1-ade20k"]
DTYPES = [torch.float16, torch.bfloat16]


def case(name: str) -> tuple[Build, str]:
    return partial(create_seg, f"efficientvit-seg-{name}"), f"efficientvit_seg_{name.replace('-', '_')}"


def test_eight_models_have_a_golden() -> None:
    assert len(NAMES) == 11
    assert len(WITH_GOLDEN) == 8


@pytest.mark.parametrize("name", NAMES)
def test_keys_sizes_and_eps(name: str) -> None:
    check_state_and_size(*case(name))


@pytest.mark.parametrize("name", NAMES)
def test_macs(name: str) -> None:
    check_macs(*case(name))


LARGE = [name for name in WITH_GOLDEN if name.startswith("l2")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if name in LARGE else ()) for name in WITH_GOLDEN]
)
def test_golden(name: str) -> None:
    check_golden(*case(name))


@pytest.mark.parametrize("name", ["b1-ade20k", pytest.param("l1-cityscapes", marks=pytest.mark.nightly)])
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


def test_training() -> None:
    check_training(*case("b0-cityscapes"))


@pytest.mark.parametrize("size", [(33, 64), (64, 1), (16, 32)])
def test_sizes_that_do_not_fit(size: tuple[int, int]) -> None:
    model = golden_model(*case("b0-cityscapes"))
    message = rf"x must be of H and W that are multiples of 32, got \[1, 3, {size[0]}, {size[1]}\]"
    with pytest.raises(ValueError, match=message):
        model(golden_image(*size))


def test_other_errors() -> None:
    with pytest.raises(ValueError, match=r"create_seg: name must be one of b0-cityscapes, .* got 'b0-ade20k'"):
        create_seg("b0-ade20k")
    with pytest.raises(ValueError, match=r"x must be of shape \[B, channels, H, W\], got \[3, 33, 33\]"):
        on_meta(partial(create_seg, "b0-cityscapes"))(torch.empty(3, 33, 33, device="meta"))


def test_export_with_dynamic_sizes() -> None:
    model = golden_model(*case("b0-cityscapes"))
    sides = {2: 32 * torch.export.Dim("rows", min=2, max=64), 3: 32 * torch.export.Dim("columns", min=2, max=64)}
    exported = torch.export.export(
        model, (golden_image(64, 96, 2),), dynamic_shapes=({0: torch.export.Dim("b"), **sides},)
    )
    for batch, height, width in ((2, 64, 96), (3, 128, 64)):
        x = golden_image(height, width, batch)
        torch.testing.assert_close(exported.module()(x), model(x), rtol=0, atol=1e-6)


@pytest.mark.nightly  # most of it is the time of the C++ compiler
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_makes_one_graph() -> None:
    model = golden_model(*case("b0-cityscapes"))
    x = golden_image(64, 96)
    with torch.no_grad():
        # inductor fuses and orders float32 sums in its own way; the values are about 1.
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=0, atol=2e-5)


def test_options() -> None:
    model = create_seg("b0-cityscapes", n_classes=2, in_channels=4).eval()
    assert model(torch.zeros(1, 4, 64, 32)).shape == (1, 2, 8, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_upsampling_keeps_dtype_and_layout(dtype: torch.dtype) -> None:
    x = golden_image(5, 7).to(dtype).to(memory_format=torch.channels_last)
    for layer, size in ((UpSampleLayer(factor=2), (10, 14)), (UpSampleLayer(size=(9, 4)), (9, 4))):
        y = layer(x)
        wide = torch.promote_types(dtype, torch.float32)
        expected = torch.nn.functional.interpolate(x.to(wide), size=size, mode="bicubic").to(dtype)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected)
    assert UpSampleLayer(size=(5, 7))(x) is x
    assert UpSampleLayer(factor=1)(x) is x


def test_upsampling_to_the_same_size_is_the_identity() -> None:
    x: Tensor = golden_image(6, 5)
    assert torch.equal(torch.nn.functional.interpolate(x, size=(6, 5), mode="bicubic"), x)
