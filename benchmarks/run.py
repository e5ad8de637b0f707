"""Times the ops against their peers, in turns in one process, and writes the figures as JSON.

    python -m benchmarks.run [--threads 1] [--dtype float32] [--layout nchw] [--output benchmarks/results/NAME.json]

Ratios are medians over rounds; in every round each provider runs once, so that all meet the same disturbances.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.registry import SHAPES, Shape, Step, make_step, providers
from efficientvit_kernels import info
from efficientvit_kernels.demo import ENVIRONMENT

FOLDER = Path(__file__).parent / "results"


def seconds(step: Step, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def measure(shape: Shape, steps: dict[str, Step], rounds: int, flops: float) -> dict[str, Any]:
    for step in steps.values():
        step()
    once = {name: min(seconds(step, 1) for _ in range(3)) for name, step in steps.items()}
    repeats = {name: max(1, min(200, int(0.01 / once[name]))) for name in steps}
    times = [{name: seconds(step, repeats[name]) for name, step in steps.items()} for _ in range(rounds)]
    ours = statistics.median(t["ours"] for t in times)
    return {
        "shape": shape.name,
        "microseconds": {name: round(1e6 * statistics.median(t[name] for t in times), 2) for name in steps},
        "speed_up_over": {
            name: round(statistics.median(t[name] / t["ours"] for t in times), 3) for name in steps if name != "ours"
        },
        "gflops": round(flops / ours / 1e9, 1),
    }


def matmul_gflops() -> float:
    """What torch.mm reaches on this machine, as the scale for our figures."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    best = min(seconds(lambda: a @ b, 10) for _ in range(5))
    return round(2 * 512**3 / best / 1e9, 1)


def commit() -> str:
    command = ["git", "-C", str(FOLDER.parent), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--layout", default="nchw", choices=("nchw", "channels_last"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if any(name not in os.environ for name in ENVIRONMENT) and sys.platform == "linux":
        os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.run", *sys.argv[1:]])
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    rows = []
    for shape in SHAPES:
        for train in (False, True):
            found = providers(not arguments.no_compile)
            steps = {name: make_step(f, shape, dtype, arguments.layout, train) for name, f in found.items()}
            flops = shape.flops_forward + (shape.flops_backward if train else 0)
            row = measure(shape, steps, arguments.rounds, flops)
            rows.append({"pass": "forward + backward" if train else "forward", **row})
            print(" | ".join(str(value) for value in rows[-1].values()), flush=True)
    result = {
        "op": "relu_linear_attention",
        "settings": {name: getattr(arguments, name) for name in ("threads", "dtype", "layout", "rounds")},
        "environment": info().as_dict(),
        "commit": commit(),
        "torch_mm_gflops": matmul_gflops(),
        "rows": rows,
    }
    output = arguments.output or FOLDER / f"cpu_{arguments.dtype}_{arguments.layout}_{arguments.threads}t.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"torch.mm: {result['torch_mm_gflops']} GF/s. Written: {output}")


if __name__ == "__main__":
    main()
