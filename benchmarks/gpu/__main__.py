"""python -m benchmarks.gpu list | all | <part>: see `parts.PARTS`, and docs/gpu-status.md for how to run it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu import store
from benchmarks.gpu.parts import LIMIT_S, PARTS, Context, run_part, steps_of
from benchmarks.report import format_table

GRACE_S = 45.0  # beyond its limit, after which `all` ends a part that hangs


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="What a machine with a GPU runs.")
    result.add_argument("part", choices=("list", "all", *PARTS), help="a part, all of them in order, or their list")
    result.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the script itself")
    result.add_argument("--quick", action="store_true", help="tiny shapes and two repeats, to try the script itself")
    result.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds per part; default %(default)s")
    result.add_argument("--resume", action="store_true", help="keep the steps that are there, of this commit and GPU")
    result.add_argument("--out", type=Path, help="folder of the JSON files; default benchmarks/results/<gpu>")
    result.add_argument("--commit", help="name of the commit, where the tree has no history")
    result.add_argument("--steps", action="store_true", help="with list: also the steps of every part")
    return result


def main(words: list[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    if arguments.part == "list":
        return show_list(arguments)
    reason = why_no_device(arguments)
    if reason is not None:
        print(f"benchmarks.gpu: {reason}", file=sys.stderr)
        return 2
    if arguments.part == "all":
        return run_all(arguments)
    return run_one(arguments)


def why_no_device(arguments: argparse.Namespace) -> str | None:
    if arguments.device == "cpu":
        return None if arguments.out else "--device cpu needs --out DIR: a trial leaves no results of a GPU"
    if torch.cuda.is_available():
        return None
    return "no CUDA device is available (to try the script itself: --device cpu --quick --out DIR)"


def show_list(arguments: argparse.Namespace) -> int:
    for part, text in PARTS.items():
        print(f"{part:<12} {text}")
        if arguments.steps:
            context = Context(arguments.device, arguments.quick)
            print("".join(f"    {step.name}\n" for step in steps_of(part, context)), end="")
    return 0


def run_one(arguments: argparse.Namespace) -> int:
    out = arguments.out or store.folder()
    header = store.header(arguments.part, arguments.device, arguments.quick, arguments.commit)
    file = store.Store(out / f"{arguments.part}.json", header, arguments.resume)
    if file.note:
        print(f"{arguments.part}: {file.note}", flush=True)
    for backend, state in header["backends"].items():
        print(f"{arguments.part}: backend {backend}: {state}", flush=True)
    context = Context(arguments.device, arguments.quick, arguments.limit_s, out, options(arguments))
    failures = run_part(arguments.part, context, file)
    print(f"{arguments.part}: {len(file.steps)} steps, {failures} failed; {file.path}", flush=True)
    return 1 if failures else 0


def options(arguments: argparse.Namespace) -> list[str]:
    """What a part's own process gets, but for its time limit and --resume."""
    words = ["--device", arguments.device]
    words += ["--quick"] if arguments.quick else []
    words += ["--out", str(arguments.out)] if arguments.out else []
    return words + (["--commit", arguments.commit] if arguments.commit else [])


def run_all(arguments: argparse.Namespace) -> int:
    """Every part in a process of its own, then a table. 0 when nothing failed in any of them."""
    out = arguments.out or store.folder()
    words = [*options(arguments), "--limit-s", str(arguments.limit_s), *(["--resume"] if arguments.resume else [])]
    lines = [["part", "status", "ok", "failed", "not run", "left", "seconds"]]
    worst = 0
    for part in PARTS:
        start = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.gpu", part, *words]
        try:
            status = subprocess.run(command, timeout=arguments.limit_s + GRACE_S, check=False).returncode
        except subprocess.TimeoutExpired:
            status = 124
        worst = max(worst, min(abs(status), 1))
        lines.append([part, str(status), *counts(out / f"{part}.json"), f"{time.monotonic() - start:.0f}"])
    print("\n" + "\n".join(format_table(lines, markdown=False)), flush=True)
    return worst


def counts(path: Path) -> list[str]:
    if not path.exists():
        return ["-"] * 4
    content = json.loads(path.read_text())
    found = [entry["status"] for entry in content["steps"].values()]
    failed = found.count("failed") + found.count("error") + bool(content["running"])
    return [str(value) for value in (found.count("ok"), failed, found.count("not_run"), len(content["left"]))]


if __name__ == "__main__":
    sys.exit(main())
