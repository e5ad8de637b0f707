"""One entry per op: its inputs, its providers, its arithmetic and the fewest bytes that it can move.

To add an op: a module that calls it, the official op sequence as a module, and an `Op` below.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

import efficientvit_kernels as evk
from benchmarks import peers
from benchmarks.providers import Dims, Provider, Settings, torch_provider
from benchmarks.shapes import Shape
from efficientvit_kernels import reference
from efficientvit_kernels.testing import official_relu_linear_attention


@dataclass(frozen=True)
class Op:
    """`ours`, `official` and `truth` make modules over the weights of a LiteMLA, which they may keep or copy."""

    name: str
    inputs: Callable[[Shape], list[Dims]]
    outputs: Callable[[Shape], list[Dims]]
    weights: Callable[[Shape], int]  # elements
    flops: Callable[[Shape], float]  # of the forward; two operations per multiplication and addition
    ours: Callable[..., nn.Module]  # (layer, backend="auto")
    official: Callable[[evk.LiteMLA], nn.Module]
    truth: Callable[[evk.LiteMLA], nn.Module]
    why_not: Callable[[], str | None] = lambda: None  # why `ours` cannot be measured

    def flops_of(self, shape: Shape, training: bool) -> float:
        """The backward of products is twice their forward: one gradient for each factor."""
        return self.flops(shape) * (3 if training else 1)

    def fewest_bytes(self, shape: Shape, settings: Settings) -> int:
        """Inputs and weights read once, outputs written once; the backward reads inputs, weights and the outputs'
        gradients, and writes gradients of inputs and weights."""
        read = sum(math.prod(dims) for dims in self.inputs(shape)) + self.weights(shape)
        written = sum(math.prod(dims) for dims in self.outputs(shape))
        elements = read + written + (2 * read + written if settings.training else 0)
        return elements * settings.dtype.itemsize


@dataclass
class Workload:
    """One row: an op on a shape, with every provider that can run, and why the others cannot."""

    op: Op
    shape: Shape
    settings: Settings
    providers: dict[str, Provider]  # "ours", "eager", then the other peers
    modules: dict[str, nn.Module]  # of "ours" and "eager", for memory and stages
    truth: Provider  # in float64
    left_out: dict[str, str] = field(default_factory=dict)


def make_workload(op: Op, shape: Shape, settings: Settings, wanted_peers: tuple[str, ...]) -> Workload:
    """Every provider has weights of its own, all of the same values."""
    layer = make_layer(shape, settings)
    official = op.official(copy.deepcopy(layer))
    modules = {"ours": op.ours(copy.deepcopy(layer)), "eager": official}
    providers = {name: torch_provider(module, settings) for name, module in modules.items()}
    found, left_out = peers.make_peers(official, settings, wanted_peers, op.inputs(shape))
    float64 = Settings(torch.float64, settings.layout, settings.threads, settings.training)
    truth = torch_provider(op.truth(copy.deepcopy(layer).double()), float64)
    return Workload(op, shape, settings, providers | found, modules, truth, left_out)


def make_layer(shape: Shape, settings: Settings) -> evk.LiteMLA:
    """A LiteMLA with seeded weights, and statistics of its norm that are not 0 and 1, in the row's dtype and mode.

    The norm is a BatchNorm for every model: DC-AE's RMSNorm runs outside all of the ops that are compared.
    """
    torch.manual_seed(0)
    layer = evk.LiteMLA(shape.channels, shape.channels, dim=shape.dim, scales=shape.scales)
    norm = layer.proj.norm
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        for tensor in (norm.weight, norm.running_var):
            tensor.uniform_(0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            tensor.normal_(std=0.1)
    return layer.to(settings.dtype).train(settings.training)


class Attention(nn.Module):
    def __init__(self, layer: evk.LiteMLA, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.head_dim, self.eps, self.function = layer.dim, layer.eps, function

    def forward(self, *qkv: Tensor) -> Tensor:
        return self.function(list(qkv), self.head_dim, eps=self.eps)


class OfficialAggregation(nn.Module):
    def __init__(self, layer: evk.LiteMLA) -> None:
        super().__init__()
        self.aggreg = layer.aggreg

    def forward(self, qkv: Tensor) -> list[Tensor]:
        return [aggregate(qkv) for aggregate in self.aggreg]


class FusedAggregation(OfficialAggregation):
    def __init__(self, layer: evk.LiteMLA, backend: str = "auto") -> None:
        super().__init__(layer)
        self.head_dim, self.backend = layer.dim, backend

    def forward(self, qkv: Tensor) -> list[Tensor]:
        weights = aggregation_weights(self.aggreg)
        result: list[Tensor] = evk.multiscale_aggregate(qkv, *weights, head_dim=self.head_dim, backend=self.backend)
        return result


def aggregation_weights(aggreg: nn.ModuleList) -> tuple[list[Tensor], list[Tensor]]:
    """Of the depthwise convolutions, and of the grouped ones."""
    pairs = [(pair[0].weight, pair[1].weight) for pair in aggreg if isinstance(pair, nn.Sequential)]
    return [depthwise for depthwise, _ in pairs], [pointwise for _, pointwise in pairs]  # type: ignore[misc]


def _image(shape: Shape, channels: int) -> Dims:
    return (shape.batch, channels, shape.height, shape.width)


def _attention_flops(shape: Shape) -> float:
    return 4.0 * shape.pixels * shape.groups * shape.dim * (shape.dim + 1)


def _aggregation_flops(shape: Shape) -> float:
    return sum(2.0 * shape.pixels * 3 * shape.channels * (size**2 + shape.dim) for size in shape.scales)


def _aggregation_weights(shape: Shape) -> int:
    return sum(3 * shape.channels * (size**2 + shape.dim) for size in shape.scales)


def _product_weights(shape: Shape) -> int:
    """Of qkv and proj, the two dense 1 x 1 convolutions."""
    return shape.channels**2 * (3 + 1 + len(shape.scales))


def _why_no_aggregation() -> str | None:
    if "multiscale_aggregate" not in dir(evk):
        return "this version has no such op"
    if not hasattr(torch.ops.efficientvit_kernels, "multiscale_aggregate_fwd"):
        return "this version has no native kernel for it"
    return None


def stage_flops(shape: Shape) -> dict[str, float]:
    """Of the stages of one LiteMLA forward; depthwise and grouped 1 x 1 convolution are the aggregation."""
    product = 2.0 * shape.pixels * shape.channels**2
    depthwise = sum(2.0 * shape.pixels * 3 * shape.channels * size**2 for size in shape.scales)
    return {
        "qkv product": 3 * product,
        "depthwise": depthwise,
        "grouped 1x1": _aggregation_flops(shape) - depthwise,
        "aggregation": _aggregation_flops(shape),
        "attention": _attention_flops(shape),
        "attention products": _attention_flops(shape),
        "proj product": (1 + len(shape.scales)) * product,
        "whole module": OPS["lite_mla"].flops(shape),
    }


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "relu_linear_attention",
            inputs=lambda shape: [_image(shape, 3 * shape.channels)] * (1 + len(shape.scales)),
            outputs=lambda shape: [_image(shape, shape.groups * shape.dim)],
            weights=lambda shape: 0,
            flops=_attention_flops,
            ours=lambda layer, backend="auto": Attention(layer, partial(evk.relu_linear_attention, backend=backend)),
            official=lambda layer: Attention(layer, official_relu_linear_attention),
            truth=lambda layer: Attention(layer, reference.relu_linear_attention),
        ),
        Op(
            "multiscale_aggregate",
            inputs=lambda shape: [_image(shape, 3 * shape.channels)],
            outputs=lambda shape: [_image(shape, 3 * shape.channels)] * len(shape.scales),
            weights=_aggregation_weights,
            flops=_aggregation_flops,
            ours=FusedAggregation,
            official=OfficialAggregation,
            truth=OfficialAggregation,
            why_not=_why_no_aggregation,
        ),
        Op(
            "lite_mla",
            inputs=lambda shape: [_image(shape, shape.channels)],
            outputs=lambda shape: [_image(shape, shape.channels)],
            # Beside the convolutions, the norm's scale and shift.
            weights=lambda shape: _product_weights(shape) + _aggregation_weights(shape) + 2 * shape.channels,
            flops=lambda shape: (
                2.0 * shape.pixels * _product_weights(shape) + _aggregation_flops(shape) + _attention_flops(shape)
            ),
            ours=evk.FusedLiteMLA.from_module,
            official=peers.OfficialLiteMLA,
            truth=lambda layer: layer,
        ),
    )
}
