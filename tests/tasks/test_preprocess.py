"""The official rules of preprocessing, against values worked out by hand and against formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from efficientvit_kernels.tasks import preprocess as pre
from tests.tasks.pictures import noise


def test_normalise() -> None:
    x = pre.normalise(torch.tensor([0.0, 127.5, 255.0]).view(1, 3, 1, 1))
    # (0 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225
    torch.testing.assert_close(x.flatten(), torch.tensor([-2.117904, 0.196429, 2.64]), rtol=0, atol=1e-6)


def test_pixels_and_tensors() -> None:
    pixels = noise(3, 5)
    x = pre.pixels_to_tensor(pixels)
    assert (x.shape, x.dtype) == ((1, 3, 3, 5), torch.float32)
    assert x[0, 2, 1, 4] == pixels[1, 4, 2]
    np.testing.assert_array_equal(pre.tensor_to_pixels(x / 255), pixels)
    clamped = pre.tensor_to_pixels(torch.tensor([-0.1, 0.501, 1.2]).view(1, 3, 1, 1))
    np.testing.assert_array_equal(clamped, [[[0, 128, 255]]])


def test_classification_crops_the_middle() -> None:
    """320 x 240 at size 224 and ratio 0.95: resized to 314 x 236, then the square from (45, 6) on is cut out."""
    columns = np.broadcast_to(np.arange(320) * 0.75, (240, 320))
    rows = np.broadcast_to(np.arange(240)[:, None], (240, 320))
    pixels = np.stack([columns, rows, np.full((240, 320), 7)], axis=2).round().astype(np.uint8)
    x = pre.classification_input(pixels, 224, 0.95)
    assert x.shape == (1, 3, 224, 224)
    mean, std = torch.tensor(pre.IMAGENET_MEAN).view(3, 1, 1), torch.tensor(pre.IMAGENET_STD).view(3, 1, 1)
    back = (x[0] * std + mean) * 255
    # The middle of output pixel i is at (i + offset + 0.5) * scale - 0.5 of the input.
    where_x = ((np.arange(224) + 45 + 0.5) * 320 / 314 - 0.5) * 0.75
    where_y = (np.arange(224) + 6 + 0.5) * 240 / 236 - 0.5
    # One level for the rounding of the ramp, one for that of the result.
    np.testing.assert_allclose(back[0, 100], where_x, atol=1.5)
    np.testing.assert_allclose(back[1, :, 100], where_y, atol=1.5)
    np.testing.assert_allclose(back[2], 7, atol=1e-3)


@pytest.mark.parametrize("size", [(300, 400), (411, 233), (17, 1000), (1, 1), (224, 224), (223, 225)])
@pytest.mark.parametrize(("side", "ratio"), [(224, 0.95), (224, 1.0), (288, 1.0)])
def test_classification_is_torchvisions(size: tuple[int, int], side: int, ratio: float) -> None:
    """The official evaluation is this chain of torchvision's transforms."""
    transforms = pytest.importorskip(
        "torchvision.transforms", reason="torchvision comes with timm, in the extra `demo`"
    )
    from PIL import Image

    chain = transforms.Compose(
        [
            transforms.Resize(math.ceil(side / ratio), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(pre.IMAGENET_MEAN, pre.IMAGENET_STD),
        ]
    )
    pixels = noise(*size)
    torch.testing.assert_close(
        pre.classification_input(pixels, side, ratio)[0], chain(Image.fromarray(pixels)), rtol=0, atol=1e-6
    )


def test_long_strips_cost_little() -> None:
    """The whole, resized, would have 224 x 22.4 million pixels."""
    for shape in ((1, 100000, 3), (100000, 1, 3)):
        pixels = np.zeros(shape, dtype=np.uint8)
        pixels.reshape(-1, 3)[49900:50100] = 255  # the middle
        x = pre.classification_input(pixels, 224)
        torch.testing.assert_close(x[0, 0], torch.full((224, 224), (1 - 0.485) / 0.229))


@pytest.mark.parametrize(
    ("dataset", "size", "expected"),
    [
        ("cityscapes", (1024, 2048), (1024, 2048)),
        ("cityscapes", (3, 7), (1024, 2048)),
        ("ade20k", (512, 512), (512, 512)),
        ("ade20k", (300, 400), (512, 704)),  # 682.67 -> 704
        ("ade20k", (400, 300), (704, 512)),
        ("ade20k", (768, 1024), (512, 704)),
        ("ade20k", (100, 200), (512, 1024)),
        ("ade20k", (1, 1), (512, 512)),
        ("ade20k", (17, 10000), (512, 301184)),  # 301176.47 -> 301184
    ],
)
def test_segmentation_size(dataset: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert pre.segmentation_size(dataset, *size) == expected


def cubic_matrix(size: int, new: int) -> npt.NDArray[Any]:
    """Keys' cubic convolution with a = -0.75, four taps, edges repeated: OpenCV's definition."""
    a, matrix = -0.75, np.zeros((new, size))
    for row in range(new):
        centre = (row + 0.5) * size / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - tap)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[row, min(max(tap, 0), size - 1)] += near if d <= 1 else far
    return matrix


@pytest.mark.parametrize(("size", "new"), [((5, 7), (32, 64)), ((40, 33), (32, 32)), ((1, 1), (4, 4))])
def test_resize_cubic(size: tuple[int, int], new: tuple[int, int]) -> None:
    pixels = noise(*size)
    found = pre.resize_cubic(pre.pixels_to_tensor(pixels), new)[0].permute(1, 2, 0).numpy()
    exact = np.einsum("hy,yxc,wx->hwc", cubic_matrix(size[0], new[0]), pixels, cubic_matrix(size[1], new[1]))
    np.testing.assert_array_equal(found, found.round())
    # Rounded to whole levels: half a level, and float32's error before it.
    np.testing.assert_allclose(found, exact.clip(0, 255), atol=0.501)


def test_padding() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert pre.pad_to_multiple(x, 1) is x
    np.testing.assert_array_equal(pre.pad_to_multiple(x, 4)[0, 0], [[0, 1, 2, 0], [3, 4, 5, 0], [0] * 4, [0] * 4])
    np.testing.assert_array_equal(
        pre.pad_to_multiple(x, 4, "replicate")[0, 0], [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]]
    )
    assert pre.pad_to_multiple(torch.ones(1, 3, 1, 1), 32, "replicate").sum() == 3 * 32 * 32
