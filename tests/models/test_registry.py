"""create_model, list_models: every official name, checkpoints, errors; nothing heavy at import."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch

import efficientvit_kernels.models
from efficientvit_kernels.models import create_backbone, create_model, list_models
from efficientvit_kernels.models.classification import EfficientViTCls
from efficientvit_kernels.models.segmentation import EfficientViTSeg
from tests.models.golden_models import manifest, model_names, state_entries
from tests.models.model_checks import on_meta
from tests.processes import python

CLASSIFIERS = [f"efficientvit-{size}" for size in ("b0", "b1", "b2", "b3", "l1", "l2", "l3")]


def manifest_name(name: str) -> str:
    if name in CLASSIFIERS:
        name = name.replace("-", "-cls-")
    return name.replace("-", "_").replace(".", "p")


def test_all_official_names() -> None:
    official = [name for name in list_models() if "-sr-" not in name]
    backbones = [name for name in model_names() if "_backbone_" in name]
    assert sorted([manifest_name(name) for name in official] + backbones) == sorted(model_names())
    assert list_models("efficientvit-sr-*") == ["efficientvit-sr-w0.75", "efficientvit-sr-w1.0"]
    assert list_models("efficientvit-[bl]?") == CLASSIFIERS
    assert list_models("nothing*") == []


@pytest.mark.parametrize("attention", ["fused", "reference"])
@pytest.mark.parametrize("name", [name for name in list_models() if "-sr-" not in name])
def test_every_name_makes_the_official_state_dict(name: str, attention: str) -> None:
    assert state_entries(on_meta(partial(create_model, name, None), attention)) == manifest(manifest_name(name))


def test_kinds_and_options() -> None:
    assert isinstance(create_model("efficientvit-b0", n_classes=10), EfficientViTCls)
    model = create_model("efficientvit-seg-b0-cityscapes", n_classes=3).eval()
    assert isinstance(model, EfficientViTSeg)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("name", ["efficientvit-b1-r288", "efficientvit-l2-r384", "efficientvit-b0-r224"])
def test_resolution_chooses_a_checkpoint_only(name: str) -> None:
    plain = name.rpartition("-")[0]
    assert state_entries(on_meta(partial(create_model, name, None))) == manifest(manifest_name(plain))


def test_weights(tmp_path: Path) -> None:
    source = create_model("efficientvit-b0")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "b0.pt")
    for weights in (str(tmp_path / "b0.pt"), tmp_path / "b0.pt"):
        loaded = create_model("efficientvit-b0-r224", weights, attention="reference")
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in loaded.state_dict().items())


ERRORS = {
    "efficientvit-b4": "'efficientvit-b4'; did you mean efficientvit-b",
    "EfficientViT-L2": "'EfficientViT-L2'; did you mean efficientvit-l2",
    "efficientvit-b1-r384": "'efficientvit-b1-r384'; did you mean efficientvit-b1-r224 or efficientvit-b1-r256 or",
    "efficientvit-l0": "'efficientvit-l0'; did you mean",
    "resnet18": "'resnet18'",
}


@pytest.mark.parametrize("name", list(ERRORS))
def test_unknown_name(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"name must be one of list_models(), got {ERRORS[name]}")) as error:
        create_model(name)
    assert (";" in str(error.value)) == ("did you mean" in ERRORS[name])


def test_other_errors() -> None:
    with pytest.raises(TypeError, match="create_model: name must be a str, got int"):
        create_model(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attention must be one of fused, reference, got 'flash'"):
        create_model("efficientvit-b0", attention="flash")
    with pytest.raises(TypeError, match="n_clases"):
        create_model("efficientvit-b0", n_clases=2)


def test_names_are_listed_without_importing_a_model() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "from efficientvit_kernels import models\n"
        "assert 'create_backbone' in dir(models) and len(models.list_models()) == 32\n"
        "print(sorted(set(sys.modules) - before - sys.stdlib_module_names))"
    )
    result = python("-c", code)
    names = ["", "._lazy", ".models", ".models.registry"]
    assert result.stdout.strip() == str([f"efficientvit_kernels{name}" for name in names]), result


def test_public_names() -> None:
    assert create_backbone("b0").widths == [8, 16, 32, 64, 128]
    with pytest.raises(AttributeError, match="has no attribute 'create_bone'"):
        efficientvit_kernels.models.create_bone  # noqa: B018
