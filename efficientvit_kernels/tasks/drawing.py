"""Pictures of results: colours over an image, and what they mean beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .._optional import require
from .images import Pixels, to_pillow

Colour = tuple[int, int, int]
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def tint(pixels: Pixels, colours: Pixels) -> Pixels:
    """The mean of both, uint8 [H, W, 3], rounded up."""
    return ((pixels.astype(np.uint16) + colours + 1) // 2).astype(np.uint8)


def tint_mask(pixels: Pixels, mask: npt.NDArray[np.bool_], colour: npt.NDArray[np.uint8]) -> None:
    """Tints the pixels of a mask [H, W], in place, and draws its border in full colour."""
    pixels[mask] = tint(pixels[mask], np.broadcast_to(colour, pixels[mask].shape))
    inner = mask.copy()
    for axis in (0, 1):
        for step in (1, -1):
            inner &= np.roll(mask, step, axis)
    pixels[mask & ~inner] = colour


def text_size(height: int) -> int:
    """Of letters that are readable beside an image of so many rows, in pixels."""
    return int(np.clip(height // 40, 12, 48))


def beside(pixels: Pixels, entries: Sequence[tuple[Colour, str]]) -> Any:
    """A Pillow image: the picture, and to its right, on white, a coloured box and a text per entry."""
    pil, font = require("PIL.Image", "beside"), _font(text_size(pixels.shape[0]))
    drawing = require("PIL.ImageDraw", "beside")
    line = int(1.5 * text_size(pixels.shape[0]))
    measure = drawing.Draw(pil.new("RGB", (1, 1)))
    width = max((int(measure.textlength(text, font=font)) for _, text in entries), default=0)
    height, columns = max(pixels.shape[0], line * (len(entries) + 1)), pixels.shape[1]
    canvas = pil.new("RGB", (columns + width + 3 * line, height), WHITE)
    canvas.paste(to_pillow(pixels), (0, 0))
    draw = drawing.Draw(canvas)
    for row, (colour, text) in enumerate(entries):
        left, top = columns + line // 2, line // 2 + row * line
        draw.rectangle((left, top, left + line, top + line - 4), fill=colour, outline=BLACK)
        draw.text((left + line + line // 2, top), text, fill=BLACK, font=font)
    return canvas


def draw_prompts(
    pixels: Pixels,
    points: Sequence[tuple[float, float, int]],
    box: tuple[float, float, float, float] | None,
) -> Pixels:
    """Points as dots, green on the object and red off it, with a white rim; the box in green."""
    image = to_pillow(pixels)
    draw = require("PIL.ImageDraw", "draw_prompts").Draw(image)
    radius = max(2, max(pixels.shape[:2]) // 150)
    if box is not None:
        draw.rectangle(box, outline=(0, 200, 0), width=max(1, radius // 2))
    for x, y, label in points:
        dot = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(dot, fill=(0, 200, 0) if label else (220, 0, 0), outline=WHITE)
    return np.array(image)


def _font(size: int) -> Any:
    fonts = require("PIL.ImageFont", "beside")
    try:
        return fonts.load_default(size)
    except (TypeError, ImportError, OSError):  # Pillow before 10.1, or built without FreeType: one small size
        return fonts.load_default()
