"""Official classifiers and timm's efficientvit_b*, efficientvit_l*: keys in both directions, and equal outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from efficientvit_kernels.models.blocks import set_norm_eps
from efficientvit_kernels.models.checkpoint import load_weights
from efficientvit_kernels.models.classification import create_cls
from efficientvit_kernels.models.convert import official_to_timm, timm_to_official
from tests.models import golden_models as golden

timm = pytest.importorskip("timm", reason="timm is in the development extras")

pytestmark = pytest.mark.usefixtures("one_thread")
LARGE = ["b2", "b3", "l2", "l3"]
NAMES = ["b0", "b1", "l1", *LARGE]


def on_meta(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's model of that name, without memory."""
    ours, theirs = create_meta(name), timm.create_model(f"efficientvit_{name}").to("meta")
    return ours.eval(), theirs.eval()


def create_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return create_cls(f"efficientvit-{name}", "reference")


@pytest.mark.parametrize("name", ["b0", "b1", "l1", *(pytest.param(n, marks=pytest.mark.nightly) for n in LARGE)])
def test_equal_keys_and_outputs(name: str) -> None:
    """Strict loading both ways, and equal logits where timm's eps are set to the official ones.

    timm's float32 attention sums in another order; allowed is what the goldens allow.
    """
    ours, theirs = on_meta(name)
    golden.load_golden(ours, f"efficientvit_cls_{name}")
    theirs.load_state_dict(official_to_timm(ours.state_dict()), strict=True, assign=True)
    back = timm_to_official(theirs.state_dict())
    assert list(back) == list(ours.state_dict())
    assert all(torch.equal(back[key], value) for key, value in ours.state_dict().items())
    set_official_eps(theirs, name)
    x = golden.golden_image(64, 96)
    with torch.no_grad():
        expected, actual = theirs(x), ours(x)
    assert float((actual - expected).abs().max() / expected.std()) < golden.TOLERANCE


def set_official_eps(model: nn.Module, name: str) -> None:
    """timm has 1e-5 in every LiteMLA, for 1e-15, and in the norm of an L model's head, for 1e-7."""
    module: Any
    for module in model.modules():
        if type(module).__name__ == "LiteMLA":
            assert module.eps == 1e-5
            module.eps = 1e-15
    set_norm_eps(model, 1e-5 if name.startswith("b") else 1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str) -> None:
    state = create_meta(name).state_dict()
    converted = official_to_timm(state)
    assert len(converted) == len(state)
    assert list(timm_to_official(converted)) == list(state)


def test_other_keys_are_refused() -> None:
    state = create_meta("b0").state_dict()
    with pytest.raises(
        ValueError, match="official_to_timm: state must have the keys of an official classification model"
    ):
        official_to_timm({**state, "head.input_ops.0.conv.weight": torch.zeros(1)})
    other = official_to_timm(state)
    with pytest.raises(
        ValueError, match=r"keys of timm's efficientvit_b\* or efficientvit_l\*, got 'stages\.4\.blocks"
    ):
        timm_to_official({**other, "stages.4.blocks.0.main.depth_conv.conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="state must have the keys of timm's"):
        timm_to_official(state)


def test_load_weights_converts(tmp_path: Path) -> None:
    theirs = timm.create_model("efficientvit_b0")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "timm.pt")
    ours = create_cls("efficientvit-b0")
    load_weights(ours, tmp_path / "timm.pt", convert=timm_to_official)
    assert torch.equal(ours.state_dict()["head.op_list.3.linear.weight"], theirs.head.classifier[4].weight)
