"""The script that a GPU machine runs, tried on the CPU: its frame. What its parts do is in test_gpu_parts.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import parts, store
from benchmarks.gpu.child import isolated, result_of
from benchmarks.gpu.parts import PARTS, Context, FailedError, NotRunError, Step, run_part
from benchmarks.gpu.store import Store

HEAD = {"part": "facts", "quick": True, "commit": "abc", "sources": "1", "gpu": "x", "driver": None, "torch": "2"}


def steps_are(monkeypatch: pytest.MonkeyPatch, *steps: Step) -> None:
    monkeypatch.setattr(parts, "steps_of", lambda part, context: list(steps))


def good(context: Context) -> dict[str, Any]:
    return {"value": 1.23456789, "samples": [1.0, 2.5]}


def raising(error: Exception) -> Callable[[Context], dict[str, Any]]:
    def run(context: Context) -> dict[str, Any]:
        raise error

    return run


@pytest.fixture
def context() -> Context:
    return Context("cpu", quick=True)


def test_every_outcome_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, context: Context) -> None:
    steps_are(
        monkeypatch,
        Step("good", good),
        Step("wrong", raising(FailedError("1 is not 2", {"figure": 1}))),
        Step("raises", raising(RuntimeError("first line\nsecond line"))),
        Step("absent", raising(NotRunError("no tool"))),
    )
    file = Store(tmp_path / "facts.json", HEAD)
    assert run_part("facts", context, file) == 2
    text = (tmp_path / "facts.json").read_text()
    content = json.loads(text)
    found = content["steps"]
    assert [entry["status"] for entry in found.values()] == ["ok", "failed", "error", "not_run"]
    assert found["good"]["result"] == {"value": 1.23457, "samples": [1.0, 2.5]}
    assert '"samples": [1.0, 2.5]' in text, "a list of numbers takes one line"
    assert found["wrong"]["reason"] == "1 is not 2"
    assert found["wrong"]["result"] == {"figure": 1}
    assert found["raises"]["reason"] == "RuntimeError: first line"
    assert found["raises"]["traceback"][-2:] == ["RuntimeError: first line", "second line"]
    assert found["absent"]["reason"] == "no tool"
    assert content["running"] is None
    assert content["left"] == []
    assert content["commit"] == "abc"
    assert not list(tmp_path.glob("*.partial"))


def test_the_file_is_whole_after_every_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, context: Context) -> None:
    seen: list[Any] = []

    def look(context: Context) -> dict[str, Any]:
        seen.append(json.loads((tmp_path / "facts.json").read_text()))
        return {}

    steps_are(monkeypatch, Step("first", look), Step("second", look))
    run_part("facts", context, Store(tmp_path / "facts.json", HEAD))
    assert [(content["running"], list(content["steps"])) for content in seen] == [("first", []), ("second", ["first"])]


def test_time_limit_and_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(name: str, context: Context) -> dict[str, Any]:
        calls.append(name)
        context.limit_s = 0.0  # the time is up after one step
        return {}

    names = ("a", "b", "c")
    steps_are(monkeypatch, *(Step(name, lambda context, name=name: counted(name, context)) for name in names))
    path = tmp_path / "facts.json"
    for expected in (["b", "c"], ["c"], []):
        assert run_part("facts", Context("cpu", limit_s=100.0), Store(path, HEAD, resume=True)) == 0
        assert json.loads(path.read_text())["left"] == expected
    assert calls == ["a", "b", "c"]
    steps_are(monkeypatch, Step("long", good, least=60.0), Step("short", good))
    file = Store(path, HEAD)
    run_part("facts", Context("cpu", limit_s=30.0), file)
    assert file.content["left"] == ["long"], "a step that does not fit leaves its time to the next"
    assert list(file.steps) == ["short"]


def test_resume_takes_only_what_belongs_together(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    old = Store(path, HEAD)
    old.finish("a", {"status": "ok"})
    assert list(Store(path, HEAD, resume=True).steps) == ["a"]
    assert list(Store(path, HEAD | {"commit": "abc-dirty"}, resume=True).steps) == ["a"]
    assert not Store(path, HEAD).steps, "without --resume a part begins anew"
    for key in ("commit", "sources", "gpu", "torch"):
        other = Store(path, HEAD | {key: "other"}, resume=True)
        assert not other.steps
        assert other.note.startswith(f"not resumed: {key} is 'other'")


def test_a_step_that_ended_the_process_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    Store(path, HEAD).begin("killer")
    assert Store(path, HEAD, resume=True).steps["killer"] == {"status": "error", "reason": store.CRASHED}


def test_a_lost_device_starts_the_part_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """execv does not return; here it does, once, and the words of the new process are what matters."""
    started: list[list[str]] = []
    steps_are(monkeypatch, Step("sticky", raising(RuntimeError("illegal address"))))
    monkeypatch.setattr(parts, "device_is_lost", lambda context: True)
    monkeypatch.setattr(parts.os, "execv", lambda _, words: started.append(words))
    context = Context("cpu", limit_s=50.0, arguments=["--device", "cpu", "--out", str(tmp_path)])
    run_part("facts", context, Store(tmp_path / "facts.json", HEAD))
    ((*words, limit),) = started
    assert words[:4] == [sys.executable, "-m", "benchmarks.gpu", "facts"]
    assert words[4:] == [*context.arguments, "--resume", "--limit-s"]
    assert 40 < float(limit) <= 50
    again = Store(tmp_path / "facts.json", HEAD, resume=True)
    assert run_part("facts", context, again) == 1, "the step that lost the device is not run again"
    assert len(started) == 1


def test_names_of_devices() -> None:
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-40GB", "NVIDIA GeForce RTX 4090", "AMD MI300X")
    assert [store.slug(name) for name in names] == ["h100", "h200", "a100", "rtx4090", "mi300x"]


def test_child_processes() -> None:
    result, process = isolated("child:echo", {"value": [1, 2]}, 60)
    assert result == {"value": [1, 2]}
    assert process.returncode == 0
    with pytest.raises(FailedError, match="ended with status 3") as failed:
        result_of("child:echo", {"status": 3}, 60)
    assert failed.value.result["output"] == ["ending with status 3"]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PARTS)
    assert command.main(["facts", "--device", "cpu"]) == 2
    assert "--device cpu needs --out DIR" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command.main(["facts"]) == 2
        assert "no CUDA device is available" in capsys.readouterr().err


def test_all_parts_in_one_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "PARTS", {"tune": PARTS["tune"]})
    words = ["all", "--device", "cpu", "--quick", "--limit-s", "60", "--out", str(tmp_path)]
    assert command.main(words) == 0
    out = capfd.readouterr().out
    assert [line.split()[:5] for line in out.splitlines() if line.startswith("tune  ")] == [
        ["tune", "0", "0", "0", "1"]
    ]
    broken = json.loads((tmp_path / "tune.json").read_text())
    broken["steps"]["launches, b0-224-stage3, batch 1"]["status"] = "failed"
    (tmp_path / "tune.json").write_text(json.dumps(broken))
    assert command.main([*words, "--resume"]) == 1
