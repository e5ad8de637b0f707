"""The processes of a run: one, or those that torchrun started; how they talk, stop and fail together."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, and its device. A single process needs no process group."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over the ranks."""
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, on all of them."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on some rank."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def share_buffers(self, module: nn.Module) -> None:
        """The first rank's buffers for all: each rank's norms have seen other images."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, in their order, on all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextmanager
def start_ranks(device: str = "auto", timeout: float = 10.0) -> Iterator[Ranks]:
    """The ranks of this run: one process, or torchrun's (gloo on the CPU, nccl on GPUs), as its environment says.

    A rank that fails says so, with its number, and ends; torchrun then ends the others. They cannot wait longer than
    `timeout` minutes for one that hangs.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".
        timeout: minutes that a rank waits for the others.

    Raises: ValueError: device is not there, or torchrun started more ranks than there are GPUs.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    ranks = Ranks(rank, world, _device_of(device, int(os.environ.get("LOCAL_RANK", 0)), world))
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    if world > 1:
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout))
    try:
        yield ranks
    except BaseException as error:
        if world > 1:
            print(f"rank {rank} of {world} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise  # without leaving the process group in order, which would wait for ranks that may be gone
    if world > 1:
        dist.destroy_process_group()


@contextmanager
def start_run(options: argparse.Namespace) -> Iterator[Ranks]:
    """`start_ranks` as the options of `settings.add_arguments` say, with their number of threads and their seed."""
    if options.threads:
        torch.set_num_threads(options.threads)
    with start_ranks(options.device, options.timeout) as ranks:
        torch.manual_seed(options.seed)
        yield ranks


def _device_of(device: str, local_rank: int, world: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"start_ranks: device must be one that is available, got {device!r}")
    index = local_rank if world > 1 or chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"start_ranks: device must be one of {torch.cuda.device_count()} GPUs, got number {index}")
    return torch.device("cuda", index)


class StopSignals:
    """Within it SIGTERM and SIGINT (Ctrl-C) only set `received`, for the loop to see between two steps.

    Those who send them twice, as torchrun may, get the same. Only the main thread can listen; elsewhere nothing is
    heard.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        try:
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
        except ValueError:  # not the main thread
            pass
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
