"""The blocks, each against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientvit_kernels.models import blocks
from efficientvit_kernels.nn.conv import LayerNorm2d, RMSNorm2d

pytestmark = pytest.mark.usefixtures("one_thread")
# name -> (class, its layers in order, the widths of the convolutions' inputs from 8 channels with ratio 3)
LAYERS: dict[str, tuple[Any, list[str], list[int]]] = {
    "DSConv": (blocks.DSConv, ["depth_conv", "point_conv"], [8, 8]),
    "MBConv": (blocks.MBConv, ["inverted_conv", "depth_conv", "point_conv"], [8, 24, 24]),
    "FusedMBConv": (blocks.FusedMBConv, ["spatial_conv", "point_conv"], [8, 24]),
    "ResBlock": (blocks.ResBlock, ["conv1", "conv2"], [8, 24]),
    "GLUMBConv": (blocks.GLUMBConv, ["inverted_conv", "depth_conv", "point_conv"], [8, 48, 24]),
}


@pytest.mark.parametrize("fewer_norm", [False, True])
@pytest.mark.parametrize("name", list(LAYERS))
def test_form(name: str, fewer_norm: bool) -> None:
    cls, layers, widths = LAYERS[name]
    ratio = {} if name == "DSConv" else {"expand_ratio": 3}
    block = cls(8, 12, stride=2, norm="bn2d", act_func="hswish", fewer_norm=fewer_norm, **ratio)
    assert [name for name, child in block.named_children() if name != "glu_act"] == layers
    for i, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        conv_layer, last = getattr(block, layer), i == len(layers) - 1
        assert conv_layer.conv.in_channels == width
        assert (conv_layer.norm is not None) == (last or not fewer_norm)
        assert (conv_layer.conv.bias is not None) == (fewer_norm and not last)
        gated = name == "GLUMBConv" and layer == "depth_conv"
        assert (conv_layer.act is None) == (last or gated)
    assert block.eval()(torch.randn(2, 8, 7, 9)).shape == (2, 12, 4, 5)


def test_gated_block() -> None:
    block = blocks.GLUMBConv(4, 6, expand_ratio=2, act_func="silu", fewer_norm=True).eval()
    x = torch.randn(1, 4, 5, 5)
    hidden = F.silu(block.inverted_conv.conv(x))
    value, gate = block.depth_conv.conv(hidden).split(8, dim=1)
    expected = block.point_conv.norm(block.point_conv.conv(value * F.silu(gate)))  # type: ignore[misc]
    torch.testing.assert_close(block(x), expected)


def test_residual() -> None:
    x, main = torch.randn(1, 2, 3, 3), nn.Conv2d(2, 2, 1)
    torch.testing.assert_close(blocks.ResidualBlock(main, nn.Identity())(x), main(x) + x)
    torch.testing.assert_close(blocks.ResidualBlock(main, nn.PixelShuffle(1))(x), main(x) + x)
    assert torch.equal(blocks.ResidualBlock(main, None)(x), main(x))
    assert blocks.ResidualBlock(None, nn.Identity())(x) is x
    assert list(blocks.residual(main).state_dict()) == ["main.weight", "main.bias"]


def test_sequence_numbers_without_none() -> None:
    sequence = blocks.OpSequential([None, nn.Conv2d(1, 1, 1, bias=False), None, nn.ReLU(), nn.BatchNorm2d(1)])
    assert {key.rpartition(".")[0] for key in sequence.state_dict()} == {"op_list.0", "op_list.2"}


def test_dag_adds_from_the_right_and_leaves_the_features_alone() -> None:
    dag = blocks.DAGBlock(
        {"a": nn.Identity(), "b": nn.Identity(), "c": nn.ReLU()}, nn.Identity(), {"sum": nn.Identity()}
    )
    # 1e8 + (-1e8 + 1) is 0 in float32, (1e8 - 1e8) + 1 is 1.
    features = {"a": torch.tensor(1e8), "b": torch.tensor(-1e8), "c": torch.tensor(1.0)}
    result = dag(features)
    assert float(result["sum"]) == 0
    assert list(features) == ["a", "b", "c"]
    assert list(result) == ["a", "b", "c", "sum"]


def test_linear_layer_flattens() -> None:
    layer = blocks.LinearLayer(12, 5, use_bias=False, norm="ln", act_func="relu")
    assert list(layer.state_dict()) == ["linear.weight", "norm.weight", "norm.bias"]
    x = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(layer(x), F.layer_norm(x.flatten(1) @ layer.linear.weight.T, (5,)).relu())
    with pytest.raises(ValueError, match="LinearLayer: norm must be 'ln' or None, got 'bn2d'"):
        blocks.LinearLayer(2, 2, norm="bn2d")


def test_local_module_errors() -> None:
    with pytest.raises(ValueError, match="local_module must be one of mbconv, glumbconv, got 'conv'"):
        blocks.EfficientViTBlock(32, local_module="conv")


def test_set_norm_eps() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(2), nn.GroupNorm(1, 2), LayerNorm2d(2), RMSNorm2d(2), blocks.EfficientViTBlock(32)
    )
    blocks.set_norm_eps(model, 3e-6)
    assert {m.eps for m in model.modules() if "Norm" in type(m).__name__} == {3e-6}
    assert [m.eps for m in model.modules() if "LiteMLA" in type(m).__name__] == [1e-15]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("cls", [LayerNorm2d, RMSNorm2d])
def test_norms_of_large_values(cls: type[nn.LayerNorm], dtype: torch.dtype) -> None:
    """Squares of 3e4 overflow in float16; the norm does not."""
    norm = cls(6).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3e4 * torch.randn(2, 6, 4, 4).clamp(-2, 2)).to(dtype)
    x64, weight, bias = x.double(), norm.weight.double(), norm.bias.double()
    centred = x64 - x64.mean(1, keepdim=True) if cls is LayerNorm2d else x64
    normed = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
    expected: Tensor = normed * weight[:, None, None] + bias[:, None, None]
    y = norm(x)
    assert y.dtype == dtype
    # One rounding to the dtype, and float32 inside: a few ulp of float32 on values of about 3.
    tolerance = max(torch.finfo(dtype).eps, {torch.float64: 1e-13}.get(dtype, 1e-6))
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_without_gradients_gives_the_same_bits(dtype: torch.dtype) -> None:
    """In place there, to save memory; the input is not touched."""
    norm = RMSNorm2d(6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 5, 4).to(dtype).contiguous(memory_format=memory_format)
        kept = x.clone()
        expected = norm(x).detach()
        with torch.no_grad():
            found = norm(x)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
        assert torch.equal(x, kept)
