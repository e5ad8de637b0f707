"""One layer, one op, several providers: results checked against float64, then times in a stream and in a graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import device
from benchmarks.gpu.calls import proof_of_native
from benchmarks.gpu.parts import Context
from benchmarks.peers import OfficialLiteMLA, compiled, fold
from benchmarks.providers import LAYOUTS, Dims, Provider, Settings, tensors, torch_provider
from benchmarks.registry import OPS, Op, make_layer
from benchmarks.run import PEER_TOLERANCE
from benchmarks.shapes import Shape
from efficientvit_kernels.testing import rule_t

MODE = "max-autotune-no-cudagraphs"  # the graph is captured here, as for every other provider
TRIES = 3  # inputs on which a gradient may miss rule T by a relu that a rounding decides
# "tf32" is float32 with products in tf32 for every provider; in "float32" they are IEEE float32 for every provider.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}


@dataclass
class Row:
    """`layout` is that of the inputs of ours; peers come in every layout that is asked for."""

    op: Op
    shape: Shape
    dtype_name: str
    settings: Settings
    layer: nn.Module
    providers: dict[str, Provider] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        return self.op.flops_of(self.shape, self.settings.training)

    @property
    def fewest_bytes(self) -> int:
        return self.op.fewest_bytes(self.shape, self.settings)


def make_row(op: str, shape: Shape, dtype_name: str, layout: str, training: bool, context: Context) -> Row:
    settings = Settings(DTYPES[dtype_name], layout, training=training)
    layer = make_layer(shape, settings).to(context.device)
    return Row(OPS[op], shape, dtype_name, settings, layer)


def add(row: Row, name: str, make: Callable[[], Provider]) -> None:
    """A provider, or the reason why there is none."""
    try:
        row.providers[name] = make()
    except Exception as error:  # whatever a compiler or a backend raises
        row.left_out[name] = reason_of(error)


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def add_eager(row: Row, layouts: Sequence[str] = tuple(LAYOUTS)) -> None:
    for layout in layouts:
        official = row.op.official(_copy(row.layer))
        add(row, f"eager {layout}", lambda m=official, where=layout: torch_provider(m, row.settings, where))  # type: ignore[misc]
        if isinstance(official, OfficialLiteMLA) and not row.settings.training:
            folded = fold(official)
            add(row, f"folded {layout}", lambda m=folded, where=layout: torch_provider(m, row.settings, where))  # type: ignore[misc]


def add_compiled(row: Row, layouts: Sequence[str] = tuple(LAYOUTS), mode: str | None = MODE) -> None:
    torch.compiler.reset()
    for layout in layouts:
        official = row.op.official(_copy(row.layer))
        add(row, f"compile {layout}", lambda m=official, where=layout: compiled(m, row.settings, mode, where))  # type: ignore[misc]


def add_ours(row: Row, backends: Sequence[str]) -> None:
    for backend in backends:
        module = _copy(row.layer)
        add(row, f"ours {backend}", lambda m=module, b=backend: torch_provider(row.op.ours(m, b), row.settings))  # type: ignore[misc]


def _copy(layer: nn.Module) -> Any:
    return copy.deepcopy(layer)


def fresh(row: Row, number: int, context: Context) -> tuple[list[Tensor], list[Tensor]]:
    """Random inputs, and gradients of the outputs in training, other ones for each number."""
    generator = torch.Generator(context.device).manual_seed(number)

    def draw(shapes: list[Dims]) -> list[Tensor]:
        drawn = [torch.randn(shape, generator=generator, device=context.device) for shape in shapes]
        return [x.to(row.settings.dtype).contiguous(memory_format=LAYOUTS[row.settings.layout]) for x in drawn]

    inputs = draw(row.op.inputs(row.shape))
    return inputs, draw(row.op.outputs(row.shape)) if row.settings.training else []


def check(row: Row, context: Context) -> dict[str, Any]:
    """Ours by rule T, on up to three inputs in training; peers that compute something else are left out.

    Gradients of the parameters are among the results. "failed" names what does not hold.
    """
    tries: list[str] = []
    while True:
        result = _check_on(row, len(tries), context)
        if "failed" not in result or not row.settings.training or len(tries) == TRIES - 1:
            return result | {"retried": tries}
        tries.append(result["failed"])


def _check_on(row: Row, number: int, context: Context) -> dict[str, Any]:
    inputs, grad_outs = fresh(row, 1000 + number, context)
    wide = Settings(torch.float64, row.settings.layout, training=row.settings.training)
    exact = torch_provider(row.op.truth(_copy(row.layer).double()), wide)
    with device.tf32(row.dtype_name == "tf32"), torch.set_grad_enabled(row.settings.training):
        truth = tensors(exact.bind([x.double() for x in inputs], [g.double() for g in grad_outs])())
        base_module = row.op.official(_copy(row.layer))
        base = tensors(torch_provider(base_module, row.settings).bind(inputs, grad_outs)())
        errors, worst, wrong = {"official": relative_error(base, truth)}, {}, []
        for name in list(row.providers):
            # "ours cuda", or "ours cuda, in some way"
            backend = name.removeprefix("ours ").partition(",")[0] if name.startswith("ours ") else "reference"
            try:
                with proof_of_native(backend):
                    found = tensors(row.providers[name].bind(inputs, grad_outs)())
            except Exception as error:
                row.left_out[name] = reason_of(error)
                del row.providers[name]
                continue
            errors[name] = relative_error(found, truth)
            if backend != "reference":
                verdicts = [rule_t(*triple) for triple in zip(found, truth, base, strict=True)]
                worst[name] = max(v.error / v.budget if v.budget else float(v.error > 0) for v in verdicts)
                wrong += [f"{name}, result {i}: {v}" for i, v in enumerate(verdicts) if not v.ok]
            elif not errors[name] <= max(PEER_TOLERANCE[row.settings.dtype], 4 * errors["official"]):
                row.left_out[name] = f"its results are wrong: relative error {errors[name]:.3g}"
                del row.providers[name]
    result: dict[str, Any] = {"relative_errors": errors, "worst_share_of_budget": worst}
    return result | ({"failed": "; ".join(wrong)} if wrong else {})


def relative_error(results: list[Tensor], truth: list[Tensor]) -> float:
    pairs = zip(results, truth, strict=True)
    errors = [(found.double() - exact).abs().max() / exact.abs().max() for found, exact in pairs]
    return float(torch.stack(errors).detach().max())  # NaN if one is


def measure(row: Row, context: Context, in_graphs: bool = True) -> dict[str, Any]:
    """Times of every provider, in a stream and in a graph, all interleaved; memory and launches of each."""
    in_graphs = in_graphs and context.on_gpu
    sets = device.input_sets(_bytes_of_inputs(row), context)
    given = [fresh(row, number, context) for number in range(sets)]
    names: dict[str, device.Timed] = {}
    result: dict[str, Any] = {"input_sets": sets, "memory": {}, "launches": {}}
    with device.tf32(row.dtype_name == "tf32"), torch.set_grad_enabled(row.settings.training):
        for name in list(row.providers):
            try:
                calls = [row.providers[name].bind(*one) for one in given]
                length = 2 if context.quick else device.row_length(calls[0], context)
                names[f"{name} | stream"] = device.in_stream(calls, length)
                if in_graphs:
                    names[f"{name} | graph"] = device.in_graph(calls, length)
                if context.on_gpu:
                    result["memory"][name] = device.peak_bytes(calls[0])
                    result["launches"][name] = _launches(calls[0])
            except Exception as error:
                row.left_out[name] = reason_of(error)
        if not names:
            return result | {"left_out": row.left_out}
        samples = device.interleaved(names, context)
    result["median_us"] = device.medians(samples)
    result["samples_us"] = device.rounded(samples)
    result["left_out"] = row.left_out
    result["notes"] = {name: provider.note for name, provider in row.providers.items() if provider.note}
    return result


def _launches(call: device.Call) -> dict[str, Any]:
    """A machine that forbids profiling costs this figure, not the times."""
    try:
        return device.launches(call)
    except Exception as error:
        return {"not_counted": reason_of(error)}


def _bytes_of_inputs(row: Row) -> int:
    return sum(math.prod(dims) for dims in row.op.inputs(row.shape)) * row.settings.dtype.itemsize
