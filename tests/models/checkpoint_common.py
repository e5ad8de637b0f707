"""What the tests of checkpoints share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficientvit_kernels.models.checkpoint import CheckpointError, load_weights


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def refused(model: nn.Module, source: Any, **options: Any) -> str:
    """The cause for which `source` is refused; the model must stay as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(model, source, **options)
    assert equal(before, model.state_dict())
    assert str(error.value) == f"checkpoint {source}: {error.value.cause}"
    return error.value.cause
