"""Risky work in a process of its own: an error that ends a CUDA context ends only that process.

The child prints one line, RESULT and a JSON object; everything else that it prints is for a reader of its failure.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.parts import FailedError, NotRunError
from benchmarks.gpu.store import ROOT, as_text

RESULT = "RESULT "
TAIL_LINES = 25


def isolated(
    task: str,
    arguments: Mapping[str, Any],
    timeout: float,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any] | None, subprocess.CompletedProcess[str]]:
    """Runs `module:function` of this package with `arguments` in a new process, behind `prefix`, a tool with options.

    Returns what the function returned, None if the process ended without that, and the process.
    """
    command = [*prefix, sys.executable, "-m", "benchmarks.gpu.child", task, json.dumps(dict(arguments))]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    # A session of its own: at the time limit the tool's children go, too.
    process = subprocess.Popen(
        command,
        env=variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=max(timeout, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, errors = process.communicate()
        errors += f"\nkilled after {timeout:.0f} s"
    completed = subprocess.CompletedProcess(command, process.returncode, out, errors)
    lines = [line for line in out.splitlines() if line.startswith(RESULT)]
    return (json.loads(lines[-1].removeprefix(RESULT)) if lines else None), completed


def result_of(task: str, arguments: Mapping[str, Any], timeout: float, **options: Any) -> dict[str, Any]:
    """The child's result, or its failure as this process's."""
    result, process = isolated(task, arguments, timeout, **options)
    if result is None:
        raise FailedError(f"the process ended with status {process.returncode}", {"output": tail(process)})
    if "not_run" in result:
        raise NotRunError(result["not_run"])
    if "failed" in result:
        raise FailedError(result["failed"], result.get("result", {}))
    return result


def tail(process: subprocess.CompletedProcess[str]) -> list[str]:
    lines = [line for line in (process.stdout + process.stderr).splitlines() if not line.startswith(RESULT)]
    return [line[:300] for line in lines[-TAIL_LINES:]]


def echo(status: int = 0, **arguments: Any) -> dict[str, Any]:
    """For the test of this protocol."""
    if status:
        print(f"ending with status {status}", flush=True)
        os._exit(status)
    return arguments


def main(task: str, arguments: str) -> int:
    module, function = task.split(":")
    call = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    try:
        result: dict[str, Any] = call(**json.loads(arguments))
    except NotRunError as error:
        result = {"not_run": str(error)}
    except FailedError as error:
        result = {"failed": str(error), "result": error.result}
    print(RESULT + json.dumps(json.loads(as_text(result))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
