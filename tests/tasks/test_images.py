"""Reading images of every mode and orientation; damaged ones; writing."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from efficientvit_kernels._files import written_whole
from efficientvit_kernels.tasks.images import ImageError, read_image, save_png
from tests.tasks.pictures import Image, noise, read, write

# Where the top-left corner of the upright picture lies in the file, as (last row?, last column?), and whether rows and
# columns are exchanged: the EXIF standard's table of orientations.
STORED = {
    1: (False, False, False),
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    """The upright picture is 48 x 32 with a red corner top left and a green one top right."""
    upright = np.full((32, 48, 3), 255, dtype=np.uint8)
    upright[:8, :8], upright[:8, -8:] = (255, 0, 0), (0, 255, 0)
    last_row, last_column, exchanged = STORED[orientation]
    stored = upright.swapaxes(0, 1) if exchanged else upright
    stored = stored[:: -1 if last_row else 1, :: -1 if last_column else 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    quality = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **quality)
    found = read_image(path)
    assert found.shape == (32, 48, 3)
    # JPEG is lossy: 8 x 8 blocks of one colour come back within a few levels.
    np.testing.assert_allclose(found.astype(int), upright, atol=8 if suffix == "jpg" else 0)


def test_modes_of_8_bits(tmp_path: Path) -> None:
    rgb = noise(5, 7)
    grey = rgb[..., 0]
    for name, image, expected in (
        ("rgb.png", Image.fromarray(rgb), rgb),
        ("grey.png", Image.fromarray(grey), np.stack([grey] * 3, axis=2)),
        ("bits.png", Image.fromarray(grey > 99), np.stack([(grey > 99) * 255] * 3, axis=2)),
        ("palette.png", Image.fromarray(rgb // 128 * 255).quantize(8), rgb // 128 * 255),
        ("rgb.gif", Image.fromarray(rgb // 128 * 255), rgb // 128 * 255),
        ("rgb.ppm", Image.fromarray(rgb), rgb),
    ):
        image.save(tmp_path / name)
        found = read_image(tmp_path / name)
        assert (found.dtype, found.flags.writeable) == (np.uint8, True)
        np.testing.assert_array_equal(found, expected, err_msg=name)


def test_alpha_lies_on_white(tmp_path: Path) -> None:
    alpha = np.array([[0, 51, 255]], dtype=np.uint8)  # absent, a fifth, whole
    colour = np.array([[[100, 50, 0]] * 3], dtype=np.uint8)
    Image.fromarray(np.concatenate([colour, alpha[..., None]], axis=2), "RGBA").save(tmp_path / "rgba.png")
    expected = [[[255, 255, 255], [224, 214, 204], [100, 50, 0]]]  # 255 + alpha / 255 (colour - 255)
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), expected)
    Image.fromarray(np.stack([colour[..., 0], alpha], axis=2), "LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "la.png"), [[[255] * 3, [224] * 3, [100] * 3]])
    Image.fromarray(colour).quantize(2).save(tmp_path / "palette.png", transparency=bytes([51] * 2))
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), [[[224, 214, 204]] * 3])
    Image.fromarray(colour).save(tmp_path / "key.png", transparency=(100, 50, 0))
    np.testing.assert_array_equal(read_image(tmp_path / "key.png"), np.full((1, 3, 3), 255))


def test_deep_and_other_modes(tmp_path: Path) -> None:
    deep = np.array([[0, 128, 129, 32896, 65535]], dtype=np.uint16)
    for suffix in ("png", "tif"):
        Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
        np.testing.assert_array_equal(read_image(tmp_path / f"deep.{suffix}")[0, :, 0], [0, 0, 1, 128, 255])
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "float.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "float.tif")[0, :, 1], [0, 128, 255])
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for suffix in ("tif", "jpg"):
        cmyk.save(tmp_path / f"cmyk.{suffix}")
        np.testing.assert_allclose(read_image(tmp_path / f"cmyk.{suffix}")[8, 8].astype(int), (255, 0, 0), atol=2)


def test_values_without_a_meaning(tmp_path: Path) -> None:
    for name, values in (
        ("float.tif", np.array([[0.0, 1.5]], dtype=np.float32)),
        ("nan.tif", np.array([[0.0, np.nan]], dtype=np.float32)),
        ("negative.tif", np.array([[-1, 5]], dtype=np.int32)),
        ("long.tif", np.array([[0, 70000]], dtype=np.int32)),
    ):
        with pytest.raises(ImageError, match=f"{name}: cannot be read: .* grey values must be .*, got "):
            read_image(write(tmp_path / name, values))


def test_damaged_exif_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.new("RGB", (9, 5), (1, 2, 3)).save(path, exif=b"Exif\0\0" + b"\xff" * 40)
    assert read_image(path).shape == (5, 9, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    whole = write(tmp_path / f"whole.{suffix}", noise(64, 64)).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for share in (0.2, 0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ImageError, match=rf"cut\.{suffix}: (cannot be read|is not an image)"):
            read_image(path)


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    for name, cause in (
        ("empty.png", "is empty"),
        ("text.png", "is not an image of a known format"),
        ("nowhere.png", "does not exist"),
    ):
        with pytest.raises(ImageError, match=f"{name}: {cause}$") as caught:
            read_image(tmp_path / name)
        copied = pickle.loads(pickle.dumps(caught.value))
        assert (copied.path, copied.cause, str(copied)) == (tmp_path / name, cause, str(caught.value))
    with pytest.raises(ImageError, match=r"cannot be read: .*directory"):
        read_image(tmp_path)


def test_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More pixels than Pillow allows, twice over, are refused before they are unfolded."""
    path = write(tmp_path / "large.png", noise(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(ImageError, match="exceeds limit"):
        read_image(path)


def test_writing(tmp_path: Path) -> None:
    pixels = noise(3, 4)
    save_png(pixels[::-1], tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), pixels[::-1])
    save_png(pixels[..., 0] > 99, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "1"
        np.testing.assert_array_equal(np.array(image), pixels[..., 0] > 99)
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(AttributeError), written_whole(tmp_path / "a.png") as temporary:
        Image.fromarray(pixels).save(temporary.open("wb"), format="PNG").close()  # written, and then an error
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
