"""Which images a step takes, and by what chance each is changed: a function of the seed and the step alone."""

from __future__ import annotations

import random
import signal
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .distributed import Ranks


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Per step this rank's part of the batch, as pairs (index of the image, seed for its random changes).

    Epoch e is a permutation that (seed, e) determines, cut into batches; images that fill no batch wait for another
    epoch. Nothing depends on where a run started, so it goes on at `start` as if it had never stopped; the batch of all
    ranks together is the same for any number of ranks.

    Args:
        length: of the data set; smaller than a batch, its images are repeated.
        batch: images per step of all ranks together, a multiple of their number.
        start, stop: the steps, from 0.

    Raises: ValueError for an empty data set, or a batch that the ranks do not divide.
    """

    def __init__(self, length: int, batch: int, seed: int, ranks: Ranks, start: int, stop: int) -> None:
        if length < 1:
            raise ValueError("StepSampler: length must be positive, got 0: the data set is empty")
        if batch < 1 or batch % ranks.world:
            raise ValueError(f"StepSampler: batch must be a positive multiple of the {ranks.world} ranks, got {batch}")
        self.length, self.batch, self.seed, self.ranks = length, batch, seed, ranks
        self.start, self.stop = start, stop
        self.steps_per_epoch = max(1, length // batch)

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self._seed_of("e", epoch)))
            first = step % self.steps_per_epoch * self.batch
            places = range(self.ranks.rank, self.batch, self.ranks.world)
            yield [(int(order[(first + i) % self.length]), self._seed_of("i", step * self.batch + i)) for i in places]

    def _seed_of(self, kind: str, number: int) -> int:
        # Torch's generator on the CPU takes 32 bits of a seed; a checksum spreads neighbours over them.
        return zlib.crc32(f"{self.seed} {kind} {number}".encode())


class Seeded(Dataset[Any]):
    """dataset[index] of an (index, seed): its transforms draw from torch's and Python's generators, set to the seed."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        python = random.getstate()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                random.seed(seed)
                return self.dataset[index]
        finally:
            random.setstate(python)


def step_loader(dataset: Dataset[Any], sampler: StepSampler, workers: int, device: torch.device) -> DataLoader[Any]:
    """Batches of `dataset` by `sampler`, read by `workers` processes."""
    return DataLoader(
        Seeded(dataset),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # or the loader would draw from the model's
        worker_init_fn=_leave_signals_to_the_loop,
    )


def _leave_signals_to_the_loop(worker: int) -> None:
    """Ctrl-C reaches the whole process group, and the loop still wants batches; SIGTERM ends a worker as ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
