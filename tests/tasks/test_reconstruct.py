"""`reconstruct`: PSNR, sizes, files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from efficientvit_kernels.models.dc_ae import DCAE
from efficientvit_kernels.tasks import reconstruct_images
from tests.tasks.commands import results, run, tiny_dc_ae, use_model
from tests.tasks.pictures import noise, read, write

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "dc-ae-f32c32-in-1.0"


class Identity(DCAE):
    """An autoencoder that compresses nothing, but asks for multiples of 8; adds `shift` on the scale [-1, 1]."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__(tiny_dc_ae().config)
        self.shift = shift
        self.seen: list[Tensor] = []

    def encode(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        assert x.shape[2] % 8 == x.shape[3] % 8 == 0
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z + self.shift


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """10 log10(255^2 / mean((a - b)^2)), from the pixels of the files."""
    return 10 * math.log10(255**2 / float(np.square(a.astype(np.float64) - b).mean()))


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    image = noise(21, 13)
    model = Identity()
    (result,) = reconstruct_images(model, [write(tmp_path / "x.png", image)])
    np.testing.assert_array_equal(result.decoded, image)
    assert (result.psnr, result.latent_shape) == (math.inf, (3, 24, 16))
    x = model.seen[0]
    assert x.shape == (1, 3, 24, 16)
    np.testing.assert_allclose(x[0, :, :21, :13].permute(1, 2, 0), image / 127.5 - 1, atol=1e-6)
    torch.testing.assert_close(x[..., 21:, :], x[..., 20:21, :].expand(-1, -1, 3, -1), rtol=0, atol=0)
    torch.testing.assert_close(x[..., 13:], x[..., 12:13].expand(-1, -1, -1, 3), rtol=0, atol=0)


def test_psnr_of_a_shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """2 of 255 levels more at every pixel but the last, where the result is clamped."""
    use_model(monkeypatch, Identity(shift=4 / 255))
    image = np.full((8, 8, 3), 100, dtype=np.uint8)
    image[-1, -1] = 255
    assert run("reconstruct", MODEL, tmp_path / "out", write(tmp_path / "x.png", image)) == 0
    picture = read(tmp_path / "out/x_reconstructed.png")
    assert (picture.min(), picture.max(), picture[0, 0].tolist()) == (102, 255, [102, 102, 102])
    (record,) = results(tmp_path / "out")["images"]
    assert record["psnr"] == pytest.approx(10 * math.log10(65025 / (4 * 63 / 64)))
    assert "x.png (8 x 8): PSNR 42.18 dB, latent [3, 8, 8]" in capsys.readouterr().out


def test_equal_pictures_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, Identity())
    assert run("reconstruct", MODEL, tmp_path / "out", write(tmp_path / "x.png", noise(8, 8))) == 0
    assert results(tmp_path / "out")["images"][0]["psnr"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    use_model(monkeypatch, tiny_dc_ae())
    sizes = {"dot": (1, 1), "picture": (30, 41), "strip": (3, 1000)}
    for name, size in sizes.items():
        write(tmp_path / f"in/{name}.png", noise(*size))
    assert run("reconstruct", MODEL, tmp_path / "out", tmp_path / "in", "--dtype", dtype) == 0
    for record in results(tmp_path / "out")["images"]:
        name = Path(record["image"]).stem
        decoded, image = read(tmp_path / f"out/{name}_reconstructed.png"), noise(*sizes[name])
        assert record["psnr"] == pytest.approx(psnr(image, decoded))
        assert record["latent_shape"] == [8, *(-(-side // 8) for side in sizes[name])]
