"""Run by torchrun in the tests: python -m torch.distributed.run --nproc-per-node 2 ranks_script.py FOLDER WHAT"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from efficientvit_kernels.training import Ranks, Trainer, start_ranks
from tests.training.small_runs import Noisy, everything, loss_of, settings, small_model


def run(ranks: Ranks, folder: Path, stop_after: int = 0, resume: bool = False) -> Trainer:
    """With norms, dropout and noise, whose random states belong to each rank."""
    found = Trainer(small_model(), loss_of, settings(folder, stop_after=stop_after, resume=resume, save_every=3), ranks)
    found.fit(Noisy(), lambda model: {"one": float(ranks.sum(torch.tensor(1.0, device=ranks.device)))})
    return found


def parts_and_whole(ranks: Ranks, folder: Path) -> None:
    """The whole, and the two halves; and a net without norms and dropout, to be compared with a run on one rank."""
    whole = run(ranks, folder / "whole")
    run(ranks, folder / "parts", stop_after=4)
    torch.manual_seed(99)
    second = run(ranks, folder / "parts", resume=True)
    for name, trainer in (("whole", whole), ("parts", second)):
        torch.save({"all": everything(trainer), "random": torch.get_rng_state()}, folder / f"{name}{ranks.rank}.pt")
    plain = Trainer(small_model(norm=None, dropout=0.0), loss_of, settings(folder / "plain"), ranks)
    plain.fit(Noisy())
    torch.save(everything(plain), folder / f"plain{ranks.rank}.pt")


def failing(ranks: Ranks, folder: Path) -> None:
    """Rank 1 fails in its third step, while rank 0 waits for its gradients."""

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        if ranks.rank == 1 and trainer.step == 2:
            raise ValueError("a planted fault")
        return loss_of(model, batch)

    trainer = Trainer(small_model(), loss, settings(folder), ranks)
    trainer.fit(Noisy())


def endless(ranks: Ranks, folder: Path) -> None:
    Trainer(small_model(), loss_of, settings(folder, steps=1_000_000, save_every=0), ranks).fit(Noisy())


@record
def main() -> None:
    torch.set_num_threads(1)
    with start_ranks("cpu", timeout=1) as ranks:
        {"parts": parts_and_whole, "failing": failing, "endless": endless}[sys.argv[2]](ranks, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
