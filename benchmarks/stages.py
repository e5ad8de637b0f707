"""Where the time of a LiteMLA goes: ours as the library counts it, the official module's by torch's profiler."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.providers import Settings, random_tensors
from benchmarks.shapes import Shape
from efficientvit_kernels._library import stage_seconds

Stages = list[dict[str, Any]]  # one row per stage: stage, ms, gflops, share


def our_stages(layer: nn.Module, shape: Shape, settings: Settings, flops: dict[str, float], rounds: int) -> Stages:
    """What the library itself counts, in CPU time: summed over threads, medians over `rounds` calls."""
    aggregation, attention = flops.get("depthwise", 0.0) + flops.get("grouped 1x1", 0.0), flops["attention products"]
    own_flops = {
        "qkv product": flops["qkv product"],
        "state": 2 / 3 * aggregation + attention / 2,
        "query": aggregation / 3 + attention / 2,
        "projection": flops["proj product"],
    }
    runs: dict[str, list[float]] = defaultdict(list)
    dims = (shape.batch, shape.channels, shape.height, shape.width)
    with torch.no_grad():
        for number in range(rounds + 1):
            (x,) = random_tensors([dims], settings.dtype, settings.layout, number)
            with stage_seconds() as seconds:
                start = time.process_time()
                layer(x)
                whole = time.process_time() - start
            if number:  # the first call warms up
                for stage, value in (seconds | {"Python and the rest": whole - sum(seconds.values())}).items():
                    runs[stage].append(value)
    medians = {stage: statistics.median(values) for stage, values in runs.items()}
    return _table(medians, own_flops, sum(medians.values()))


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
