"""PSNR and SSIM as the super-resolution papers measure them: on the luma, of whole 8-bit steps, without the border."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._checks import check_image, shape_text

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def luma(image: Tensor) -> Tensor:
    """RGB [B, 3, H, W] in [0, 1] -> Y [B, 1, H, W] of ITU-R BT.601, studio range, in float64.

    Y = (16 + 65.481 R + 128.553 G + 24.966 B) / 255. Values are first clamped and rounded to steps of 1/255, as a
    picture on disk is.

    Raises: ValueError, TypeError where image is no [B, 3, H, W].
    """
    check_image("luma", "image", image)
    if image.shape[1] != 3:
        raise ValueError(f"luma: image must be of shape [B, 3, H, W], got {shape_text(image)}")
    steps = (image.double().clamp(0, 1) * 255).round() / 255
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=image.device)
    return (16 + (steps * weights[:, None, None]).sum(1, keepdim=True)) / 255


def psnr(found: Tensor, expected: Tensor, border: int = 0) -> Tensor:
    """10 log10(1 / mean((found - expected)^2)) of each image of [B, C, H, W] in [0, 1]; inf where they are equal.

    border: pixels left out at each edge; the convention for super-resolution is the factor.
    Raises: ValueError, TypeError where the shapes differ or nothing is left.
    """
    found, expected = _cut("psnr", found, expected, border, 1)
    return -10 * (found - expected).square().mean((1, 2, 3)).log10()


def ssim(found: Tensor, expected: Tensor, border: int = 0) -> Tensor:
    """The structural similarity of each image of [B, C, H, W] in [0, 1], the mean over its windows and channels.

    Per window of 11 x 11 pixels that lies inside the image, weighted by a normalised Gaussian of sigma 1.5, with means
    m, variances v and covariance c of the two images:
    (2 m1 m2 + 0.01^2) (2 c + 0.03^2) / ((m1^2 + m2^2 + 0.01^2) (v1 + v2 + 0.03^2)).

    border: as `psnr`.
    Raises: ValueError, TypeError where the shapes differ or are smaller than a window.
    Source: Z. Wang, A. Bovik, H. Sheikh, E. Simoncelli, "Image quality assessment", 2004.
    """
    a, b = _cut("ssim", found, expected, border, WINDOW)
    mean_a, mean_b = _window_means(a), _window_means(b)
    var_a, var_b = _window_means(a * a) - mean_a**2, _window_means(b * b) - mean_b**2
    covariance = _window_means(a * b) - mean_a * mean_b
    means = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * covariance + K2**2) / (var_a + var_b + K2**2)
    return (means * structure).mean((1, 2, 3))


def _cut(name: str, found: Tensor, expected: Tensor, border: int, least: int) -> tuple[Tensor, Tensor]:
    check_image(name, "found", found)
    check_image(name, "expected", expected)
    if found.shape != expected.shape:
        raise ValueError(f"{name}: found must be of expected's shape {shape_text(expected)}, got {shape_text(found)}")
    height, width = (side - 2 * border for side in found.shape[-2:])
    if border < 0 or min(height, width) < least:
        raise ValueError(
            f"{name}: found must have at least {least} x {least} pixels within the border {border},"
            f" got {shape_text(found)}"
        )
    inside = (..., slice(border, border + height), slice(border, border + width))
    return found[inside].double(), expected[inside].double()


def _window_means(x: Tensor) -> Tensor:
    """The Gaussian means over all windows that lie inside, one axis after the other."""
    distance = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = (-(distance**2) / (2 * SIGMA**2)).exp()
    kernel = (weights / weights.sum()).expand(x.shape[1], 1, 1, WINDOW).contiguous()
    return F.conv2d(F.conv2d(x, kernel, groups=x.shape[1]), kernel.mT.contiguous(), groups=x.shape[1])
