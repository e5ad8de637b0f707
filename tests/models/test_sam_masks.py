"""Binary masks and crops: run lengths, boxes, stability, small regions, where crops lie."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from efficientvit_kernels import _optional as optional
from efficientvit_kernels.models.sam.binary_masks import (
    area_of_runs,
    compress_runs,
    decode_runs,
    encode_runs,
    mask_boxes,
    remove_small_regions,
    stability_scores,
)
from efficientvit_kernels.models.sam.crops import crop_boxes, cut_by_crop, point_grid

RANDOM = np.random.default_rng(0)
MASKS = {
    "empty": np.zeros((3, 4), bool),
    "full": np.ones((3, 4), bool),
    "one pixel": np.ones((1, 1), bool),
    "no pixel": np.zeros((0, 5), bool),
    "row": RANDOM.random((1, 40)) > 0.5,
    "column": RANDOM.random((40, 1)) > 0.5,
    "noise": RANDOM.random((37, 23)) > 0.7,
}


@pytest.mark.parametrize("name", MASKS)
def test_run_lengths(name: str) -> None:
    mask = MASKS[name]
    runs = encode_runs(mask)
    assert runs["size"] == list(mask.shape)
    assert sum(runs["counts"]) == mask.size
    assert all(count > 0 for count in runs["counts"][1:])
    assert area_of_runs(runs) == mask.sum()
    np.testing.assert_array_equal(decode_runs(runs), mask)


def test_run_lengths_go_down_the_columns() -> None:
    mask = np.array([[0, 1, 1], [0, 1, 0]], bool)
    assert encode_runs(mask) == {"size": [2, 3], "counts": [2, 3, 1]}
    assert encode_runs(~mask) == {"size": [2, 3], "counts": [0, 2, 3, 1]}


@pytest.mark.skipif(find_spec("pycocotools") is None, reason="pycocotools is not installed")
def test_compressed_runs() -> None:
    coco = optional.require("pycocotools.mask", "the test")
    for mask in (MASKS["noise"], MASKS["empty"], MASKS["full"]):
        compressed = compress_runs(encode_runs(mask))
        assert isinstance(compressed["counts"], str)
        np.testing.assert_array_equal(coco.decode(compressed).astype(bool), mask)


def test_boxes() -> None:
    masks = torch.zeros(4, 20, 30, dtype=torch.bool)
    masks[0, 3:8, 5:21] = True
    masks[1, 19, 29] = True
    masks[2] = True
    assert mask_boxes(masks).tolist() == [[5, 3, 20, 7], [29, 19, 29, 19], [0, 0, 29, 19], [0, 0, 0, 0]]
    assert list(mask_boxes(masks[:0]).shape) == [0, 4]


def test_stability() -> None:
    logits = torch.tensor([[[-3.0, -0.5, 0.5, 3.0]], [[3.0, 3.0, 3.0, -3.0]], [[-3.0, -3.0, -3.0, -3.0]]])
    assert stability_scores(logits, 0.0, 1.0).tolist() == pytest.approx([1 / 3, 1.0, 0.0])
    assert stability_scores(logits, 0.75, 0.5).tolist() == pytest.approx([0.5, 1.0, 0.0])
    assert stability_scores(logits[:0], 0.0, 1.0).tolist() == []


@pytest.mark.skipif(find_spec("scipy") is None, reason="scipy is not installed")
def test_small_regions() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:12, 2:12] = True
    untouched, changed = remove_small_regions(mask, 10)
    assert not changed
    np.testing.assert_array_equal(untouched, mask)
    spoiled = mask.copy()
    spoiled[5, 5] = spoiled[6, 6] = False  # one hole of two pixels, joined at a corner
    spoiled[15, 15] = spoiled[16, 16] = spoiled[17, 15] = True  # one island of three
    for area, result in ((2, spoiled), (3, spoiled | mask), (4, mask)):
        cleaned, changed = remove_small_regions(spoiled, area)
        np.testing.assert_array_equal(cleaned, result)
        assert changed == (area > 2)
    # Of islands that are all too small the largest stays; nothing comes of nothing.
    np.testing.assert_array_equal(remove_small_regions(spoiled & ~mask, 390)[0], spoiled & ~mask)
    assert not remove_small_regions(np.zeros((20, 20), bool), 10)[0].any()


def test_point_grid() -> None:
    assert point_grid(1).tolist() == [[0.5, 0.5]]
    assert point_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


def test_crop_boxes() -> None:
    assert crop_boxes((90, 120), 0, 0.3) == [((0, 0, 120, 90), 0)]
    # Overlap 0.3 * 90 = 27; widths (27 + 120) / 2 and (27 + 90) / 2, rounded up.
    expected = [(0, 0, 74, 59), (0, 32, 74, 90), (47, 0, 120, 59), (47, 32, 120, 90)]
    assert crop_boxes((90, 120), 1, 0.3) == [((0, 0, 120, 90), 0), *((box, 1) for box in expected)]
    crops = crop_boxes((333, 500), 2, 512 / 1500)
    assert [layer for _, layer in crops] == [0] + 4 * [1] + 16 * [2]
    for layer in (1, 2):
        covered = np.zeros((333, 500), bool)
        for (x0, y0, x1, y1), of in crops:
            if of == layer:
                covered[y0:y1, x0:x1] = True
        assert covered.all()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3)])
def test_crops_of_few_pixels_are_not_empty(size: tuple[int, int]) -> None:
    for (x0, y0, x1, y1), _ in crop_boxes(size, 2, 512 / 1500):
        assert 0 <= x0 < x1 <= size[1]
        assert 0 <= y0 < y1 <= size[0]


def test_boxes_that_a_crop_cuts() -> None:
    boxes = torch.tensor([[0, 0, 50, 50], [30, 0, 99, 50], [30, 30, 50, 50], [30, 0, 50, 99]])
    # The crop's left and top edges are the image's.
    assert cut_by_crop(boxes, (0, 0, 100, 100), (200, 300)).tolist() == [False, True, False, True]
    assert cut_by_crop(boxes, (100, 50, 200, 150), (200, 300)).tolist() == [True, True, False, True]
    assert cut_by_crop(boxes, (0, 0, 100, 100), (100, 100)).tolist() == [False] * 4


def test_a_missing_package_is_named() -> None:
    with pytest.raises(
        ImportError, match=r"^the mask needs no_such_package, which cannot .*: pip install no_such_package"
    ):
        optional.require("no_such_package.part", "the mask")
