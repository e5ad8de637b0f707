"""The parts of a run: its state on disk, the order of the images, weight decay, schedule, average, logs, settings."""

from __future__ import annotations

import argparse
import csv
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import efficientvit_kernels.training
from efficientvit_kernels.models import create_model
from efficientvit_kernels.models.checkpoint import CheckpointError
from efficientvit_kernels.training import Ranks, Settings, cosine_with_warmup, parameter_groups
from efficientvit_kernels.training.checkpoint import load_state, random_state, restore_random_state, save_state
from efficientvit_kernels.training.data import Seeded, StepSampler
from efficientvit_kernels.training.logging import Progress, RunLog
from efficientvit_kernels.training.optim import average_into, ema_decay
from efficientvit_kernels.training.settings import add_arguments
from tests.processes import python
from tests.training.small_runs import Noisy, settings

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def test_a_state_comes_back(tmp_path: Path) -> None:
    state = {"step": 3, "model": {"w": torch.randn(4)}, "random": [random_state(CPU)], "none": None}
    save_state(state, tmp_path / "s.pt")
    found = load_state(tmp_path / "s.pt")
    expected = (torch.rand(3), random.random())
    restore_random_state(found["random"][0], CPU)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert torch.equal(found["model"]["w"], state["model"]["w"])  # type: ignore[index]
    assert list(tmp_path.iterdir()) == [tmp_path / "s.pt"]


def test_an_interrupted_write_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state({"step": 1}, tmp_path / "s.pt")

    def full_disk(content: object, file: Any) -> None:
        file.write(b"half of i")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"s\.pt: cannot be written: .*No space left"):
        save_state({"step": 2}, tmp_path / "s.pt")
    assert load_state(tmp_path / "s.pt")["step"] == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "s.pt"]


