"""`upscale`: sizes, tiles without seams, bicubic beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from efficientvit_kernels.tasks import upscale_images
from efficientvit_kernels.tasks.upscale import upscale
from tests.tasks.commands import Nearest, results, run, use_model
from tests.tasks.pictures import Image, noise, read, write

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "efficientvit-sr-w0.75"


class Counted(Nearest):
    """The tiles in their order: the n-th call gives n everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0 + len(self.seen) - 1


@pytest.mark.parametrize("size", [(1, 1), (40, 9), (64, 64), (65, 64), (100, 131), (17, 1000)])
@pytest.mark.parametrize(("tile", "overlap"), [(64, 0), (64, 16), (64, 32), (9, 4), (1, 0), (5000, 16)])
def test_tiles_make_the_whole(size: tuple[int, int], tile: int, overlap: int) -> None:
    if tile == 1 and size[0] * size[1] > 100:
        size = (5, 6)
    rgb = torch.rand(1, 3, *size)
    model = Nearest()
    whole = upscale(model, rgb, tile, overlap)
    # Weights that add up to one within float32's rounding.
    torch.testing.assert_close(whole, F.interpolate(rgb, scale_factor=2, mode="nearest"), rtol=0, atol=1e-6)
    assert max(max(shape[2:]) for shape in model.seen) <= tile


def test_seams_are_ramps() -> None:
    """Two tiles, of 0 and 1, of 60 columns in 100: from column 40 to 60 the result rises steadily from 0 to 1."""
    out = upscale(Counted(), torch.rand(1, 3, 8, 100), 60, 20)[0, 0, 0]
    torch.testing.assert_close(out[:80], torch.zeros(80), rtol=0, atol=0)
    torch.testing.assert_close(out[120:], torch.ones(80), rtol=0, atol=0)
    torch.testing.assert_close(out[80:120], (torch.arange(40) + 0.5) / 40, rtol=0, atol=1e-6)


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, Nearest())
    image = noise(50, 70)
    path = write(tmp_path / "x.png", image)
    assert run("upscale", MODEL, tmp_path / "out", path, "--tile", 32, "--overlap", 8) == 0
    np.testing.assert_array_equal(read(tmp_path / "out/x_upscaled.png"), image.repeat(2, 0).repeat(2, 1))
    bicubic = Image.fromarray(image).resize((140, 100), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(read(tmp_path / "out/x_bicubic.png"), np.array(bicubic))
    assert results(tmp_path / "out")["images"][0]["files"] == ["x_upscaled.png", "x_bicubic.png"]


def test_a_real_model(tmp_path: Path) -> None:
    for name, size in {"dot": (1, 1), "strip": (17, 300), "picture": (30, 40)}.items():
        write(tmp_path / f"in/{name}.png", noise(*size))
    assert run("upscale", MODEL, tmp_path / "out", tmp_path / "in", "--tile", 64) == 0
    for record in results(tmp_path / "out")["images"]:
        for file in record["files"]:
            assert read(tmp_path / "out" / file).shape == (2 * record["height"], 2 * record["width"], 3)


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"^upscale_images: tile must be positive, got 0$"):
        upscale_images(Nearest(), [], tile=0)
    for overlap in (-1, 17):
        with pytest.raises(ValueError, match=f"overlap must be from 0 to tile / 2 = 16, got {overlap}$"):
            upscale_images(Nearest(), [], tile=32, overlap=overlap)
    assert run("upscale", MODEL, tmp_path / "out", write(tmp_path / "x.png", noise(5, 5)), "--overlap", 400) == 2
    assert "overlap must be from 0 to tile / 2 = 256, got 400" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
