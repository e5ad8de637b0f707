"""The predictor: what it computes, what it takes, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from efficientvit_kernels.models.sam import SamPredictor
from efficientvit_kernels.models.sam.transforms import ResizeLongestSide, resized_size
from tests.models.sam_common import BLUE, GREEN, RED, ToySam, colour_mask, mask_prompt, overlap, small_l0, toy_image

pytestmark = pytest.mark.usefixtures("one_thread")

POINT, LABEL = np.array([[30.0, 25.0]]), np.array([1])
IMAGE = np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture
def toy() -> SamPredictor:
    predictor = SamPredictor(ToySam())
    predictor.set_image(toy_image())
    return predictor


@torch.no_grad()
def test_predict_is_the_published_sequence() -> None:
    """Resize, normalise, pad; prompts scaled to the frame of 1024; masks enlarged to it, cropped, resized, cut at 0."""
    model = small_l0()
    predictor = SamPredictor(model)
    predictor.set_image(IMAGE)
    resized = np.array(Image.fromarray(IMAGE).resize((128, 96), Image.Resampling.BILINEAR))
    x = torch.from_numpy(resized).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor([123.675, 116.28, 103.53]) / 255, torch.tensor([58.395, 57.12, 57.375]) / 255
    x = F.pad((x - mean.view(3, 1, 1)) / std.view(3, 1, 1), (0, 0, 0, 32))
    embedding = model.image_encoder(x[None])
    torch.testing.assert_close(predictor.get_image_embedding(), embedding, rtol=0, atol=2e-4)

    coords, labels, box = np.array([[10.0, 20.0], [60.5, 3.0]]), np.array([1, 0]), np.array([5.0, 6.0, 40.0, 30.0])
    mask_input = mask_prompt()[0].numpy()
    logits, ious, low_res = predictor.predict(coords, labels, box, mask_input, return_logits=True)
    points = (torch.from_numpy(coords * 16).float()[None], torch.from_numpy(labels)[None])
    expected, expected_ious = model.decode(
        embedding, points, torch.from_numpy(box * 16).float()[None], mask_prompt()[:1], True
    )
    # Two float32 runs whose inputs differ by roundings.
    atol = 1e-4 * float(expected.std())
    np.testing.assert_allclose(low_res, expected[0], rtol=0, atol=atol)
    np.testing.assert_allclose(ious, expected_ious[0], rtol=0, atol=1e-4)
    frame = F.interpolate(expected, (1024, 1024), mode="bilinear", align_corners=False)[..., :768, :]
    enlarged = F.interpolate(frame, (48, 64), mode="bilinear", align_corners=False)[0].numpy()
    np.testing.assert_allclose(logits, enlarged, rtol=0, atol=atol)
    masks, _, _ = predictor.predict(coords, labels, box, mask_input)
    assert masks.dtype == np.bool_
    np.testing.assert_array_equal(masks, logits > 0)
    assert (logits.dtype, ious.dtype, low_res.dtype) == (np.float32, np.float32, np.float32)


def test_one_mask_or_three(toy: SamPredictor) -> None:
    masks, ious, low_res = toy.predict(POINT, LABEL)
    assert (masks.shape, ious.shape, low_res.shape) == ((3, 96, 128), (3,), (3, 256, 256))
    masks, ious, low_res = toy.predict(POINT, LABEL, multimask_output=False)
    assert (masks.shape, ious.shape, low_res.shape) == ((1, 96, 128), (1,), (1, 256, 256))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("point", "colour"), [((30, 25), RED), ((40, 80), GREEN), ((120, 50), BLUE)])
def test_masks_lie_where_the_object_is(point: tuple[int, int], colour: tuple[int, int, int], flip: bool) -> None:
    """In landscape and in portrait format, the image given as a view."""
    image = toy_image().transpose(1, 0, 2) if flip else toy_image()
    predictor = SamPredictor(ToySam())
    predictor.set_image(image)
    masks, _, _ = predictor.predict(np.array([point[::-1] if flip else point]), LABEL)
    assert overlap(masks[0], colour_mask(image, colour)) > 0.95


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (700, 3), (1024, 1024), (513, 100)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    predictor = SamPredictor(ToySam())
    predictor.set_image(np.full((*size, 3), RED, dtype=np.uint8))
    row, column = size[0] // 2, size[1] // 2
    masks, _, _ = predictor.predict(np.array([[column, row]]), LABEL)
    assert masks.shape == (3, *size)
    assert masks[0, row, column]
    assert masks[0].mean() > 0.6  # three columns are one and a half cells of a low-resolution mask


def test_channel_orders(toy: SamPredictor) -> None:
    embedding = toy.get_image_embedding().clone()
    toy.set_image(toy_image()[..., ::-1], image_format="BGR")
    assert torch.equal(toy.get_image_embedding(), embedding)
    toy.set_image(toy_image()[..., ::-1])
    assert not torch.equal(toy.get_image_embedding(), embedding)


def test_the_image_is_left_as_it_is() -> None:
    image = np.full((512, 512, 3), RED, dtype=np.uint8)  # needs no resizing
    image.flags.writeable = False
    predictor = SamPredictor(ToySam())
    predictor.set_image(image)
    assert (image == RED).all()


def test_predict_torch_takes_many_objects(toy: SamPredictor) -> None:
    points = torch.tensor([[[30.0, 25.0]], [[40.0, 80.0]], [[120.0, 50.0]]])
    coords = toy.transform.apply_coords_torch(points, (96, 128))
    masks, ious, low_res = toy.predict_torch(coords, torch.ones(3, 1))
    assert (list(masks.shape), list(ious.shape), list(low_res.shape)) == ([3, 3, 96, 128], [3, 3], [3, 3, 256, 256])
    for mask, colour in zip(masks[:, 0], (RED, GREEN, BLUE), strict=True):
        assert overlap(mask.numpy(), colour_mask(toy_image(), colour)) > 0.95
    logits, _, _ = toy.predict_torch(coords, torch.ones(3, 1), return_logits=True)
    assert torch.equal(logits > 0, masks)
    assert not logits.requires_grad


def test_transforms_agree() -> None:
    transform = ResizeLongestSide(1024)
    coords, boxes = np.array([[3.0, 4.0], [30.0, 40.0]]), np.array([[3.0, 4.0, 30.0, 40.0]])
    size = (333, 500)
    expected = coords * [1024 / 500, 682 / 333]
    np.testing.assert_allclose(transform.apply_coords(coords, size), expected)
    np.testing.assert_allclose(transform.apply_boxes(boxes, size), expected.reshape(1, 4))
    np.testing.assert_allclose(transform.apply_coords_torch(torch.tensor(coords), size), expected)
    np.testing.assert_allclose(transform.apply_boxes_torch(torch.tensor(boxes), size), expected.reshape(1, 4))
    assert resized_size(17, 10000, 512) == (1, 512)
    assert resized_size(10000, 1, 512) == (512, 1)
    assert resized_size(333, 500, 1024) == (682, 1024)


def test_reset(toy: SamPredictor) -> None:
    assert toy.is_image_set
    assert (toy.original_size, toy.input_size) == ((96, 128), (768, 1024))
    toy.reset_image()
    assert not toy.is_image_set
    for call in (toy.get_image_embedding, toy.predict, lambda: toy.predict_torch(None, None)):
        with pytest.raises(RuntimeError, match="an image must be set with set_image first, got none"):
            call()


def test_a_failed_set_image_leaves_no_old_image_behind_or_the_old_one_whole(toy: SamPredictor) -> None:
    with pytest.raises(TypeError):
        toy.set_image(toy_image().astype(np.float32))  # type: ignore[arg-type]
    assert toy.is_image_set
    toy.model.image_encoder.forward = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        toy.set_image(toy_image())
    assert not toy.is_image_set


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_in_other_dtypes(dtype: torch.dtype) -> None:
    predictor = SamPredictor(ToySam().to(dtype))
    predictor.set_image(toy_image())
    assert predictor.get_image_embedding().dtype == dtype
    masks, ious, low_res = predictor.predict(POINT, LABEL)
    assert (masks.dtype, ious.dtype, low_res.dtype) == (np.bool_, np.float32, np.float32)
    assert overlap(masks[0], colour_mask(toy_image(), RED)) > 0.95


ERRORS: list[tuple[type[Exception], Callable[[SamPredictor], object], str]] = [
    (TypeError, lambda p: p.set_image([[1]]), "set_image: image must be a NumPy array, got list"),
    (TypeError, lambda p: p.set_image(np.zeros((4, 4, 3))), "set_image: image must be of dtype uint8, got float64"),
    (ValueError, lambda p: p.set_image(np.zeros((4, 4), np.uint8)), r"image must be \[H > 0, W > 0, 3\], got \[4, 4\]"),
    (ValueError, lambda p: p.set_image(np.zeros((4, 4, 4), np.uint8)), r"image must be .*, got \[4, 4, 4\]"),
    (ValueError, lambda p: p.set_image(np.zeros((0, 4, 3), np.uint8)), r"image must be .*, got \[0, 4, 3\]"),
    (ValueError, lambda p: p.set_image(toy_image(), "GBR"), "image_format must be one of RGB, BGR, got 'GBR'"),
    (ValueError, lambda p: p.predict(POINT), "point_labels must be given with its counterpart, got None"),
    (ValueError, lambda p: p.predict(None, LABEL), "point_coords must be given with its counterpart, got None"),
    (ValueError, lambda p: p.predict_torch(None, torch.ones(1, 1)), "point_coords must be given with its counterpart"),
    (ValueError, lambda p: p.predict(POINT[0], LABEL), r"point_coords must be \[N > 0, 2\], got \[2\]"),
    (ValueError, lambda p: p.predict(POINT[:0], LABEL[:0]), r"point_coords must be \[N > 0, 2\], got \[0, 2\]"),
    (ValueError, lambda p: p.predict(POINT, np.array([1, 0])), r"point_labels must be \[1\], got \[2\]"),
    (ValueError, lambda p: p.predict(POINT, np.array([7])), r"point_labels must be 1, 0 or -1 \(padding\), got \[7\]"),
    (ValueError, lambda p: p.predict(np.array([[np.nan, 1]]), LABEL), "point_coords must be finite, got"),
    (ValueError, lambda p: p.predict(box=np.zeros((2, 2))), r"box must be \[4\], got \[2, 2\]"),
    (ValueError, lambda p: p.predict(box=np.array([0, 0, np.inf, 1])), "box must be finite, got"),
    (
        ValueError,
        lambda p: p.predict(mask_input=np.zeros((1, 64, 64))),
        r"mask_input must be \[1, 256, 256\], got \[1, 64, 64\]",
    ),
]


@pytest.mark.parametrize(("error", "call", "message"), ERRORS)
def test_errors(toy: SamPredictor, error: type[Exception], call: Callable[[Any], object], message: str) -> None:
    with pytest.raises(error, match=f"^SamPredictor.*{message}"):
        call(toy)


def test_training_mode(toy: SamPredictor) -> None:
    assert not toy.model.training
    toy.model.train()
    with pytest.raises(ValueError, match="model must be in eval mode, got training mode"):
        toy.set_image(toy_image())
