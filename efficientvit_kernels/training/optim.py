"""Schedule, weight decay and average of the weights: what torch's own classes are given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The two groups for an optimiser: weights, and without weight decay biases and the vectors of norms.

    Biases and norms are the parameters with one axis (or none); frozen parameters are left out.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def cosine_with_warmup(step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate in step `step` (from 0): from 1 / warmup linearly to 1, then a half cosine to 0.

    The steps after the warm-up have (1 + cos(pi t)) / 2 with t = (step - warmup) / (steps - warmup), so the last step
    is small, but not 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))) / 2


def ema_decay(step: int, decay: float) -> float:
    """min(decay, (step + 1) / (step + 10)): early on the average forgets the random start it was made of."""
    return min(decay, (step + 1) / (step + 10))


@torch.no_grad()
def average_into(averages: tuple[Tensor, ...] | list[Tensor], values: Any, decay: float) -> None:
    """average = decay * average + (1 - decay) * value; counters, which are integers, are copied."""
    if averages[0].is_floating_point():
        torch._foreach_lerp_(averages, values, 1 - decay)
    else:
        for average, value in zip(averages, values, strict=True):
            average.copy_(value)
