"""Initialisation and stochastic depth."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from efficientvit_kernels.models import create_backbone, create_model
from efficientvit_kernels.models.blocks import GLUMBConv, OpSequential, ResidualBlock, residual
from efficientvit_kernels.models.training import apply_drop_path, identity_residuals, init_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_drop_path_grows_with_the_blocks_and_keeps_the_keys() -> None:
    model = create_backbone("b0")
    keys = list(model.state_dict())
    apply_drop_path(model, 0.2, progress=0.5)
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    inner = [block for block in blocks if block.shortcut is not None]
    assert [block.drop_path for block in inner] == pytest.approx(
        [0.1 * (i + 1) / len(inner) for i in range(len(inner))]
    )
    assert {block.drop_path for block in blocks if block.shortcut is None} == {0.0}
    assert list(model.state_dict()) == keys
    apply_drop_path(model, 0.0)
    assert {block.drop_path for block in blocks} == {0.0}


def test_drop_path_drops_images_and_keeps_the_mean() -> None:
    block = residual(nn.Conv2d(1, 1, 1, bias=False))
    assert isinstance(block.main, nn.Conv2d)
    nn.init.ones_(block.main.weight)
    apply_drop_path(block, 0.25)
    x = torch.ones(4000, 1, 2, 2)
    y = block.train()(x) - x
    values = y[:, 0, 0, 0]
    assert torch.equal(y, values[:, None, None, None].expand_as(y))  # the whole image, or nothing of it
    assert sorted(set(values.tolist())) == pytest.approx([0, 1 / 0.75])
    # A share of 4000 draws: its standard deviation is 0.007.
    assert abs(float((values == 0).float().mean()) - 0.25) < 0.035
    assert torch.equal(block.eval()(x), 2 * x)


def test_drop_path_in_16_bits_and_batch_0() -> None:
    block = residual(nn.Conv2d(3, 3, 1)).to(torch.bfloat16).train()
    apply_drop_path(block, 0.5)
    assert block(torch.zeros(0, 3, 4, 4, dtype=torch.bfloat16)).shape == (0, 3, 4, 4)
    assert block(torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("p", "progress"), [(1.0, 1.0), (-0.1, 1.0), (0.1, 1.1), (float("nan"), 1.0)])
def test_drop_path_errors(p: float, progress: float) -> None:
    with pytest.raises(ValueError, match=r"apply_drop_path: p(rogress)? must be in"):
        apply_drop_path(nn.Identity(), p, progress)


def test_initialisation() -> None:
    model = create_model("efficientvit-b1")
    init_weights(model)
    for key, value in model.state_dict().items():
        if key.endswith("bias"):
            assert not value.any(), key
        elif value.dim() == 1 and key.endswith("weight"):
            assert bool((value == 1).all()), key
        elif value.dim() > 1 and value.numel() > 10_000:
            assert float(value.std()) == pytest.approx(0.02, rel=0.05), key
            assert abs(float(value.mean())) < 1e-3, key
    assert bool(model.eval()(torch.randn(1, 3, 64, 64)).isfinite().all())


def test_zero_last_gamma_makes_the_blocks_the_identity() -> None:
    model = create_model("efficientvit-b0")
    glu = residual(GLUMBConv(8, 8, norm="trms2d"))
    for root in (model, OpSequential([glu])):
        init_weights(root, zero_last_gamma=True)
    for block in [*identity_residuals(model.eval()), glu]:
        assert block.main is not None
        convs = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
        x = torch.randn(1, convs[0].in_channels, 5, 6)
        assert torch.equal(block(x), x)
