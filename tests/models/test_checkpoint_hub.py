"""hf:// references through a stand-in for huggingface_hub, and what is said where a package is missing."""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path

import pytest

from efficientvit_kernels.models.checkpoint import load_weights, save_weights
from tests.models.checkpoint_common import equal, refused, small_model

pytest.importorskip("safetensors", reason="the files of these tests are .safetensors")


def hub(monkeypatch: pytest.MonkeyPatch, files: dict[tuple[str, str, str | None], Path]) -> None:
    """A stand-in for huggingface_hub with the signature that is used, over local files."""

    def hf_hub_download(*, repo_id: str, filename: str, revision: str | None = None) -> str:
        try:
            return str(files[repo_id, filename, revision])
        except KeyError:
            raise OSError(f"404 Client Error: {repo_id}/{filename}") from None

    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_hub_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b1.safetensors"
    save_weights(small_model(), path)
    places = {("lab/vit", "b1.safetensors", None): path, ("lab/vit", "old/b1.safetensors", "v1.0"): path}
    hub(monkeypatch, places)
    for reference in ("hf://lab/vit/b1.safetensors", "hf://lab/vit@v1.0/old/b1.safetensors"):
        model = small_model(1)
        load_weights(model, reference)
        assert equal(model.state_dict(), small_model().state_dict())
    assert refused(small_model(1), "hf://lab/vit/b2.pt") == (
        "cannot be fetched: OSError: 404 Client Error: lab/vit/b2.pt"
    )
    assert refused(small_model(1), "hf://lab/vit/b1.safetensors", sha256="0" * 64).startswith("has SHA-256")
    for wrong in ("hf://lab", "hf://lab/vit", "hf://lab/vit/", "hf:///vit/b1.pt"):
        assert "the form is hf://organisation/repository[@revision]/file" in refused(small_model(), wrong)


@pytest.mark.parametrize(
    ("package", "source"), [("huggingface_hub", "hf://lab/vit/b1.pt"), ("safetensors", "b1.safetensors")]
)
def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: str) -> None:
    save_weights(small_model(), tmp_path / "b1.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        load_weights(small_model(), source)


def test_the_real_hub_package_has_the_function() -> None:
    hub_package = pytest.importorskip("huggingface_hub", reason="optional: hf:// references")
    assert {"repo_id", "filename", "revision"} <= set(inspect.signature(hub_package.hf_hub_download).parameters)