def test_damaged_and_foreign_states(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    with pytest.raises(CheckpointError, match=r"cannot be read: FileNotFoundError"):
        load_state(path)
    torch.save({"step": 1}, path)
    with pytest.raises(CheckpointError, match="is not the state of a training run"):
        load_state(path)
    save_state({"model": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    place = content.find(torch.arange(500.0, 502.0).numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: the checksum of its record '.*' is wrong"):
        load_state(path)


def batches(world: int, start: int = 0, stop: int = 12, **others: int) -> list[list[tuple[int, int]]]:
    """The batches of all ranks together, sorted as one rank sees them."""
    arguments: dict[str, Any] = {"length": 22, "batch": 4, "seed": 7, **others}
    parts = [list(StepSampler(**arguments, ranks=Ranks(r, world), start=start, stop=stop)) for r in range(world)]
    return [[part[step][i] for i in range(len(parts[0][step])) for part in parts] for step in range(stop - start)]


def test_the_order_depends_on_seed_and_step_alone() -> None:
    whole = batches(1)
    assert batches(2) == batches(4) == whole
    assert batches(1, start=7) == whole[7:]
    assert batches(1, seed=8) != whole
    epochs = [[index for batch in whole[first : first + 5] for index, _ in batch] for first in (0, 5)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert len({seed for batch in whole for _, seed in batch}) == 48
    assert {index for index, _ in batches(1, length=3)[0]} == {0, 1, 2}
    with pytest.raises(ValueError, match=r"StepSampler: batch must be a positive multiple of the 3 ranks, got 4"):
        batches(3)
    with pytest.raises(ValueError, match=r"StepSampler: length must be positive"):
        batches(1, length=0)


def test_seeded_images_leave_the_generators_alone() -> None:
    data = Seeded(Noisy())
    torch.manual_seed(1)
    random.seed(1)
    before = random_state(CPU)
    first, again, other = data[3, 11][0], data[3, 11][0], data[3, 12][0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    after = random_state(CPU)
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]


@pytest.mark.parametrize("name", ["efficientvit-b0", "efficientvit-seg-l1-ade20k", "efficientvit-sr-w0.75"])
def test_norms_and_biases_have_no_weight_decay(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    model.requires_grad_(True)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    decayed, others = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, weight_decay=0.1))
    assert [group["weight_decay"] for group in parameter_groups(model, 0.1)] == [0.1, 0.0]
    assert len(decayed) + len(others) == len(names)
    norms = {key for key, module in model.named_modules() if "Norm" in type(module).__name__}
    for key in decayed:
        assert key.endswith("weight")
        assert key.rpartition(".")[0] not in norms
    for key in others:
        assert key.endswith("bias") or key.rpartition(".")[0] in norms
    next(model.parameters()).requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == len(names) - 1


def test_schedule() -> None:
    factors = [cosine_with_warmup(step, steps=8, warmup=4) for step in range(9)]
    half = 2**0.5 / 4
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.5 + half, 0.5, 0.5 - half, 0])
    assert cosine_with_warmup(0, 5, 0) == 1
    assert cosine_with_warmup(7, 5, 5) >= 0


def test_average() -> None:
    averages, values = [torch.tensor([1.0, 3.0])], [torch.tensor([2.0, 5.0])]
    average_into(averages, values, 0.75)
    assert averages[0].tolist() == [1.25, 3.5]
    counters: list[Tensor] = [torch.tensor(4)]
    average_into(counters, [torch.tensor(9)], 0.75)
    assert counters[0].item() == 9
    assert [ema_decay(step, 0.9) for step in (0, 8, 1000)] == [0.1, 0.5, 0.9]


def test_log_without_tensorboard_and_where_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path / "run", step=0)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": step / 3})
    log.close()
    log = RunLog(tmp_path / "run", step=2)
    log.write("train", 3, {"loss": 0.125})
    with open(tmp_path / "run" / "train.csv", newline="") as file:
        assert list(csv.reader(file)) == [["step", "loss"], ["1", "0.33333333"], ["2", "0.66666667"], ["3", "0.125"]]
    RunLog(None, 0).write("train", 1, {"loss": 1.0})


def test_log_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in with the two functions that are used: the package is optional."""
    seen: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            seen.append((Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def close(self) -> None:
            seen.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = RunLog(tmp_path, step=4)
    log.write("eval", 5, {"psnr": 30.0})
    log.close()
    assert seen == [("tensorboard", 5), ("eval/psnr", 30.0, 5), "closed"]


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for shown in (True, False):
        bar = Progress(total=4, done=1, shown=shown, every=2)
        bar.note(loss=0.5)
        for _ in range(3):
            bar.advance()
        bar.say("done")
        bar.close()
    output = capsys.readouterr()
    assert output.err == "step 2/4 loss=0.5\nstep 4/4 loss=0.5\n"
    assert output.out == "done\n"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 0, "at least 1, got 0"),
        ("lr", float("nan"), "positive, got nan"),
        ("ema", 1.0, r"in \[0, 1\), got 1.0"),
        ("amp", "fp8", "one of off, bf16, fp16, got 'fp8'"),
        ("clip", -1.0, "at least 0, got -1.0"),
    ],
)
def test_settings_are_checked(name: str, value: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"Settings: {name} must be {expected}"):
        settings(tmp_path, **{name: value})


def test_options_make_settings(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, out=tmp_path, steps=5, batch=2, lr=0.1)
    options = parser.parse_args(["--steps", "7", "--amp", "bf16", "--resume"])
    found = Settings.of(options)
    assert (found.steps, found.batch, found.amp, found.resume, found.out) == (7, 2, "bf16", True, tmp_path)
    assert options.attention == "fused"


def test_names_are_lazy() -> None:
    assert dir(efficientvit_kernels.training) == sorted(dir(efficientvit_kernels.training))
    for name in efficientvit_kernels.training.__all__:
        assert getattr(efficientvit_kernels.training, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        efficientvit_kernels.training.nothing  # noqa: B018
    loaded = "[name for name in sys.modules if 'tensorboard' in name]"
    assert python("-c", f"import sys, efficientvit_kernels.training.loop; sys.exit(bool({loaded}))").returncode == 0
