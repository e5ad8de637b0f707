"""Where the time of a LiteMLA goes: ours op by op, the official module's by torch's profiler."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.providers import Settings, Step, random_tensors
from benchmarks.registry import aggregation_weights
from benchmarks.shapes import Shape
from benchmarks.timing import median_seconds, shuffled_blocks
from efficientvit_kernels import LiteMLA

Stages = list[dict[str, Any]]  # one row per stage: stage, ms, gflops, share


def our_stages(layer: LiteMLA, shape: Shape, settings: Settings, flops: dict[str, float], rounds: int) -> Stages:
    """The native ops called one by one, the two dense products as torch.mm at their shapes, and the module as it is.

    The share is that of the module's time: below 1 in sum, where the module also does something else.
    """
    ops = torch.ops.efficientvit_kernels
    weights = [[weight.detach() for weight in kind] for kind in aggregation_weights(layer.aggreg)]
    width, pixels = shape.groups * shape.dim, shape.height * shape.width
    qkv_weight, proj_weight = (conv.weight.detach().flatten(1) for conv in (layer.qkv.conv, layer.proj.conv))

    def bind(number: int) -> dict[str, Step]:
        def fresh(channels: int, seed: int) -> Tensor:
            dims = (shape.batch, channels, shape.height, shape.width)
            return random_tensors([dims], settings.dtype, settings.layout, 10 * number + seed)[0]

        x, qkv = fresh(shape.channels, 0), fresh(3 * shape.channels, 1)
        scales = [qkv, *(fresh(3 * shape.channels, 2 + i) for i in range(len(shape.scales)))]
        columns = [torch.randn(rows, pixels).to(settings.dtype) for rows in (shape.channels, width)]
        steps: dict[str, Step] = {
            "qkv product": _repeat(shape.batch, lambda: torch.mm(qkv_weight, columns[0])),
            "attention": lambda: ops.relu_linear_attention_fwd(scales, shape.dim, layer.eps),
            "proj product": _repeat(shape.batch, lambda: torch.mm(proj_weight, columns[1])),
            "whole module": lambda: layer(x),
        }
        if shape.scales and hasattr(ops, "multiscale_aggregate_fwd"):
            steps["aggregation"] = lambda: ops.multiscale_aggregate_fwd(qkv, *weights, [], [], shape.dim)
        return steps

    samples = shuffled_blocks(bind, rounds, training=False)
    seconds = {name: median_seconds(samples[name]) for name in _in_order(samples)}
    return _table(seconds, flops, seconds["whole module"])


def official_stages(
    module: nn.Module, shape: Shape, settings: Settings, flops: dict[str, float], rounds: int
) -> Stages:
    """The outermost torch ops of the official module under the profiler, in medians over `rounds` calls."""
    runs: dict[str, list[float]] = defaultdict(list)
    dims = (shape.batch, shape.channels, shape.height, shape.width)
    with torch.no_grad():
        for number in range(rounds + 1):
            (x,) = random_tensors([dims], settings.dtype, settings.layout, number)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                module(x)
            if number:  # the first call warms up
                for stage, microseconds in _outermost(profile.events(), len(shape.scales)).items():
                    runs[stage].append(microseconds / 1e6)
    seconds = {stage: statistics.median(values) for stage, values in runs.items()}
    return _table(seconds, flops, sum(seconds.values()))


def _outermost(events: Any, scales: int) -> dict[str, float]:
    """Microseconds per stage; convolutions are told apart by their order, everything else by its name."""
    convolutions = iter(["qkv product", *["depthwise", "grouped 1x1"] * scales, "proj product"])
    products = iter(["attention products"] * 2)
    names: dict[str, Callable[[], str]] = {
        "aten::conv2d": lambda: next(convolutions),
        "aten::matmul": lambda: next(products),
        "aten::batch_norm": lambda: "norm",
    }
    found: dict[str, float] = defaultdict(float)
    for event in sorted((e for e in events if e.cpu_parent is None), key=lambda e: e.time_range.start):
        stage = names.get(event.name, lambda name=event.name: name.removeprefix("aten::"))()
        found[stage] += event.cpu_time_total
    return found


def _repeat(count: int, step: Step) -> Step:
    """One product per image."""

    def repeated() -> None:
        for _ in range(count):
            step()

    return repeated


def _in_order(names: Iterable[str]) -> list[str]:
    order = ["qkv product", "aggregation", "attention", "proj product", "whole module"]
    return sorted(names, key=order.index)


def _table(seconds: dict[str, float], flops: dict[str, float], whole: float) -> Stages:
    """Stages without arithmetic of their own and below a hundredth of the whole are summed up as "other"."""
    rows: Stages = []
    other = 0.0
    for stage, value in seconds.items():
        if stage not in flops and value < 0.01 * whole:
            other += value
            continue
        gflops = flops[stage] / value / 1e9 if stage in flops else None
        rows.append({"stage": stage, "ms": 1e3 * value, "gflops": gflops, "share": value / whole})
    if other:
        rows.append({"stage": "other", "ms": 1e3 * other, "gflops": None, "share": other / whole})
    return rows
