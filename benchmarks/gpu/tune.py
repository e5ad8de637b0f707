"""Times what the launch plan and the configuration tables choose from; both are edited by hand.

So far the plan of the CUDA kernels alone offers a choice: lite_mla in two or in four launches, where both are served.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

from torch import Tensor, nn

from benchmarks.gpu import rows
from benchmarks.gpu.calls import runnable
from benchmarks.gpu.parts import Context, FailedError, NotRunError, Step
from benchmarks.providers import torch_provider
from benchmarks.shapes import B_AND_L_SERIES, Shape
from efficientvit_kernels.ops import _cuda_lite_mla

BATCHES = (1, 8, 64)
MOST_PIXELS = 2**17


def steps(context: Context) -> list[Step]:
    shapes = [
        replace(shape, batch=batch)
        for shape in B_AND_L_SERIES
        for batch in BATCHES
        if shape.channels <= _cuda_lite_mla.WIDEST_OF_TWO_LAUNCHES and batch * shape.pixels <= MOST_PIXELS
    ]
    chosen = shapes[:1] if context.quick else shapes
    return [Step(f"launches, {shape.name}, batch {shape.batch}", partial(time_launches, shape), 8) for shape in chosen]


class InLaunches(nn.Module):
    """A module whose lite_mla takes two launches, or does not, whatever the plan prefers."""

    def __init__(self, module: nn.Module, two: bool) -> None:
        super().__init__()
        self.module, self.two = module, two

    def forward(self, *inputs: Tensor) -> Any:
        two_launches, served = _cuda_lite_mla.two_launches, []

        def chosen(*arguments: Any) -> list[Tensor]:
            y = two_launches(*arguments, always=True) if self.two else []
            served.extend(y)
            return y

        with mock.patch.object(_cuda_lite_mla, "two_launches", chosen):
            y = self.module(*inputs)
        if self.two and not served:
            raise NotImplementedError("two launches do not serve this layer here")
        return y


def time_launches(shape: Shape, context: Context) -> dict[str, Any]:
    if "cuda" not in runnable(context.device):
        raise NotRunError("the cuda backend cannot run here")
    row = rows.make_row("lite_mla", shape, "float16", "nchw", False, context)
    for name, two in (("ours cuda, two launches", True), ("ours cuda, four launches", False)):
        module = InLaunches(row.op.ours(row.layer, "cuda"), two)
        rows.add(row, name, lambda m=module: torch_provider(m, row.settings))  # type: ignore[misc]
    found: dict[str, Any] = {"shape": shape.name, "batch": shape.batch} | rows.check(row, context)
    if "failed" in found:
        raise FailedError(found["failed"][:500], found)
    return found | rows.measure(row, context)
