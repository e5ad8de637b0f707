"""Colours: of classes, and of masks."""

from __future__ import annotations

import colorsys

import numpy as np

from .images import Pixels

# The dataset's own.
CITYSCAPES = (
    *((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30)),
    *((220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142)),
    *((0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
)
GOLDEN_RATIO = (5**0.5 - 1) / 2
LEVELS = ((0.75, 0.95), (0.95, 0.62), (0.45, 0.85), (1.0, 0.85), (0.55, 0.55))  # saturation and value, in turns


def generated_palette(count: int) -> Pixels:
    """`count` distinct colours [count, 3]: evenly spaced hues, in an order that keeps neighbours apart, at five levels.

    The order is that of the multiples of the golden ratio modulo 1.
    """
    hues = -(-count // len(LEVELS))
    ranks = np.argsort(np.argsort(np.arange(hues) * GOLDEN_RATIO % 1))
    colours = [colorsys.hsv_to_rgb(ranks[i // len(LEVELS)] / hues, *LEVELS[i % len(LEVELS)]) for i in range(count)]
    values = np.array(colours, dtype=np.float64).reshape(count, 3)
    return (255 * values).round().astype(np.uint8)


def palette_of(dataset: str, count: int) -> Pixels:
    """The colours [count, 3] of a data set's classes: Cityscapes' own, otherwise generated ones."""
    if dataset == "cityscapes" and count == len(CITYSCAPES):
        return np.array(CITYSCAPES, dtype=np.uint8)
    return generated_palette(count)
