"""The super-resolution models: any size, 16 bits, layouts; untrained they interpolate; both attentions agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from efficientvit_kernels import LiteMLA
from efficientvit_kernels.models import create_model, list_models
from efficientvit_kernels.models.super_resolution import EfficientViTSR, bicubic, create_sr
from efficientvit_kernels.testing import native_calls
from tests.models.golden_models import golden_image
from tests.models.model_checks import is_channels_last

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float16, torch.bfloat16]
# Parameters of this architecture, so that a change of it is noticed.
PARAMETERS = {"efficientvit-sr-w0.75": 814_272, "efficientvit-sr-w1.0": 1_407_216}


def trained(attention: str = "fused", name: str = "w0.75") -> EfficientViTSR:
    """A model whose head is not zero, as training would leave it."""
    torch.manual_seed(1)
    model = create_sr(name, attention)
    nn.init.normal_(model.head.conv.weight, std=0.05)
    return model.eval()


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    return golden_image(height, width, batch).sigmoid()


@pytest.mark.parametrize("name", list_models("efficientvit-sr-*"))
def test_untrained_is_bicubic_with_half(name: str) -> None:
    """a = -0.5, as in Pillow, whose result is rounded to 8 bits after each axis: up to two steps."""
    from PIL import Image

    model = create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    rows, columns = torch.meshgrid(torch.linspace(0, 3, 13), torch.linspace(1, 5, 17), indexing="ij")
    image = (torch.stack([rows.sin(), columns.cos(), (rows + columns).sin()]) * 100 + 128).round().byte()
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((34, 26), Image.Resampling.BICUBIC)
    with torch.no_grad():
        ours = model(image[None] / 255)[0] * 255
    assert np.abs(ours.permute(1, 2, 0).numpy() - np.asarray(pillow, dtype=np.float32)).max() < 2


def test_bicubic_by_hand() -> None:
    """Beside a step from 0 to 1: the weights of the cubic with a = -0.5 at the distances of the ones."""

    def cubic(t: float) -> float:
        return 1.5 * t**3 - 2.5 * t**2 + 1 if t < 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2

    row = torch.tensor([0.0, 0, 0, 1, 1, 1]).expand(1, 1, 4, 6)
    expected = cubic(3 / 4) + cubic(7 / 4)  # the ones at the right of the point half a pixel left of the middle
    torch.testing.assert_close(bicubic(row)[0, 0, 4, 5], torch.tensor(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (4, 4), (5, 8), (7, 6), (17, 13)])
def test_any_size(size: tuple[int, int]) -> None:
    model, x = trained(), picture(*size, batch=2)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 3, 2 * size[0], 2 * size[1])
        assert bool(y.isfinite().all())
        assert float((y - bicubic(x)).std()) > 1e-3  # the network took part
        for i in range(2):
            # Another batch size may round otherwise in torch's convolutions.
            torch.testing.assert_close(model(x[i : i + 1]), y[i : i + 1], rtol=0, atol=1e-5)


def test_padding_reflects() -> None:
    model, x = trained(), picture(6, 7)
    rows, columns = [0, 1, 2, 3, 4, 5, 4, 3], [0, 1, 2, 3, 4, 5, 6, 5]
    with torch.no_grad():
        details = model(x) - bicubic(x)
        mirrored = x[:, :, rows][..., columns]
        expected = (model(mirrored) - bicubic(mirrored))[..., :12, :14]
    torch.testing.assert_close(details, expected, rtol=0, atol=1e-6)


def test_both_attentions_agree() -> None:
    x = picture(24, 20, batch=2)
    fused, reference = trained("fused"), trained("reference")
    assert list(fused.state_dict()) == list(reference.state_dict())
    count = sum(isinstance(module, LiteMLA) for module in fused.modules())
    with torch.no_grad():
        before = native_calls()
        y = fused(x)
        assert native_calls() - before == count == 4
        # Two float32 runs of four attentions; the values are about 1.
        torch.testing.assert_close(y, reference(x), rtol=0, atol=1e-5)
    gradients = []
    for attention in ("fused", "reference"):
        model = trained(attention).double().train()
        model(x.double()).square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, expected in gradients[1].items():
        found = gradients[0][key]
        assert expected is not None
        assert found is not None
        assert bool(expected.any()), key
        assert float((found - expected).abs().max()) <= 1e-9 * float(expected.abs().max()), key


@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bits(dtype: torch.dtype) -> None:
    """Pure 16 bits and autocast. The output's own rounding is eps / 2 of values up to 1; the details' error is less."""
    model, x = trained(), picture(32, 40, batch=2).to(dtype).float()
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype):
            autocast = model(x)
        pure = model.to(dtype)(x.to(dtype))
    assert pure.dtype == dtype
    assert autocast.dtype == torch.float32  # the interpolation keeps the precision of the image
    for y in (autocast, pure):
        rms = float((y.float() - expected).square().mean().sqrt())
        assert rms <= torch.finfo(dtype).eps, rms


def test_channels_last() -> None:
    model, x = trained(), picture(18, 21, batch=2)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    y = model(x.to(memory_format=torch.channels_last))
    assert is_channels_last(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_batch_0(dtype: torch.dtype) -> None:
    y = trained().to(dtype)(torch.zeros(0, 3, 5, 9, dtype=dtype))
    assert y.shape == (0, 3, 10, 18)
    assert y.dtype == dtype


def test_learns_a_picture() -> None:
    """Twenty steps on one image bring the error well below that of the interpolation."""
    torch.manual_seed(0)
    model = create_sr("w0.75")
    large = picture(32, 32)
    small = nn.functional.interpolate(large, scale_factor=0.5, mode="bicubic", antialias=True)
    start = float((bicubic(small) - large).square().mean())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(20):
        loss = (model(small) - large).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert float((model(small) - large).square().mean()) < 0.7 * start


def test_errors() -> None:
    model = create_sr("efficientvit-sr-w0.75")
    with pytest.raises(ValueError, match=r"create_sr: name must be one of w0\.75, w1\.0, got 'efficientvit-sr-w2'"):
        create_sr("efficientvit-sr-w2")
    with pytest.raises(ValueError, match=r"attention must be one of fused, reference, got 'slow'"):
        create_model("efficientvit-sr-w1.0", attention="slow")
    with pytest.raises(ValueError, match=r"EfficientViTSR: width must be at least 0\.125, got 0\.1"):
        EfficientViTSR(0.1)
    for shape in ((3, 8, 8), (1, 4, 8, 8), (1, 3, 0, 8)):
        with pytest.raises(ValueError, match=r"EfficientViTSR: x must be of shape"):
            model(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"x must be of the weights' dtype torch\.float32, got torch\.float16"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"bicubic: scale must be positive, got 0"):
        bicubic(torch.zeros(1, 3, 4, 4), 0)
