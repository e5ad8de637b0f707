"""The kernels under pytest-benchmark, ours and eager in one group: pytest benchmarks --benchmark-only

A quick look for development. malloc gives memory back between the calls here, which slows eager down; published figures
come from `python -m efficientvit_kernels bench`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.providers import Settings, random_tensors
from benchmarks.registry import OPS, make_workload
from benchmarks.shapes import CASES, SINGLE_OPS, Shape

SHAPES = (SINGLE_OPS[0], CASES[0], CASES[4])


@pytest.mark.parametrize("provider", ["ours", "eager"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("op", list(OPS))
def test_kernel(benchmark: Any, op: str, shape: Shape, training: bool, provider: str) -> None:
    entry = OPS[op]
    reason = entry.why_not()
    if reason is not None:
        pytest.skip(f"{op}: {reason}")
    settings = Settings(training=training)
    inputs = random_tensors(entry.inputs(shape), settings.dtype, settings.layout, 0)
    grad_outs = random_tensors(entry.outputs(shape), settings.dtype, settings.layout, 1)
    step = make_workload(entry, shape, settings, ()).providers[provider].bind(inputs, grad_outs)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    benchmark.group = f"{op}, {shape.name}, {'training' if training else 'inference'}"
    try:
        with torch.set_grad_enabled(training):
            benchmark.pedantic(step, rounds=15, iterations=2, warmup_rounds=2)
    finally:
        torch.set_num_threads(threads)
