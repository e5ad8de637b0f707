"""The parts, and how one runs: step by step, each step's outcome kept, within the time limit."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import store as stores

LIMIT_S = 540.0
TRACEBACK_LINES = 12

# In the order in which `all` runs them: what is learned first matters most.
PARTS = {
    "facts": "copy and matrix roofs, launch costs, the peers' times, mma.sync against cuBLAS",
    "correctness": "every op and backend against float64, and the tests marked gpu",
    "sanitize": "compute-sanitizer: memcheck, racecheck, initcheck, synccheck",
    "repeats": "the same bits, thousands of times, beside a busy stream",
    "runtime": "graphs, streams, host synchronisation, memory that runs out, torch.compile, errors of the device",
    "large": "more than 2^31 elements",
    "bench": "ours beside the peers",
    "tune": "candidates of the configuration tables",
}


class NotRunError(Exception):
    """Why a step cannot run here."""


class FailedError(Exception):
    """What did not hold; `result` keeps the figures."""

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


@dataclass
class Context:
    """Where and for how long a part runs. `quick`: tiny shapes and two repeats, to try the script itself."""

    device: str = "cuda"
    quick: bool = False
    limit_s: float = LIMIT_S
    out: Path = Path()
    arguments: list[str] = field(default_factory=list)  # of the command line, to start the part again
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.limit_s - (time.monotonic() - self.started)

    def budget(self, seconds: float) -> float:
        """For one measurement: `seconds`, less where less is left, next to nothing for a trial."""
        return min(0.05 if self.quick else seconds, max(self.left(), 0.05))

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Step:
    """One entry of a part's JSON. `least`: seconds without which it is not worth starting."""

    name: str
    run: Callable[[Context], dict[str, Any]]
    least: float = 2.0


def steps_of(part: str, context: Context) -> list[Step]:
    if part not in PARTS:
        raise ValueError(f"benchmarks.gpu: part must be one of {', '.join(PARTS)}, got {part!r}")
    module: Any = importlib.import_module(f"benchmarks.gpu.{part}")
    steps: list[Step] = module.steps(context)
    return steps


def run_part(part: str, context: Context, store: stores.Store) -> int:
    """Number of steps that failed or raised, earlier ones of a resumed file among them."""
    steps = steps_of(part, context)
    left: list[str] = []
    for step in steps:
        if step.name in store.steps:
            continue
        if context.left() < (0 if context.quick else step.least):
            left.append(step.name)
            continue
        store.begin(step.name)
        entry = run_step(step, context)
        store.finish(step.name, entry)
        print(f"{part}: {step.name}: {entry['status']}{_reason(entry)} ({entry['seconds']:.1f} s)", flush=True)
        if entry["status"] == "error" and device_is_lost(context):
            restart(part, context)
    summarize = getattr(importlib.import_module(f"benchmarks.gpu.{part}"), "summary", None)
    if summarize is not None:
        store.content["summary"] = summarize(store.content)
    store.leave(left)
    if left:
        print(f"{part}: {len(left)} of {len(steps)} steps left for lack of time; go on with --resume", flush=True)
    return sum(entry["status"] in ("failed", "error") for entry in store.steps.values())


def run_step(step: Step, context: Context) -> stores.Entry:
    start = time.monotonic()
    entry: stores.Entry = {}
    try:
        entry |= {"status": "ok", "result": step.run(context)}
    except NotRunError as error:
        entry |= {"status": "not_run", "reason": str(error)}
    except FailedError as error:
        entry |= {"status": "failed", "reason": str(error), "result": error.result}
    except Exception as error:
        # Whatever a kernel, compiler or tool raises is an outcome of the step, not the end of the part.
        first = (str(error).strip().splitlines() or [""])[0]
        lines = traceback.format_exc().strip().splitlines()
        entry |= {"status": "error", "reason": f"{type(error).__name__}: {first}"[:500]}
        entry["traceback"] = [line[:300] for line in lines[-TRACEBACK_LINES:]]
    entry["seconds"] = time.monotonic() - start
    if context.on_gpu:
        entry["clocks"] = stores.clocks()
    return entry


def device_is_lost(context: Context) -> bool:
    """Whether the CUDA context answers every call with an old error: then only a new process can go on."""
    if not context.on_gpu:
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").add_(1).item()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False


def restart(part: str, context: Context) -> None:
    """The rest of the part in a new process. Each restart follows a new entry: there are at most as many as steps."""
    print(f"{part}: the device answers no more in this process; going on in a new one", flush=True)
    rest = [*context.arguments, "--resume", "--limit-s", str(max(context.left(), 1.0))]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", part, *rest])


def _reason(entry: stores.Entry) -> str:
    """Also the providers of a measurement that are missing: a row without its strongest peer says less."""
    left_out = entry.get("result", {}).get("left_out", {})
    reasons = [entry["reason"]] if "reason" in entry else []
    reasons += [f"left out {name}: {reason}" for name, reason in left_out.items()]
    return "".join(f": {reason}" for reason in reasons)
