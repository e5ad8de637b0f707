"""The classifiers: official keys, sizes and numbers; what they accept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from efficientvit_kernels.models.classification import HEADS, create_cls
from tests.models.golden_models import golden_image
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
SMALL = ["b0", "l1"]
DTYPES = [torch.float16, torch.bfloat16]


def case(name: str) -> tuple[Build, str]:
    return partial(create_cls, f"efficientvit-{name}"), f"efficientvit_cls_{name}"


@pytest.mark.parametrize("name", list(HEADS))
def test_keys_sizes_and_eps(name: str) -> None:
    check_state_and_size(*case(name))


@pytest.mark.parametrize("name", list(HEADS))
def test_macs(name: str) -> None:
    check_macs(*case(name))


@pytest.mark.parametrize("name", ["b0", "b1", "b3", "l1", pytest.param("l2", marks=pytest.mark.nightly)])
def test_golden(name: str) -> None:
    check_golden(*case(name))


def test_golden_float64() -> None:
    check_golden(*case("b1"), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    check_16_bits(*case(name), dtype)


@pytest.mark.parametrize("check", [check_channels_last, check_batch_0])
@pytest.mark.parametrize("name", SMALL)
def test_behaviour(name: str, check: Callable[[Build, str], None]) -> None:
    check(*case(name))


def test_training() -> None:
    check_training(*case("b0"))


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (225, 127)])
def test_any_size(size: tuple[int, int]) -> None:
    fused, reference = (golden_model(*case("b0"), attention) for attention in ("fused", "reference"))
    x = golden_image(*size)
    torch.testing.assert_close(fused(x), reference(x), rtol=0, atol=2e-5)


def test_options() -> None:
    model = create_cls("b0", n_classes=7, in_channels=1, dropout=0.5)
    assert model.eval()(torch.zeros(2, 1, 40, 40)).shape == (2, 7)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5]
    keys = [key for key in model.state_dict() if key.startswith("head.")]
    assert keys == [key for key in create_cls("b0").state_dict() if key.startswith("head.")]


def test_errors() -> None:
    with pytest.raises(ValueError, match="create_cls: name must be one of b0, b1, b2, b3, l1, l2, l3, got 'l0'"):
        create_cls("l0")
    with pytest.raises(ValueError, match="n_classes must be positive, got 0"):
        create_cls("b0", n_classes=0)
    with pytest.raises(ValueError, match=r"x must be of shape \[B, 3, H > 0, W > 0\], got \[1, 1, 8, 8\]"):
        on_meta(partial(create_cls, "b0"))(torch.empty(1, 1, 8, 8, device="meta"))
