"""`segment`: the right class at the right pixel, the pictures, sizes, memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from efficientvit_kernels.tasks import palettes, segment, segment_images
from efficientvit_kernels.tasks.class_names import CITYSCAPES
from tests.tasks.commands import Colours, results, run, use_model
from tests.tasks.pictures import Image, noise, read, write

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "efficientvit-seg-b0-cityscapes"
RED_GREEN_BLUE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def stripes(height: int, width: int) -> np.ndarray:
    """Left third red, middle green, right blue; in the bottom half the other way round."""
    top = np.repeat(np.array(RED_GREEN_BLUE, dtype=np.uint8), -(-width // 3), axis=0)[:width]
    image = np.broadcast_to(top, (height, width, 3)).copy()
    image[height // 2 :] = image[height // 2 :, ::-1]
    return image


def truth(image: np.ndarray) -> np.ndarray:
    return image.argmax(axis=2)


@pytest.mark.parametrize("resize", ["official", "none"])
@pytest.mark.parametrize("dataset", ["cityscapes", "ade20k"])
@pytest.mark.parametrize("size", [(96, 96), (101, 150), (75, 61)])
def test_classes_are_where_they_belong(tmp_path: Path, size: tuple[int, int], dataset: str, resize: str) -> None:
    model, image = Colours(), stripes(*size)
    path = write(tmp_path / "x.png", image)
    (result,) = segment_images(model, [path], dataset=dataset, resize=resize)
    assert (result.labels.shape, result.labels.dtype) == (size, np.uint8)
    height, width = model.seen[0][2:]
    if resize == "none":
        assert (height, width) == (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
    else:
        assert (height, width) == segment.segmentation_size(dataset, *size)
    assert result.input_size == (height, width)
    # Cells of 8 input pixels have one class each: right everywhere but within a cell of a border.
    cell = 8 * max(1, round(size[0] / height), round(size[1] / width))
    image_truth = truth(image)
    certain = np.ones(size, dtype=bool)
    for axis in (0, 1):
        for shift in range(-cell, cell + 1):
            certain &= np.roll(image_truth, shift, axis) == image_truth
    assert certain.mean() > 0.1
    np.testing.assert_array_equal(result.labels[certain], image_truth[certain])
    assert (result.labels == image_truth).mean() > 0.85
    assert sum(result.shares().values()) == pytest.approx(1)


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, Colours())
    image = stripes(96, 192)
    path = write(tmp_path / "x.png", image)
    assert run("segment", MODEL, tmp_path / "out", path, "--resize", "none") == 0
    with Image.open(tmp_path / "out/x_labels.png") as picture:
        assert picture.mode == "P"
        labels = np.array(picture)
        coloured = np.array(picture.convert("RGB"))
    assert (labels == truth(image)).mean() > 0.999  # where two borders cross, the resizing mixes four cells
    np.testing.assert_array_equal(coloured, np.array(palettes.CITYSCAPES)[labels])
    picture = read(tmp_path / "out/x_overlay.png")
    assert picture.shape[0] == 96
    np.testing.assert_array_equal(picture[:, :192], (image.astype(int) + coloured + 1) // 2)
    legend = picture[:, 192:]
    for index in (0, 1, 2):  # road, sidewalk, building: those that are there
        assert (legend == palettes.CITYSCAPES[index]).all(axis=2).any()
    assert not (legend == palettes.CITYSCAPES[3]).all(axis=2).any()
    (record,) = results(tmp_path / "out")["images"]
    assert record["files"] == ["x_overlay.png", "x_labels.png"]
    assert (record["width"], record["height"], record["input_size"]) == (192, 96, [96, 192])
    assert record["classes"] == {name: pytest.approx(1 / 3, abs=1e-3) for name in ("road", "sidewalk", "building")}


@pytest.mark.parametrize("resize", ["official", "none"])
def test_odd_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resize: str) -> None:
    monkeypatch.setattr(segment, "MOST_OFFICIAL_PIXELS", 2**20)  # the official 2^21 take long on one core
    model = Colours()
    use_model(monkeypatch, model)
    sizes = {"dot": (1, 1), "row": (17, 3000), "column": (3000, 17)}
    for name, (height, width) in sizes.items():
        write(tmp_path / f"in/{name}.png", noise(height, width))
    model_name = "efficientvit-seg-b1-ade20k"
    monkeypatch.setattr(segment, "SEGMENTATION", {"ade20k": CITYSCAPES})  # the stand-in has 19 classes
    assert run("segment", model_name, tmp_path / "out", tmp_path / "in", "--resize", resize) == 0
    for name, size in sizes.items():
        assert read(tmp_path / f"out/{name}_labels.png").shape == size
        height, width, _ = read(tmp_path / f"out/{name}_overlay.png").shape
        assert height >= size[0]
        assert width > size[1]
    dot = (512, 512) if resize == "official" else (32, 32)
    # The official size of the strips, 512 x 90368, is too large.
    assert [shape[2:] for shape in model.seen] == [(3008, 32), dot, (32, 3008)]


def test_a_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pictures of the command are those of the bare model; random weights are announced, and the same each time."""
    image = noise(64, 96)
    path = write(tmp_path / "x.png", image)
    for out in ("first", "second"):
        assert run("segment", MODEL, tmp_path / out, path, "--resize", "none") == 0
        assert "warning: random weights: the output means nothing" in capsys.readouterr().err
    first, second = (read(tmp_path / out / "x_labels.png") for out in ("first", "second"))
    np.testing.assert_array_equal(first, second)
    from efficientvit_kernels.models import create_model
    from efficientvit_kernels.tasks.preprocess import normalise, pixels_to_tensor

    torch.manual_seed(0)
    with torch.no_grad():
        logits = create_model(MODEL).eval()(normalise(pixels_to_tensor(image)))
    expected = F.interpolate(logits, (64, 96), mode="bicubic", align_corners=False)[0].argmax(0)
    np.testing.assert_array_equal(first, expected)


def test_classes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(1, 150, 5, 7)
    logits[0, 3, :2] += 9
    logits[0, 100] = logits[0, 3]  # of equals the first wins
    expected = F.interpolate(logits, (33, 50), mode="bicubic", align_corners=False)[0].argmax(0)
    for most in (1, 7 * 33 * 50, 2**26):
        monkeypatch.setattr(segment, "LOGITS_AT_A_TIME", most)
        found = segment.classes_of(logits, (33, 50))
        assert found.dtype == torch.uint8
        torch.testing.assert_close(found.long(), expected, rtol=0, atol=0)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^segment_images: dataset must be one of cityscapes, ade20k, got 'coco'"):
        segment_images(Colours(), [], dataset="coco")
    with pytest.raises(ValueError, match=r"^segment_images: resize must be one of official, none, got 'half'"):
        segment_images(Colours(), [], dataset="ade20k", resize="half")
