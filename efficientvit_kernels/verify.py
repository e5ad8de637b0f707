"""A model against its float64 reference: every LiteMLA layer on the inputs that it really gets, and the whole model."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .integrations import Report, accelerate
from .models.checkpoint import load_weights
from .testing import Verdict, gradients, native_calls, rule_t


@dataclass(frozen=True)
class LayerResult:
    """One LiteMLA: rule T for its output and for the gradient of its input."""

    name: str
    shape: tuple[int, ...]  # of the input, [B, C, H, W]
    output: Verdict
    grad_input: Verdict

    @property
    def ok(self) -> bool:
        return self.output.ok and self.grad_input.ok


@dataclass(frozen=True)
class ModelResult:
    """A whole model: its layers, the model's output, and what `accelerate` swapped."""

    layers: list[LayerResult]
    output: Verdict
    report: Report
    inputs: dict[str, Tensor]  # what each layer really got
    ran_natively: bool  # one native kernel call a layer, or two where the block is not fused whole

    @property
    def ok(self) -> bool:
        return self.output.ok and bool(self.layers) and all(layer.ok for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"{'':<44} {'error':>10} {'official':>10} {'budget':>10}"]
        for layer in self.layers:
            lines += [
                _line(f"{layer.name} {list(layer.shape)}", layer.output),
                _line("    gradient of its input", layer.grad_input),
            ]
        return "\n".join([*lines, _line("whole model", self.output)])


def _line(name: str, verdict: Verdict) -> str:
    errors = f"{verdict.error:>10.3g} {verdict.baseline_error:>10.3g} {verdict.budget:>10.3g}"
    return f"{name:<44} {errors}  {'ok' if verdict.ok else 'FAILED'}"


@dataclass(frozen=True)
class Twins:
    """Three copies of a model: as it came, fused, and with the float64 specification in place of its LiteMLA."""

    original: nn.Module
    fused: nn.Module
    truth: nn.Module
    report: Report


def make_twins(model: nn.Module, backend: str = "auto") -> Twins:
    """Copies of `model` in eval mode; the model itself is left alone.

    Raises:
        ValueError: the model holds no LiteMLA that `accelerate` knows.
    """
    original = copy.deepcopy(model).eval()
    fused = copy.deepcopy(original)
    report = accelerate(fused, backend)
    if not report.swapped:
        raise ValueError(f"verify: model must contain a known LiteMLA, got one with: {report}")
    truth = copy.deepcopy(original)
    accelerate(truth, "reference")
    return Twins(original, fused, truth.double(), report)


def verify_model(
    model: nn.Module, x: Tensor, backend: str = "auto", progress: Callable[[str], None] = print
) -> ModelResult:
    """Judges the fused `model` on the input `x` under rule T, in the dtype of the model.

    Truth is the model with the specification in float64; the baseline is the model as it came.
    """
    return verify_twins(make_twins(model, backend), x, progress)


def verify_twins(twins: Twins, x: Tensor, progress: Callable[[str], None]) -> ModelResult:
    """The whole model, then every layer on the input that it got in the fused model."""
    names = [swap.name for swap in twins.report.swapped]
    inputs: dict[str, Tensor] = {}
    progress("whole model: numbers")
    before = native_calls()
    with torch.no_grad():
        with record_inputs(twins.fused, names, inputs):
            ours = first_tensor(twins.fused(x))
        native = native_calls() - before >= len(names)
        output = rule_t(ours, first_tensor(twins.truth(x.double())), first_tensor(twins.original(x)))
    layers = []
    for name, layer_input in inputs.items():
        progress(f"{name}: numbers")
        layers.append(verify_layer(name, twins, layer_input))
    return ModelResult(layers, output, twins.report, inputs, native)


def verify_layer(name: str, twins: Twins, x: Tensor) -> LayerResult:
    """Output and input gradient of one layer, with a fixed random grad_out.

    Of the many q and k of a layer, some lie within a rounding of 0, where relu has no derivative: the side that a
    rounding takes decides a whole term of a gradient, of the fused module's or the original's. A gradient that misses
    rule T on `x` is therefore judged again on `x` with a hundredth of noise, up to three times; a fault fails on each.
    """
    result = _judge_layer(name, twins, x)
    for seed in range(3):
        if result.grad_input.ok or not result.output.ok:
            break
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        noisy = x + (0.01 * float(x.double().std()) * noise).to(device=x.device, dtype=x.dtype)
        result = replace(result, grad_input=_judge_layer(name, twins, noisy).grad_input)
    return result


def _judge_layer(name: str, twins: Twins, x: Tensor) -> LayerResult:
    results = []
    for model, dtype in ((twins.fused, x.dtype), (twins.truth, torch.float64), (twins.original, x.dtype)):
        leaf = x.detach().to(dtype).requires_grad_()
        out = model.get_submodule(name)(leaf)
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rounded = grad_out.to(x.dtype).to(device=out.device, dtype=dtype)
        results.append((out.detach(), gradients(out, rounded, [leaf])[0]))
    (ours, truth, base) = results
    return LayerResult(name, tuple(x.shape), rule_t(ours[0], truth[0], base[0]), rule_t(ours[1], truth[1], base[1]))


class record_inputs:
    """While active, keeps the first input of every named submodule in `inputs`."""

    def __init__(self, model: nn.Module, names: list[str], inputs: dict[str, Tensor]) -> None:
        self._hooks: list[Any] = []
        self._model, self._names, self._inputs = model, names, inputs

    def __enter__(self) -> None:
        for name in self._names:
            self._hooks.append(self._model.get_submodule(name).register_forward_pre_hook(self._keep(name)))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._inputs.setdefault(name, arguments[0].detach().clone(memory_format=torch.preserve_format))

        return hook


def first_tensor(output: object) -> Tensor:
    """The first tensor of a model's output, which may be a tensor, list, dict or dataclass of tensors."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise TypeError(f"verify: model must return a tensor or a structure of tensors, got {type(output).__name__}")


def load_model(source: str, checkpoint: str | None = None, pretrained: bool = False) -> nn.Module:
    """A timm model by name, or "module:callable" that returns a module; then the weights of a checkpoint.

    Random weights come from seed 0.

    Args:
        checkpoint: what `models.checkpoint.load_weights` takes as its source; any of its errors may be raised.
    """
    torch.manual_seed(0)
    if ":" in source:
        module_name, _, attribute = source.partition(":")
        model = getattr(importlib.import_module(module_name), attribute)
        model = model if isinstance(model, nn.Module) else model()
    else:
        import timm

        model = timm.create_model(source, pretrained=pretrained)
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify: model must be a torch.nn.Module, got {type(model).__name__}")
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def calibrate_batch_norms(model: nn.Module, x: Tensor) -> None:
    """Sets the statistics of every BatchNorm to those of `x`, for models with random weights: without it, activations
    shrink or grow from layer to layer until nothing can be compared."""
    norms = list(_batch_norms(model))
    momenta = [norm.momentum for norm in norms]
    training = model.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all passes
    with torch.no_grad():
        model.train()
        model(x)
        model.train(training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _batch_norms(model: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.track_running_stats)
