"""Two ranks that torchrun starts, on the CPU: the same numbers, the same end."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from efficientvit_kernels._build import ROOT
from efficientvit_kernels.training import Ranks, start_ranks, start_run
from efficientvit_kernels.training.checkpoint import load_state
from efficientvit_kernels.training.settings import add_arguments
from tests.training.small_runs import Noisy, everything, small_model, trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]


@contextmanager
def torchrun(folder: Path, what: str) -> Iterator[subprocess.Popen[str]]:
    """Two ranks on a free port; ended with the test."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, "-m", "tests.training.ranks_script", str(folder), what],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # it ends its ranks
            process.wait(60)


def test_two_ranks(tmp_path: Path) -> None:
    with torchrun(tmp_path, "parts") as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    saved = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    # Two halves are the whole, on each rank, its random state among it: the two ranks draw other numbers.
    for rank in (0, 1):
        whole, parts = saved[f"whole{rank}"], saved[f"parts{rank}"]
        assert [key for key, value in whole["all"].items() if not torch.equal(value, parts["all"][key])] == []
        assert torch.equal(whole["random"], parts["random"])
    assert not torch.equal(saved["whole0"]["random"], saved["whole1"]["random"])
    first, second = saved["whole0"]["all"], saved["whole1"]["all"]
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []
    assert (tmp_path / "whole" / "eval.csv").read_text() == "step,one\n8,2\n"
    # One rank with the same batches: the same mean gradient, summed in another order. AdamW divides gradients by their
    # size, so what rounding leaves of one that is almost 0 counts; the weights are about 0.3.
    alone = trainer(tmp_path / "alone", model=small_model(norm=None, dropout=0.0))
    alone.fit(Noisy())
    for key, value in everything(alone).items():
        if key.startswith(("model", "average")):
            assert float((saved["plain0"][key] - value).abs().max()) < 1e-4, key


def test_other_ranks_go_on_with_a_run(tmp_path: Path) -> None:
    """A state of two ranks, resumed by one: the weights go on; the random numbers are new ones."""
    first = trainer(tmp_path, stop_after=4)
    first.fit(Noisy())
    state = load_state(tmp_path / "last.pt")
    doubled = {**state, "random": state["random"] * 2, "loss": [state["loss"][0] * 2, state["loss"][1]]}
    torch.save(doubled, tmp_path / "last.pt")
    second = trainer(tmp_path, resume=True)
    assert second.step == 4
    assert float(second._loss_sum) == pytest.approx(float(first._loss_sum))
    assert second.fit(Noisy())


def test_a_rank_that_fails_ends_the_job(tmp_path: Path) -> None:
    started = time.monotonic()
    with torchrun(tmp_path, "failing") as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "rank 1 of 2 failed: ValueError: a planted fault" in output
    assert "rank 1 of 2, in step 3" in output
    assert time.monotonic() - started < 120  # rank 0 does not wait for its time to run out
    assert not (tmp_path / "last.pt").exists()


def test_sigterm_to_torchrun_writes_the_state(tmp_path: Path) -> None:
    with torchrun(tmp_path, "endless") as process:
        log = tmp_path / "train.csv"
        deadline = time.monotonic() + 120
        while not log.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert "stopped by SIGTERM after step" in output, output
    state = load_state(tmp_path / "last.pt")
    assert state["step"] >= 3
    assert len(state["random"]) == 2


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with start_ranks("cpu") as ranks:
        assert ranks == Ranks()
        assert not torch.distributed.is_initialized()
        assert ranks.gather("x") == ["x"]
        assert ranks.any(True)
        model = small_model()
        assert ranks.wrap(model) is model


def test_a_run_has_the_threads_and_the_seed_of_its_options(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, out=tmp_path, steps=1, batch=1, lr=0.1)
    options = parser.parse_args(["--device", "cpu", "--seed", "5", "--threads", "2"])
    with start_run(options) as ranks:
        assert ranks == Ranks()
        assert torch.get_num_threads() == 2
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError, match=f"device must be one that is available, got '{device}'"), start_ranks(device):
        pass
