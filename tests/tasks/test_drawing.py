"""Names and colours of classes, legends, tints."""

from __future__ import annotations

import numpy as np

from efficientvit_kernels.tasks import palettes
from efficientvit_kernels.tasks.class_names import ADE20K, CITYSCAPES
from efficientvit_kernels.tasks.drawing import beside, draw_prompts, tint, tint_mask
from tests.tasks.pictures import noise


def test_names_and_palettes() -> None:
    assert (len(CITYSCAPES), len(set(CITYSCAPES))) == (19, 19)
    assert (len(ADE20K), len(set(ADE20K))) == (150, 150)
    assert (CITYSCAPES[0], CITYSCAPES[13], CITYSCAPES[18]) == ("road", "car", "bicycle")
    assert (ADE20K[0], ADE20K[2], ADE20K[12], ADE20K[149]) == ("wall", "sky", "person", "flag")
    for count in (0, 1, 19, 150, 256):
        palette = palettes.generated_palette(count)
        assert (palette.shape, palette.dtype) == ((count, 3), np.uint8)
        assert len(np.unique(palette, axis=0)) == count
    distances = np.linalg.norm(
        palettes.generated_palette(150)[:, None].astype(float) - palettes.generated_palette(150), axis=2
    )
    assert distances[~np.eye(150, dtype=bool)].min() >= 15
    np.testing.assert_array_equal(palettes.palette_of("cityscapes", 19)[13], (0, 0, 142))
    np.testing.assert_array_equal(palettes.palette_of("ade20k", 150), palettes.generated_palette(150))


def test_drawing() -> None:
    np.testing.assert_array_equal(
        tint(np.array([[[0, 255, 10]]], np.uint8), np.array([[[255, 255, 13]]], np.uint8)), [[[128, 255, 12]]]
    )
    image = noise(400, 30)
    picture = np.array(beside(image, [((1, 2, 3), "a name"), ((200, 100, 0), "another")]))
    np.testing.assert_array_equal(picture[:, :30], image)
    legend = picture[:, 30:]
    first, second = ((legend == colour).all(axis=2).nonzero()[0] for colour in ((1, 2, 3), (200, 100, 0)))
    assert first.max() < second.min()
    assert ((legend < 100).all(axis=2)[:, 40:]).any()  # letters
    assert np.array(beside(noise(1, 1), [((1, 2, 3), "x")] * 30)).shape[0] > 30 * 12  # all of them are to be seen


def test_masks_and_prompts() -> None:
    image, mask = np.full((20, 30, 3), 100, dtype=np.uint8), np.zeros((20, 30), dtype=bool)
    mask[5:15, 10:20] = True
    picture = image.copy()
    tint_mask(picture, mask, np.array((200, 0, 50), dtype=np.uint8))
    np.testing.assert_array_equal(picture[~mask], image[~mask])
    np.testing.assert_array_equal(picture[6:14, 11:19], np.broadcast_to((150, 50, 75), (8, 8, 3)))
    assert (picture == (200, 0, 50)).all(axis=2).sum() == 100 - 64  # the border
    drawn = draw_prompts(image, [(5, 6, 1), (25, 6, 0)], (1, 10, 28, 18))
    assert [drawn[y, x].tolist() for y, x in ((6, 5), (6, 25), (10, 15), (14, 15))] == [
        [0, 200, 0], [220, 0, 0], [0, 200, 0], [100] * 3,
    ]  # fmt: skip
