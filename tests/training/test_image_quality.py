"""PSNR, SSIM and luma against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from efficientvit_kernels.training import luma, psnr, ssim


def grey(value: float, side: int = 16) -> Tensor:
    return torch.full((1, 1, side, side), value)


def test_luma() -> None:
    """White is 235 of 255, black 16; red, green and blue add up from black."""
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]]).view(5, 3, 1, 1)
    expected = torch.tensor([16, 235, 81.481, 144.553, 40.966], dtype=torch.float64) / 255
    torch.testing.assert_close(luma(colours).flatten(), expected)
    # Clamped, and rounded to 8 bits.
    assert luma(torch.full((1, 3, 1, 1), 1.3)).item() == luma(torch.ones(1, 3, 1, 1)).item()
    assert luma(torch.full((1, 3, 1, 1), 100.4 / 255)).item() == luma(torch.full((1, 3, 1, 1), 100 / 255)).item()


def test_psnr() -> None:
    a = torch.cat([grey(0.5), grey(0.5)])
    b = torch.cat([grey(0.6), grey(0.51)])
    torch.testing.assert_close(psnr(b, a), torch.tensor([20.0, 40.0], dtype=torch.float64), rtol=0, atol=1e-5)
    assert psnr(a, a).tolist() == [math.inf, math.inf]
    edge = grey(0.5)
    edge[..., :2, :] = 0
    assert psnr(edge, grey(0.5), border=2).item() == math.inf
    assert psnr(edge, grey(0.5), border=1).item() < 20


def test_ssim_of_flat_images() -> None:
    """No variance: what is left is (2 m1 m2 + c1) / (m1^2 + m2^2 + c1)."""
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(grey(0.2), grey(0.6)).item() == pytest.approx(expected, rel=1e-6)
    assert ssim(grey(0.3), grey(0.3)).item() == pytest.approx(1, rel=1e-12)


def test_ssim_of_one_window_by_hand() -> None:
    """11 x 11 pixels are one window: weighted moments with plain loops."""
    torch.manual_seed(2)
    a, b = torch.rand(2, 1, 1, 11, 11, dtype=torch.float64)
    weights = {(i, j): math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for i in range(11) for j in range(11)}
    total = sum(weights.values())

    def mean(of: Tensor) -> float:
        return sum(w * float(of[0, 0, i, j]) for (i, j), w in weights.items()) / total

    m1, m2 = mean(a), mean(b)
    v1, v2, c = mean(a * a) - m1 * m1, mean(b * b) - m2 * m2, mean(a * b) - m1 * m2
    expected = (2 * m1 * m2 + 1e-4) * (2 * c + 9e-4) / ((m1 * m1 + m2 * m2 + 1e-4) * (v1 + v2 + 9e-4))
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-10)


def test_ssim_means_over_windows_and_channels() -> None:
    torch.manual_seed(2)
    a, b = torch.rand(2, 2, 3, 12, 14, dtype=torch.float64)
    windows = [(slice(i, i + 11), slice(j, j + 11)) for i in range(2) for j in range(4)]
    parts = [ssim(a[:, c : c + 1, *w], b[:, c : c + 1, *w]) for c in range(3) for w in windows]
    torch.testing.assert_close(ssim(a, b), torch.stack(parts).mean(0))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"luma: image must be of shape \[B, 3, H, W\], got \[1, 1, 16, 16\]"):
        luma(grey(0.0))
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match=r"found must be of expected's shape"):
            measure(grey(0.0), grey(0.0, side=12))
        with pytest.raises(ValueError, match=r"pixels within the border 8"):
            measure(grey(0.0), grey(0.0), border=8)
        with pytest.raises(TypeError, match=r"found must be a tensor"):
            measure(None, grey(0.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at least 11 x 11 pixels"):
        ssim(grey(0.0, side=10), grey(0.0, side=10))
