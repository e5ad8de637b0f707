"""Timing on a GPU by events, in a stream and in a CUDA graph; the same calls on a CPU by the clock."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.parts import Context

Call = Callable[[], object]
Samples = dict[str, list[float]]  # name -> microseconds per call, one per counted run

TARGET_S = 0.25  # of measuring, per name
ROUNDS = (5, 40)
COUNTED = 2  # runs of a name in a round, after one that is not counted
CALLS = 20  # in a row, for short calls
ROW_US = 2000.0
WARM_UP = 3
BEYOND_L2 = 2.5  # times the L2 cache: what the rotating inputs fill
MOST_SETS = 64
DEFAULT_L2 = 50 * 2**20
NOT_LAUNCHES = ("Synchronize", "CompiledFxGraph", "Torch-Compiled")  # what else the profiler puts on the device


@dataclass(frozen=True)
class Timed:
    """`run` makes `calls` calls of what is measured. `keep`: what must live as long as the graph."""

    run: Call
    calls: int = 1
    keep: tuple[object, ...] = field(default=(), repr=False)


def synchronize(context: Context) -> None:
    if context.on_gpu:
        torch.cuda.synchronize()


def l2_bytes(context: Context) -> int:
    if not context.on_gpu:
        return 2**20
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or DEFAULT_L2)


def input_sets(bytes_of_one: int, context: Context) -> int:
    """How many sets of inputs must rotate so that none is still in the L2 cache when its turn comes again."""
    if context.quick:
        return 2
    return max(1, min(MOST_SETS, math.ceil(BEYOND_L2 * l2_bytes(context) / max(bytes_of_one, 1))))


def in_stream(calls: Sequence[Call], least: int = CALLS) -> Timed:
    """The calls one after the other, again and again up to `least`: what a program without a graph sees."""
    repeats = max(1, math.ceil(least / len(calls)))

    def run() -> None:
        for _ in range(repeats):
            for call in calls:
                call()

    return Timed(run, repeats * len(calls))


def in_graph(calls: Sequence[Call], least: int = CALLS) -> Timed:
    """The same in one CUDA graph. Outputs live on, so that they rotate as the inputs do."""
    repeats = max(1, math.ceil(least / len(calls)))
    graph, kept = captured(lambda: [call() for _ in range(repeats) for call in calls], calls)
    return Timed(graph.replay, repeats * len(calls), (graph, kept))


def captured(run: Call, warm_up: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, object]:
    """A graph of `run`, and its outputs. The calls of `warm_up` come first, on a side stream, so that nothing is
    compiled, planned or allocated for the first time within the capture."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            for call in warm_up[:2]:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


def interleaved(names: Mapping[str, Timed], context: Context, seconds: float = TARGET_S) -> Samples:
    """Rounds in which every name runs in a random order: one run that is not counted, then COUNTED that are."""
    for timed in names.values():
        timed.run()
    synchronize(context)
    once = {name: _one(timed, context) * timed.calls / 1e6 for name, timed in names.items()}
    budget = context.budget(seconds * len(names))
    most = 2 if context.quick else ROUNDS[1]
    rounds = int(max(2, min(most, budget / max(sum(once.values()) * (1 + COUNTED), 1e-9))))
    rounds = rounds if context.quick else max(rounds, min(ROUNDS[0], int(context.left() / sum(once.values()) / 4) + 1))
    order = random.Random(0)
    samples: Samples = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order.sample(list(names), len(names)):
                names[name].run()
                samples[name] += [_one(names[name], context) for _ in range(COUNTED)]
    finally:
        gc.enable()
    return samples


def _one(timed: Timed, context: Context) -> float:
    """Microseconds per call of one run."""
    if not context.on_gpu:
        start = time.perf_counter()
        timed.run()
        return 1e6 * (time.perf_counter() - start) / timed.calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    timed.run()
    last.record()
    last.synchronize()
    return float(1e3 * first.elapsed_time(last) / timed.calls)


def row_length(call: Call, context: Context) -> int:
    """Calls in a row: about two milliseconds of them, but a few at least and not more than CALLS."""
    call()
    return max(2, min(CALLS, math.ceil(ROW_US / max(_one(Timed(call), context), 1e-3))))


def microseconds(run: Call, context: Context, calls: int = 1) -> float:
    """Median of one thing alone."""
    return statistics.median(interleaved({"": Timed(run, calls)}, context)[""])


def best(calls: Sequence[Call], context: Context, least: int = CALLS) -> float:
    """Median microseconds per call, in a graph where there is a GPU."""
    timed = in_graph(calls, least) if context.on_gpu else in_stream(calls, 2)
    return statistics.median(interleaved({"": timed}, context)[""])


def rounded(samples: Samples) -> Samples:
    return {name: [round(value, 2) for value in values] for name, values in samples.items()}


def medians(samples: Samples) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def launches(call: Call) -> dict[str, Any]:
    """What one call puts on the device, by name, as the profiler sees it: kernels, copies and fills."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    on_device = [event.name for event in trace.events() if str(event.device_type).endswith("CUDA")]
    names = Counter(name[:80] for name in on_device if not any(word in name for word in NOT_LAUNCHES))
    return {"launches": sum(names.values()), "kernels": dict(names.most_common(20))}


def peak_bytes(call: Call) -> int:
    """The most that one call holds at once beyond what was there before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return int(torch.cuda.max_memory_allocated() - before)


class OpsCalled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The registered ops of this package that ran meanwhile: proof of which backend served a call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "efficientvit_kernels":
            self.names.append(func._schema.name.removeprefix("efficientvit_kernels::"))
        return func(*args, **(kwargs or {}))


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products of float32 in tf32 or in IEEE float32: torch's own default differs between convolution and matmul."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = allowed, allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
