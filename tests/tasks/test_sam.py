"""`sam`: masks of known objects from points, boxes and a grid; the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from efficientvit_kernels.models.sam import EfficientViTSam
from efficientvit_kernels.tasks import Problem, mask_images
from tests.models.sam_common import BACKGROUND, BLUE, GREEN, RED, ToySam, colour_mask, overlap, small_l0, toy_image
from tests.tasks.commands import results, run, use_model
from tests.tasks.pictures import Image, noise, read, write

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "efficientvit-sam-l0"
GRID = ("--points-per-side", 6, "--stability", 0.8)


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_model(monkeypatch, ToySam())
    return write(tmp_path / "in/x.png", toy_image())


def test_a_point(tmp_path: Path, image: Path) -> None:
    """A single point is ambiguous: three masks, the best first."""
    assert run("sam", MODEL, tmp_path / "out", image, "--point", "32,24") == 0
    (record,) = results(tmp_path / "out")["images"]
    assert record["files"] == ["x_overlay.png", "x_mask_000.png", "x_mask_001.png", "x_mask_002.png"]
    best = read(tmp_path / "out/x_mask_000.png")
    truth = colour_mask(toy_image(), RED)
    assert (best.dtype, best.shape) == (np.bool_, (96, 128))
    assert overlap(best, truth) > 0.95
    assert [mask["score"] for mask in record["masks"]] == pytest.approx([0.95, 0.5, 0.3])
    first = record["masks"][0]
    rows, columns = best.nonzero()
    assert first["area"] == best.sum()
    assert first["bbox"] == [columns.min(), rows.min(), columns.max(), rows.max()]
    assert (record["masks"][2]["area"], record["masks"][2]["bbox"]) == (0, None)
    picture = read(tmp_path / "out/x_overlay.png")
    outside = colour_mask(toy_image(), BLUE)
    np.testing.assert_array_equal(picture[outside], toy_image()[outside])
    assert (picture[best] != toy_image()[best]).any(axis=1).all()
    np.testing.assert_array_equal(picture[24, 32], (0, 200, 0))  # the point


def test_more_prompts_give_one_mask(tmp_path: Path, image: Path) -> None:
    prompts = ("--point", "32,24", "--point", "100,2,0")
    assert run("sam", MODEL, tmp_path / "out", image, *prompts) == 0
    (record,) = results(tmp_path / "out")["images"]
    assert record["files"] == ["x_overlay.png", "x_mask_000.png"]
    np.testing.assert_array_equal(read(tmp_path / "out/x_overlay.png")[2, 100], (220, 0, 0))  # a point off the object


def test_prompts_reach_the_predictor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a 128 x 96 image the frame of 1024 has 8 times the pixels."""
    model, seen = ToySam(), []

    def decode(
        embedding: Any, points: Any, boxes: Any, masks: Any, multimask: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(
            (points and [part.tolist() for part in points], None if boxes is None else boxes.tolist(), multimask)
        )
        return torch.zeros(1, 1, 256, 256), torch.zeros(1, 1)

    monkeypatch.setattr(model, "decode", decode)
    path = write(tmp_path / "x.png", toy_image())
    for settings in ({"box": (8, 10, 56, 40)}, {"box": (0, 0, 9, 9), "points": [(4, 5, 0)]}, {"points": [(4, 5, 1)]}):
        list(mask_images(model, [path], **settings))  # type: ignore[arg-type]
    assert seen == [
        (None, [[64.0, 80.0, 448.0, 320.0]], False),
        ([[[[32.0, 40.0]]], [[0.0]]], [[0.0, 0.0, 72.0, 72.0]], False),
        ([[[[32.0, 40.0]]], [[1.0]]], None, True),
    ]


def test_everything(tmp_path: Path, image: Path) -> None:
    assert run("sam", MODEL, tmp_path / "out", image, *GRID, "--format", "npz") == 0
    (record,) = results(tmp_path / "out")["images"]
    assert record["files"] == ["x_overlay.png", "x_masks.npz"]
    with np.load(tmp_path / "out/x_masks.npz") as content:
        scores = content["scores"]
        masks = [content[f"mask_{i:03}"] for i in range(len(scores))]
    assert len(masks) == len(record["masks"]) == 4
    for colour in (RED, GREEN, BLUE, BACKGROUND):
        assert max(overlap(mask, colour_mask(toy_image(), colour)) for mask in masks) > 0.95
    assert scores.tolist() == [mask["score"] for mask in record["masks"]] == sorted(scores, reverse=True)
    for mask, facts in zip(masks, record["masks"], strict=True):
        assert facts["area"] == mask.sum()
        assert facts["stability_score"] >= 0.8
        ((x, y),) = facts["point_coords"]
        assert mask[int(y), int(x)]
    picture = read(tmp_path / "out/x_overlay.png")
    assert (picture != toy_image()).any(axis=2).mean() > 0.95
    centres = {tuple(picture[y, x].tolist()) for x, y in ((32, 20), (45, 75), (115, 40), (75, 10))}
    assert len(centres) == 4


def test_png_masks_are_those_of_npz(tmp_path: Path, image: Path) -> None:
    for form in ("png", "npz"):
        assert run("sam", MODEL, tmp_path / form, image, *GRID, "--format", form) == 0
    with np.load(tmp_path / "npz/x_masks.npz") as content:
        for i in range(4):
            np.testing.assert_array_equal(read(tmp_path / f"png/x_mask_{i:03}.png"), content[f"mask_{i:03}"])


def test_nothing_is_found(tmp_path: Path, image: Path) -> None:
    assert run("sam", MODEL, tmp_path / "out", image, *GRID, "--iou", 0.99) == 0
    (record,) = results(tmp_path / "out")["images"]
    assert (record["files"], record["masks"]) == (["x_overlay.png"], [])
    np.testing.assert_array_equal(read(tmp_path / "out/x_overlay.png"), toy_image())


def test_prompts_count_in_the_upright_image(tmp_path: Path, image: Path) -> None:
    """Stored on its side, with the orientation that undoes it: the same point means the same object."""
    exif = Image.Exif()
    exif[0x0112] = 6
    side = tmp_path / "side.png"
    Image.fromarray(np.ascontiguousarray(np.rot90(toy_image()))).save(side, exif=exif)
    assert run("sam", MODEL, tmp_path / "out", image, side, "--point", "32,24") == 0
    np.testing.assert_array_equal(read(tmp_path / "out/side_mask_000.png"), read(tmp_path / "out/x_mask_000.png"))


def test_prompts_outside(tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = write(tmp_path / "small.png", noise(20, 30))
    assert run("sam", MODEL, tmp_path / "out", small, image, "--point", "32,24") == 1
    message = "points and box must lie in the image of 30 x 20 pixels, got 32,24"
    assert f"skipped: {small}: ValueError: {message}" in capsys.readouterr().err
    assert [record["image"] for record in results(tmp_path / "out")["images"]] == [str(image)]
    problems: list[Problem] = []
    for box in ((0, 0, 30, 21), (0, 0, 31, 20), (-1, 0, 30, 20), (0, -1, 30, 20)):
        assert not list(mask_images(ToySam(), [small], box=box, problems=problems))
    assert [problem.cause.rpartition("got ")[2] for problem in problems] == ["30,21", "31,20", "-1,0", "0,-1"]
    assert len(list(mask_images(small_l0(), [small], box=(0, 0, 30, 20)))) == 1


@pytest.mark.parametrize("settings", [{"points": [(0.5, 0.5, 1)]}, {"points_per_side": 1, "pred_iou_thresh": 0.0}])
@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (90, 120)])
def test_a_real_model(tmp_path: Path, size: tuple[int, int], settings: dict[str, Any]) -> None:
    path = write(tmp_path / "x.png", noise(*size))
    (result,) = mask_images(small_l0(), [path], **settings)
    assert len(result.masks) == 3 or "points" not in settings
    assert all(mask.array().shape == size for mask in result.masks)


def test_nan_is_no_mask(tmp_path: Path) -> None:
    model = ToySam()
    with torch.no_grad():
        model.image_encoder.scale.fill_(1)  # type: ignore[operator, union-attr]
    model.decode = lambda *_: (torch.full((1, 3, 256, 256), torch.nan), torch.full((1, 3), torch.nan))  # type: ignore[method-assign]
    assert isinstance(model, EfficientViTSam)
    with pytest.raises(RuntimeError, match="the model's output is not finite"):
        list(mask_images(model, [write(tmp_path / "x.png", toy_image())], points=[(1, 1, 1)]))
