"""What a training run is told, and the command-line options that say it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

AMP = ("off", "bf16", "fp16")


@dataclass(frozen=True)
class Settings:
    """One training run; `Trainer` obeys it.

    out: folder for last.pt (the run's state), weights.pt (the result), train.csv, eval.csv and tensorboard/.
    steps, batch: batches in the whole run, and images in each, over all ranks together.
    lr, warmup, weight_decay, clip: AdamW's highest learning rate; steps of warm-up before the cosine; decay of the
        weights (never of biases and norms); largest norm of the gradient, 0 for no limit.
    ema: decay of the average of the weights that is evaluated and saved; 0 for none.
    amp: "off", "bf16" or "fp16" (with a GradScaler).
    channels_last: layout of model and images.
    seed: of the order and the random changes of the images (and, in the examples, of the initialisation).
    workers: processes that read images.
    log_every, eval_every, save_every: steps between rows of train.csv, evaluations, and states on disk; 0 for the end
        only.
    resume: go on from last.pt. stop_after: end this call after so many steps, to go on with `resume`; 0 for none.
    """

    out: Path
    steps: int
    batch: int
    lr: float
    warmup: int = 0
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.999
    amp: str = "off"
    channels_last: bool = False
    seed: int = 0
    workers: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 200
    resume: bool = False
    stop_after: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup", "weight_decay", "clip", "seed", "workers", "eval_every", "save_every", "stop_after"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("lr", 0 < self.lr < float("inf"), "positive")
        self._check("ema", 0 <= self.ema < 1, "in [0, 1)")
        self._check("amp", self.amp in AMP, f"one of {', '.join(AMP)}")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"Settings: {name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same where a run goes on: all that its numbers depend on."""
        names = ("steps", "batch", "lr", "warmup", "weight_decay", "clip", "ema", "amp", "seed")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def of(cls, options: argparse.Namespace) -> Settings:
        """From options that `add_arguments` defined."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """One option per field of `Settings`, and --device, --threads, --timeout, --attention.

    defaults: by the fields' names.
    """
    add = parser.add_argument
    add("--out", type=Path, help="folder of the run", required="out" not in defaults)
    add("--steps", type=int, help="batches in the whole run (%(default)s)")
    add("--batch", type=int, help="images per step, over all ranks (%(default)s)")
    add("--lr", type=float, help="highest learning rate (%(default)s)")
    add("--warmup", type=int, default=0, help="steps of warm-up (%(default)s)")
    add("--weight-decay", type=float, default=0.05, help="of weights, not of biases and norms (%(default)s)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0: no limit (%(default)s)")
    add("--ema", type=float, default=0.999, help="decay of the averaged weights; 0: none (%(default)s)")
    add("--amp", choices=AMP, default="off", help="mixed precision; fp16 with a GradScaler (%(default)s)")
    add("--channels-last", action="store_true", help="layout of model and images")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--workers", type=int, default=0, help="processes that read images (%(default)s)")
    add("--log-every", type=int, default=10, help="steps between rows of train.csv (%(default)s)")
    add("--eval-every", type=int, default=0, help="steps between evaluations; 0: at the end only (%(default)s)")
    add("--save-every", type=int, default=200, help="steps between states on disk; 0: at the end only (%(default)s)")
    add("--resume", action="store_true", help="go on from last.pt in --out")
    add("--stop-after", type=int, default=0, help="end this call after so many steps, to go on with --resume")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N (%(default)s)")
    add("--threads", type=int, help="of each process, on the CPU")
    add("--timeout", type=float, default=10.0, help="minutes that a rank waits for the others (%(default)s)")
    add("--attention", choices=("fused", "reference"), default="fused", help="kernels or plain torch (%(default)s)")
    parser.set_defaults(**defaults)
