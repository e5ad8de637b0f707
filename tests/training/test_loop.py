"""The training loop: it goes on as if it had never stopped, whatever stopped it, and says what is wrong."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import efficientvit_kernels.training.loop
from efficientvit_kernels.models.checkpoint import CheckpointError, load_weights
from efficientvit_kernels.training.loop import LAST, RESULT
from tests.training.small_runs import Noisy, differing, loss_of, small_model, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(path: Path, columns: slice = slice(None)) -> list[list[str]]:
    with open(path, newline="") as file:
        return [row[columns] for row in csv.reader(file)]


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_two_halves_are_the_whole(amp: str, tmp_path: Path) -> None:
    """Bits of weights, averages and moments; the rows of the log, too, whose window the stop at 4 cuts in two."""
    whole = trainer(tmp_path / "whole", amp=amp)
    assert whole.fit(Noisy())
    assert not trainer(tmp_path / "parts", amp=amp, stop_after=4).fit(Noisy())
    assert not (tmp_path / "parts" / RESULT).exists()
    torch.manual_seed(99)  # a new process would be in another state
    second = trainer(tmp_path / "parts", amp=amp, resume=True)
    assert second.step == 4
    assert second.fit(Noisy())
    assert second.step == whole.step == 8
    assert differing(whole, second) == []
    loss_and_rate = slice(0, 3)
    logs = [rows(tmp_path / name / "train.csv", loss_and_rate) for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [row[0] for row in logs[0]] == ["step", "3", "6", "8"]
    if amp == "fp16":
        assert whole.scaler.state_dict() == second.scaler.state_dict() != {}


@pytest.mark.parametrize("lost", ["restore_random_state", "average", "optimizer", "schedule"])
def test_lost_state_would_be_seen(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(tmp_path / "whole")
    whole.fit(Noisy())
    trainer(tmp_path / "parts", stop_after=4).fit(Noisy())
    if lost == "restore_random_state":
        monkeypatch.setattr(efficientvit_kernels.training.loop, lost, lambda state, device: None)
    else:
        kind = {
            "average": torch.optim.swa_utils.AveragedModel,
            "optimizer": torch.optim.AdamW,
            "schedule": torch.optim.lr_scheduler.LambdaLR,
        }[lost]
        monkeypatch.setattr(kind, "load_state_dict", lambda self, state: None)
    second = trainer(tmp_path / "parts", resume=True)
    second.fit(Noisy())
    assert differing(whole, second) != []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_the_state_and_ends(number: signal.Signals, tmp_path: Path) -> None:
    calls = 0

    def interrupted(model: nn.Module, batch: list[Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as torchrun and the terminal do
        return loss_of(model, batch)

    whole = trainer(tmp_path / "whole")
    whole.fit(Noisy())
    before = signal.getsignal(number)
    assert not trainer(tmp_path / "parts", loss=interrupted).fit(Noisy())
    assert signal.getsignal(number) is before
    second = trainer(tmp_path / "parts", resume=True)
    assert second.step == 3
    assert second.fit(Noisy())
    assert differing(whole, second) == []


def test_a_crash_loses_only_what_came_after_the_last_state(tmp_path: Path) -> None:
    def crashing(model: nn.Module, batch: list[Tensor]) -> Tensor:
        if run.step == 7:
            raise RuntimeError("no more memory")
        return loss_of(model, batch)

    whole = trainer(tmp_path / "whole", log_every=1)
    whole.fit(Noisy())
    run = trainer(tmp_path / "parts", loss=crashing, save_every=5, log_every=1)
    with pytest.raises(RuntimeError, match="no more memory") as caught:
        run.fit(Noisy())
    assert caught.value.__notes__ == ["rank 0 of 1, in step 8"]
    assert len(rows(tmp_path / "parts" / "train.csv")) == 1 + 7
    second = trainer(tmp_path / "parts", save_every=5, log_every=1, resume=True)
    assert second.step == 5
    second.fit(Noisy())
    assert differing(whole, second) == []
    steps = [row[0] for row in rows(tmp_path / "parts" / "train.csv")]
    assert steps == ["step", *map(str, range(1, 9))]


def test_workers_read_the_same(tmp_path: Path) -> None:
    runs = []
    for workers in (0, 1):
        runs.append(trainer(tmp_path / str(workers), steps=3, workers=workers))
        runs[-1].fit(Noisy())
    assert differing(*runs) == []


def test_evaluation_and_result(tmp_path: Path) -> None:
    seen = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append(model)
        return {"figure": float(len(seen))}

    run = trainer(tmp_path, eval_every=3)
    assert run.fit(Noisy(), evaluate)
    assert all(model is run.result for model in seen)
    assert rows(tmp_path / "eval.csv") == [["step", "figure"], ["3", "1"], ["6", "2"], ["8", "3"]]
    other = small_model()
    load_weights(other, tmp_path / RESULT)
    for key, value in run.result.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    assert any(not torch.equal(a, b) for a, b in zip(run.model.parameters(), run.result.parameters(), strict=True))


def test_without_average_and_limit(tmp_path: Path) -> None:
    run = trainer(tmp_path, ema=0.0, clip=0.0, channels_last=True)
    run.fit(Noisy())
    assert run.result is run.model


def test_16_bits_are_used(tmp_path: Path) -> None:
    dtypes = []

    def look(model: nn.Module, batch: list[Tensor]) -> Tensor:
        logits = model(batch[0])
        dtypes.append(logits.dtype)
        return nn.functional.cross_entropy(logits.float(), batch[1])

    for amp in ("off", "bf16", "fp16"):
        trainer(tmp_path / amp, loss=look, steps=1, amp=amp).fit(Noisy())
    assert dtypes == [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # the first step is skipped
def test_an_overflow_of_gradients_skips_the_step_and_halves_the_scale(tmp_path: Path) -> None:
    run = trainer(tmp_path, loss=lambda model, batch: 1e38 * loss_of(model, batch), amp="fp16", steps=1)
    before = [p.clone() for p in run.model.parameters()]
    scale = run.scaler.get_scale()
    run.fit(Noisy())
    assert run.scaler.get_scale() == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_state(value: float, tmp_path: Path) -> None:
    run = trainer(tmp_path, save_every=2, loss=lambda model, batch: loss_of(model, batch) * (value if run.step else 1))
    with pytest.raises(FloatingPointError, match=r"Trainer: loss must be finite, got (nan|inf) in step 2"):
        run.fit(Noisy())
    assert not (tmp_path / LAST).exists()


def test_the_folder_must_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Trainer: resume needs .*last\.pt on every rank"):
        trainer(tmp_path, resume=True)
    trainer(tmp_path, stop_after=1).fit(Noisy())
    with pytest.raises(FileExistsError, match=r"Trainer: .*last\.pt is the state of a run: resume it, or take another"):
        trainer(tmp_path)
    with pytest.raises(ValueError, match=r"got others: lr was 0\.01 and is 0\.02; seed was 0 and is 1"):
        trainer(tmp_path, resume=True, lr=0.02, seed=1)
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"last\.pt: cannot be read"):
        trainer(tmp_path, resume=True)


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    first = trainer(tmp_path, steps=2)
    first.fit(Noisy())
    again = trainer(tmp_path, steps=2, resume=True)
    assert again.fit(Noisy())
    assert differing(first, again) == []
