"""The automatic mask generator, on a toy model whose right answers are known, and on a real one."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from efficientvit_kernels.models.sam import SamAutomaticMaskGenerator
from efficientvit_kernels.models.sam import mask_generator as module
from efficientvit_kernels.models.sam.binary_masks import decode_runs
from tests.models.sam_common import (
    BACKGROUND,
    BLUE,
    GREEN,
    RED,
    ToySam,
    colour_mask,
    overlap,
    small_l0,
    toy_image,
)

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = (RED, GREEN, BLUE, BACKGROUND)
SETTINGS: dict[str, Any] = {"points_per_side": 6, "points_per_batch": 10, "stability_score_thresh": 0.8}


def matches(records: list[dict[str, Any]]) -> list[float]:
    """For every colour of the toy image the overlap of the best record."""
    truths = [colour_mask(toy_image(), colour) for colour in COLOURS]
    return [max(overlap(record["segmentation"], truth) for record in records) for truth in truths]


def test_every_object_once() -> None:
    records = SamAutomaticMaskGenerator(ToySam(), **SETTINGS).generate(toy_image())
    assert len(records) == len(COLOURS)
    assert min(matches(records)) > 0.95
    for record in records:
        assert set(record) == {
            "segmentation", "area", "bbox", "predicted_iou", "point_coords", "stability_score", "crop_box",
        }  # fmt: skip
        mask = record["segmentation"]
        assert (mask.shape, mask.dtype) == ((96, 128), np.bool_)
        rows, columns = np.nonzero(mask)
        x, y, w, h = record["bbox"]
        assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max(), rows.max())
        assert record["area"] == mask.sum()
        assert record["predicted_iou"] == pytest.approx(0.95)
        assert 0.8 <= record["stability_score"] <= 1
        assert record["crop_box"] == [0, 0, 128, 96]
        ((column, row),) = record["point_coords"]
        assert mask[int(row), int(column)]


def test_thresholds() -> None:
    """Without suppression each of the 36 points gives its right mask; with a low threshold also that of everything."""
    every = {**SETTINGS, "box_nms_thresh": 1.0}
    for settings, count in (
        ({}, 36),
        ({"pred_iou_thresh": 0.4}, 72),
        ({"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}, 72),  # the third mask of every point is empty
        ({"pred_iou_thresh": 0.96}, 0),
        ({"stability_score_thresh": 1.01}, 0),
    ):
        assert len(SamAutomaticMaskGenerator(ToySam(), **{**every, **settings}).generate(toy_image())) == count


def test_what_is_processed_at_a_time_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = SamAutomaticMaskGenerator(ToySam(), **SETTINGS).generate(toy_image())
    monkeypatch.setattr(module, "PIXELS_AT_A_TIME", 2**20 * 3)
    found = SamAutomaticMaskGenerator(ToySam(), **{**SETTINGS, "points_per_batch": 7}).generate(toy_image())
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a.pop("segmentation"), b.pop("segmentation"))
        assert a == b


def test_crops() -> None:
    """Objects inside a crop come from the crop, which the second suppression prefers; cut ones from the image."""
    generator = SamAutomaticMaskGenerator(ToySam(), **SETTINGS, crop_n_layers=1, crop_n_points_downscale_factor=2)
    assert [len(grid) for grid in generator.point_grids] == [36, 9]
    records = generator.generate(toy_image())
    assert min(matches(records)) > 0.95
    truth = colour_mask(toy_image(), RED)
    red = max(records, key=lambda record: overlap(record["segmentation"], truth))
    assert red["crop_box"] != [0, 0, 128, 96]
    ((column, row),) = red["point_coords"]
    assert truth[int(row), int(column)]
    assert not generator.predictor.is_image_set


def test_outputs() -> None:
    masks = SamAutomaticMaskGenerator(ToySam(), **SETTINGS).generate(toy_image())
    runs = SamAutomaticMaskGenerator(ToySam(), **SETTINGS, output_mode="uncompressed_rle").generate(toy_image())
    for mask, encoded in zip(masks, runs, strict=True):
        np.testing.assert_array_equal(decode_runs(encoded["segmentation"]), mask["segmentation"])


@pytest.mark.skipif(find_spec("pycocotools") is None, reason="pycocotools is not installed")
def test_coco_output() -> None:
    records = SamAutomaticMaskGenerator(ToySam(), **SETTINGS, output_mode="coco_rle").generate(toy_image())
    assert all(isinstance(record["segmentation"]["counts"], str) for record in records)


def test_point_grids() -> None:
    grid = np.array([[0.25, 0.25], [0.5, 0.75]])  # on red and on the background
    settings = {**SETTINGS, "points_per_side": None, "point_grids": [grid]}
    records = SamAutomaticMaskGenerator(ToySam(), **settings).generate(toy_image())
    assert {tuple(record["point_coords"][0]) for record in records} == {(32.0, 24.0), (64.0, 72.0)}
    assert matches(records)[0] > 0.95


@pytest.mark.skipif(find_spec("scipy") is None, reason="scipy is not installed")
def test_small_regions() -> None:
    image = toy_image()
    image[20:24, 20:24] = GREEN  # a hole in red and an island of green
    cleaned = SamAutomaticMaskGenerator(ToySam(), **SETTINGS, min_mask_region_area=100).generate(image)
    assert min(matches(cleaned)) > 0.95
    raw = SamAutomaticMaskGenerator(ToySam(), **SETTINGS).generate(image)
    assert min(matches(raw)[:2]) < min(matches(cleaned)[:2])
    for record in cleaned:
        assert record["area"] == record["segmentation"].sum()
        rows, columns = np.nonzero(record["segmentation"])
        assert record["bbox"][:2] == [columns.min(), rows.min()]
    assert (
        SamAutomaticMaskGenerator(ToySam(), **{**SETTINGS, "pred_iou_thresh": 0.99}, min_mask_region_area=9).generate(
            image
        )
        == []
    )


def test_a_real_model() -> None:
    """With rule-made weights nothing is recognised; what comes out is well-formed."""
    generator = SamAutomaticMaskGenerator(
        small_l0(), points_per_side=2, pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1.0
    )
    records = generator.generate(toy_image())
    assert 0 < len(records) <= 12
    assert all(record["segmentation"].shape == (96, 128) for record in records)
    assert len({tuple(record["point_coords"][0]) for record in records}) == 4


@pytest.mark.parametrize(
    ("package", "settings"),
    [
        ("torchvision", {}),
        ("scipy", {"min_mask_region_area": 10}),
        ("pycocotools", {"output_mode": "coco_rle"}),
    ],
)
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, package: str, settings: dict[str, Any]) -> None:
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"needs {package}, which cannot be imported: pip install {package}"):
        SamAutomaticMaskGenerator(ToySam(), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points_per_side": 0}, "points_per_side must be positive, got 0"),
        ({"points_per_batch": 0}, "points_per_batch must be positive, got 0"),
        ({"crop_n_layers": -1}, "crop_n_layers must be at least 0, got -1"),
        ({"crop_n_layers": 1, "crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor must be positive"),
        (
            {"output_mode": "polygon"},
            "output_mode must be one of binary_mask, uncompressed_rle, coco_rle, got 'polygon'",
        ),
        ({"points_per_side": None}, "points_per_side or point_grids must be given, one of them, got neither"),
        ({"point_grids": [np.zeros((1, 2))]}, "points_per_side or point_grids must be given, one of them, got both"),
        (
            {"points_per_side": None, "point_grids": [np.zeros(2)]},
            r"point_grids must be 1 arrays \[N, 2\].*, got \[\[2\]\]",
        ),
    ],
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^SamAutomaticMaskGenerator: {message}"):
        SamAutomaticMaskGenerator(ToySam(), **settings)


def test_images_that_are_not() -> None:
    generator = SamAutomaticMaskGenerator(ToySam(), **SETTINGS)
    with pytest.raises(
        TypeError, match=r"^SamAutomaticMaskGenerator.generate: image must be of dtype uint8, got float32"
    ):
        generator.generate(toy_image().astype(np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"image must be \[H > 0, W > 0, 3\], got \[96, 128\]"):
        generator.generate(toy_image()[..., 0])
