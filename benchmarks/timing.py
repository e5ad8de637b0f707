"""Shuffled blocks, so that every provider meets the same disturbances; and the roofs of the machine.

In each round every provider runs one block, in a random order: a pause, then three calls, the first not counted. The
pause lets the thread pools of the one before, which spin on for some milliseconds after a call, fall asleep.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from benchmarks.providers import Step

PAUSE = 0.010
COUNTED_CALLS = 2
ROUNDS = 15
SHORT = 0.005  # seconds of a call

Samples = dict[str, list[list[float]]]  # provider -> per round -> seconds of the counted calls


def shuffled_blocks(bind: Callable[[int], Mapping[str, Step]], rounds: int, training: bool) -> Samples:
    """`bind(round)` gives the round's calls, one per provider, on fresh inputs."""
    order = random.Random(0)
    samples: Samples = {}
    with torch.set_grad_enabled(training), _no_garbage_collection():
        for number in range(rounds):
            steps = bind(number)
            samples = samples or {name: [] for name in steps}
            for name in order.sample(list(steps), len(steps)):
                samples[name].append(_block(steps[name]))
    return samples


def rounds_for(step: Step, training: bool) -> int:
    """ROUNDS, and up to four times as many for short calls, which a disturbance hits harder."""
    with torch.set_grad_enabled(training):
        seconds = min(_block(step))
    return ROUNDS * max(1, min(4, math.ceil(SHORT / seconds)))


def _block(step: Step) -> list[float]:
    time.sleep(PAUSE)
    step()
    times = []
    for _ in range(COUNTED_CALLS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def median_seconds(samples: list[list[float]]) -> float:
    return statistics.median(seconds for block in samples for seconds in block)


def ratios(numerator: list[list[float]], denominator: list[list[float]]) -> list[float]:
    """One per round: what the two have met in the same round cancels."""
    return [sum(upper) / sum(lower) for upper, lower in zip(numerator, denominator, strict=True)]


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


# Square ones, and the qkv products of two layers.
ROOF_PRODUCTS = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (8192, 256, 768), (2048, 512, 1536))
ROOF_COPY_BYTES = 2**28  # beyond the caches of most machines


def measure_roofs(repeats: int) -> dict[str, float]:
    """The best that torch.mm and a copy reach in float32 at the current thread count: GFLOP/s and GB/s."""
    best = 0.0
    for rows, inner, columns in ROOF_PRODUCTS:
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        out = torch.empty(rows, columns)
        seconds = _best_seconds(lambda a=left, b=right, c=out: torch.mm(a, b, out=c), repeats)  # type: ignore[misc]
        best = max(best, 2 * rows * inner * columns / seconds / 1e9)
    source = torch.randn(ROOF_COPY_BYTES // 4)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), repeats)
    return {"mm_gflops": best, "copy_gb_per_s": 2 * ROOF_COPY_BYTES / seconds / 1e9}


def _best_seconds(step: Step, repeats: int) -> float:
    with torch.no_grad():
        return min(min(_block(step)) for _ in range(repeats))
