"""`classify`: real weights from a file, the table, the CSV, names."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficientvit_kernels.models import create_model
from efficientvit_kernels.models.checkpoint import save_weights
from efficientvit_kernels.tasks import Problem, classify_images
from efficientvit_kernels.tasks.class_names import imagenet_names
from efficientvit_kernels.tasks.preprocess import classification_input
from tests.tasks.commands import NotFinite, results, run, use_model
from tests.tasks.pictures import noise, write

pytestmark = pytest.mark.usefixtures("one_thread")


class Fixed(nn.Module):
    """The logits 0, 1, 2, ... of any image."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.arange(float(count)))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.logits.expand(len(x), -1)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_with_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    """What the command writes is what the model in the file says of the officially preprocessed image."""
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors comes with timm, in the extra `demo`")
    model = create_model("efficientvit-b0").eval()
    with torch.no_grad():  # of the initial weights the logits of every image are about the same
        model.head.op_list[3].linear.weight.mul_(300)  # type: ignore[union-attr]
    save_weights(model, tmp_path / f"weights{suffix}")
    image = noise(60, 80)
    write(tmp_path / "in/x.png", image)
    status = run(
        "classify", "efficientvit-b0", tmp_path / "out", tmp_path / "in", "--weights", tmp_path / f"weights{suffix}"
    )
    assert status == 0
    with torch.no_grad():
        expected = model(classification_input(image, 224, 0.95)).softmax(1)[0].topk(5)
    printed = capsys.readouterr()
    assert "random weights" not in printed.err
    assert f"{tmp_path / 'in/x.png'} (80 x 60)" in printed.out
    with open(tmp_path / "out/classify.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == expected.indices.tolist()
    torch.testing.assert_close(
        torch.tensor([float(row["probability"]) for row in rows]), expected.values, rtol=1e-3, atol=1e-6
    )
    (record,) = results(tmp_path / "out")["images"]
    assert [c["index"] for c in record["classes"]] == expected.indices.tolist()
    names = imagenet_names()
    if names is not None:
        assert [row["name"] for row in rows] == [names[i] for i in expected.indices.tolist()]
        assert names[expected.indices[0]] in printed.out


def test_names_and_fewer_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of three classes and their names, of which the file has a comma and an umlaut."""
    asked: list[dict[str, Any]] = []
    from efficientvit_kernels.tasks import job

    monkeypatch.setattr(job, "create_model", lambda *_, **options: asked.append(options) or Fixed(3))
    (tmp_path / "names.txt").write_text("dog\ncat, tame\nBär\n", encoding="utf-8")
    write(tmp_path / "x.png", noise(9, 9))
    arguments = (tmp_path / "x.png", "--names", tmp_path / "names.txt", "--size", 32)
    assert run("classify", "efficientvit-l2", tmp_path / "out", *arguments) == 0
    assert asked == [{"n_classes": 3}]
    with open(tmp_path / "out/classify.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["Bär", "cat, tame", "dog"]
    # e^i / (1 + e + e^2)
    assert [float(row["probability"]) for row in rows] == pytest.approx([0.665241, 0.244728, 0.0900306], abs=1e-6)


@pytest.mark.parametrize(
    ("model", "arguments", "size"),
    [
        ("efficientvit-b1-r288", (), 288),
        ("efficientvit-b1", (), 224),
        ("efficientvit-l2-r384", (), 384),
        ("efficientvit-l2-r384", ("--size", 64), 64),
    ],
)
def test_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, arguments: tuple[object, ...], size: int
) -> None:
    """b1 is evaluated on 95 % of the short side, others on all of it."""
    fixed = Fixed(1000)
    use_model(monkeypatch, fixed)
    image = noise(50, 70)
    write(tmp_path / "x.png", image)
    assert run("classify", model, tmp_path / "out", tmp_path / "x.png", *arguments) == 0
    expected = classification_input(image, size, 0.95 if "b1" in model else 1.0)
    torch.testing.assert_close(fixed.seen[0], expected, rtol=0, atol=0)


def test_in_python(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.png", noise(5, 6)), tmp_path / "gone.png", write(tmp_path / "b.png", noise(7, 8))]
    problems: list[Problem] = []
    found = list(classify_images(Fixed(4), paths, top=2, size=8, names=["p", "q", "r", "s"], problems=problems))
    assert [(result.path, result.size) for result in found] == [(paths[0], (5, 6)), (paths[2], (7, 8))]
    assert [[c.name for c in result.classes] for result in found] == [["s", "r"]] * 2
    assert problems == [Problem(paths[1], "does not exist")]
    with pytest.raises(ValueError, match=r"gone\.png: does not exist"):
        list(classify_images(Fixed(4), paths))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "classify_images: size must be positive, got 0"),
        ({"top": -1}, "classify_images: top must be positive, got -1"),
        ({"crop_ratio": 1.1}, r"classify_images: crop_ratio must be in \(0, 1\], got 1.1"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        classify_images(Fixed(1), [], **arguments)


def test_nan_is_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_model(monkeypatch, NotFinite())
    assert run("classify", "efficientvit-b0", tmp_path / "out", write(tmp_path / "x.png", noise(5, 5))) == 1
    assert "x.png: RuntimeError: the model's output is not finite" in capsys.readouterr().err
    assert len((tmp_path / "out/classify.csv").read_text().splitlines()) == 1


def test_without_torchvision_classes_are_numbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    for name in ["torchvision", *(name for name in sys.modules if name.startswith("torchvision."))]:
        monkeypatch.setitem(sys.modules, name, None)
    use_model(monkeypatch, Fixed(1000))
    assert run("classify", "efficientvit-b0", tmp_path / "out", write(tmp_path / "x.png", noise(5, 5)), "--top", 1) == 0
    assert "cannot be imported: they are numbered" in capsys.readouterr().out
    (record,) = results(tmp_path / "out")["images"]
    assert [(c["index"], c["name"]) for c in record["classes"]] == [(999, "")]
