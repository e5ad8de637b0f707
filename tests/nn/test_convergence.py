"""Training with the fused modules goes as it does with the reference; a wrong gradient would be seen."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.convergence import Comparison, Run, compare, distance, load_digits, model_of, train
from efficientvit_kernels import LiteMLA

SEEDS, STEPS = (0, 1), 80


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad, None


def with_wrong_gradients(model: nn.Module, factor: float) -> nn.Module:
    """The reference, but the gradients that leave the attention for qkv and the aggregations are scaled."""
    for module in model.modules():
        if isinstance(module, LiteMLA):
            attend = module._attend
            module._attend = lambda multi_scale, attend=attend: attend(  # type: ignore[method-assign, misc]
                [ScaledGradient.apply(tensor, factor) for tensor in multi_scale]
            )
    return model


@functools.cache
def comparison(autocast: bool) -> Comparison:
    return compare(SEEDS, STEPS, autocast)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_loss_curves_agree_within_two_seeds(autocast: bool) -> None:
    result = comparison(autocast)
    assert all(run.native_calls > 0 for run in result.fused)
    assert not any(run.native_calls for run in result.reference)
    assert result.agree, f"apart: {result.distances}; two seeds: {result.spread}"
    assert min(result.accuracies) > 0.9, result.accuracies


@pytest.mark.parametrize("factor", [-1.0, 0.0], ids=["flipped", "lost"])
def test_wrong_gradients_of_the_attention_do_not_agree(factor: float) -> None:
    reference = comparison(False).reference
    seed = SEEDS[0]
    wrong = train(with_wrong_gradients(model_of(seed), factor), load_digits(), seed, STEPS, False)
    assert not Comparison(reference, [wrong, reference[1]]).agree
    assert distance(reference[0], wrong) > 2 * comparison(False).spread


def test_nan_does_not_agree() -> None:
    runs = [Run([2.0 / (seed + step) for step in range(1, 30)], 1.0, 0) for seed in (0, 1)]
    broken = Run([*runs[0].losses[:-1], math.nan], 1.0, 0)
    assert Comparison(runs, runs).agree
    assert not Comparison(runs, [broken, runs[1]]).agree
