"""A model, data and settings small enough that a training run takes a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from efficientvit_kernels import FusedLiteMLA
from efficientvit_kernels.models.blocks import residual
from efficientvit_kernels.nn.conv import ConvLayer
from efficientvit_kernels.training import Ranks, Settings, Trainer


def small_model(norm: str | None = "bn2d", dropout: float = 0.2) -> nn.Sequential:
    """A convolution, an attention with drop path, dropout and a classifier of 4."""
    torch.manual_seed(3)
    attention = residual(FusedLiteMLA(16, 16, dim=8, norm=(None, norm)))
    attention.drop_path = dropout
    return nn.Sequential(
        ConvLayer(3, 16, 3, stride=2, use_bias=norm is None, norm=norm, act_func="hswish"),
        attention,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(16, 4),
    )


class Noisy(Dataset[tuple[Tensor, int]]):
    """20 images of 8 x 8, each with new noise whenever it is read."""

    def __init__(self, noise: float = 0.1) -> None:
        self.images = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(5))
        self.noise = noise

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] + self.noise * torch.randn(3, 8, 8), index % 4


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images).float(), labels)


def settings(out: Path, **others: Any) -> Settings:
    """Eight steps of four images; a row of train.csv each three steps."""
    return Settings(**{"out": out, "steps": 8, "batch": 4, "lr": 0.01, "warmup": 2, "log_every": 3, **others})


def trainer(out: Path, model: nn.Module | None = None, loss: Any = loss_of, **others: Any) -> Trainer:
    return Trainer(model or small_model(), loss, settings(out, **others), Ranks())


def everything(run: Trainer) -> dict[str, Tensor]:
    """All tensors that a step changes."""
    found = {f"model {key}": value for key, value in run.model.state_dict().items()}
    if run.average is not None:
        found |= {f"average {key}": value for key, value in run.average.state_dict().items()}
    for i, state in run.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {i} {key}": value for key, value in state.items()}
    return found


def differing(a: Trainer, b: Trainer) -> list[str]:
    """The tensors whose bits are not equal."""
    first, second = everything(a), everything(b)
    assert first.keys() == second.keys()
    return [key for key, value in first.items() if not torch.equal(value, second[key])]
