"""The command line in this process, and models whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientvit_kernels.__main__ import main
from efficientvit_kernels.models.dc_ae import DCAE, DCAEConfig
from efficientvit_kernels.tasks import job


def results(out: Path) -> dict[str, Any]:
    (path,) = out.glob("*.json")
    content: dict[str, Any] = json.loads(path.read_text())
    assert path.name == f"{content['command']}.json"
    return content


def run(command: str, model: str, out: Path, *arguments: object) -> int:
    """`python -m efficientvit_kernels COMMAND ...` in this process; the exit status."""
    try:
        return main([command, "--model", model, "--out", str(out), *map(str, arguments)])
    except SystemExit as error:  # argparse's way to end
        return int(str(error.code))


def use_model(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """The commands get this model, whatever the name."""
    monkeypatch.setattr(job, "create_model", lambda *_, **__: model)


class Colours(nn.Module):
    """Segmentation whose answer is known: class 0, 1 or 2 where red, green or blue is strongest; 16 others nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        return F.pad(F.avg_pool2d(x, 8) * self.scale, (0, 0, 0, 0, 0, 16), value=-100.0)


class Nearest(nn.Module):
    """Super-resolution by repetition: what is done tile by tile must equal what is done at once."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        return F.interpolate(x * self.scale, scale_factor=2, mode="nearest")


class NotFinite(nn.Module):
    """NaN of the shape that classifiers give."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.new_full((len(x), 1000), torch.nan)


def tiny_dc_ae() -> DCAE:
    """Random weights, compression ratio 8."""
    torch.manual_seed(0)
    config = DCAEConfig(
        8, widths=(16, 32, 64, 64), encoder_depths=(0, 1, 1, 1), decoder_depths=(0, 1, 1, 1), residual_stages=2
    )
    return DCAE(config).eval()
