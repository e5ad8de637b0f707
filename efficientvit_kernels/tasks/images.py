"""Image files to RGB pixels, whatever their mode, and pixels to PNG files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._files import written_whole
from .._optional import require

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]  # [H, W, 3], RGB

WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
ORIENTATION = 0x0112  # the tag of the EXIF standard, and what undoes each of its values
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class ImageError(ValueError):
    """A file that is no readable image; the message names the file and the cause."""

    def __init__(self, path: str | os.PathLike[str], cause: str) -> None:
        super().__init__(f"{shown(path)}: {cause}")
        self.path, self.cause = Path(path), cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.cause)


def shown(path: str | os.PathLike[str]) -> str:
    """The path as text that can always be printed; bytes that are no UTF-8 appear as question marks."""
    return os.fsencode(path).decode("utf-8", "replace")


def read_image(path: str | os.PathLike[str]) -> Pixels:
    """The pixels of an image file, upright, as RGB uint8 [H, W, 3].

    The EXIF orientation is applied. Transparent pixels are laid on white, as a viewer shows them. 16-bit grey is
    divided by 257; floating-point grey must be in [0, 1]. Of an animation the first frame is read. Colour profiles are
    ignored: values are taken for sRGB, as in the datasets that the models were trained on.

    Raises:
        ImageError: missing, empty, damaged or truncated file, unknown format or mode.
        ImportError: Pillow is missing.
    """
    pil = require("PIL.Image", "read_image")
    try:
        with pil.open(path) as opened:
            opened.load()
            return np.array(_to_rgb(_upright(opened)), dtype=np.uint8)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(path, "does not exist") from error
    except Exception as error:  # Pillow's formats raise a dozen classes on damaged data
        raise ImageError(path, _cause(path, error)) from error


def _cause(path: str | os.PathLike[str], error: Exception) -> str:
    pil = require("PIL", "read_image")
    if isinstance(error, pil.UnidentifiedImageError):
        return "is empty" if os.path.getsize(path) == 0 else "is not an image of a known format"
    words = str(error).splitlines()
    return f"cannot be read: {words[0] if words else type(error).__name__}"


def _upright(image: Image) -> Image:
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata says nothing about the pixels
        return image
    if orientation not in UPRIGHT:
        return image
    transpose = require("PIL.Image", "read_image").Transpose
    return image.transpose(transpose[UPRIGHT[orientation]])


def _to_rgb(image: Image) -> Image:
    pil = require("PIL.Image", "read_image")
    if image.mode.startswith("I"):
        image = pil.fromarray(_grey_of_16_bits(np.asarray(image)))
    elif image.mode == "F":
        image = pil.fromarray(_grey_of_floats(np.asarray(image)))
    elif image.mode in WITH_ALPHA or "transparency" in image.info:
        white = pil.new("RGBA", image.size, (255, 255, 255, 255))
        image = pil.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _grey_of_16_bits(values: npt.NDArray[Any]) -> Pixels:
    values = values.astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"integer grey values must be of 16 bits, got {values.min()} to {values.max()}")
    return ((values + 128) // 257).astype(np.uint8)


def _grey_of_floats(values: npt.NDArray[np.float32]) -> Pixels:
    if not (values.min() >= 0 and values.max() <= 1):  # written so that NaN fails
        raise ValueError(f"floating-point grey values must be in [0, 1], got {values.min()} to {values.max()}")
    return np.rint(values * 255).astype(np.uint8)


def to_pillow(pixels: npt.NDArray[Any]) -> Image:
    """A Pillow image of uint8 [H, W, 3] or [H, W], or of a mask, bool [H, W], with one bit per pixel."""
    image: Image = require("PIL.Image", "to_pillow").fromarray(np.ascontiguousarray(pixels))
    return image


def save_png(image: npt.NDArray[Any] | Image, path: Path) -> None:
    """Writes a PNG file that appears whole or not at all."""
    picture = to_pillow(image) if isinstance(image, np.ndarray) else image
    with written_whole(path) as temporary:
        picture.save(temporary, format="PNG")
