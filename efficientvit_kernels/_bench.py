"""The `bench` command: its options, and the way to the benchmarks of the source tree."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any


def add_options(bench: argparse.ArgumentParser) -> None:
    sets = ("cases", "registry", "ops", "smoke", "models")
    what = "time: measure; static: bytes, operations and least times of the GPU kernels; default %(default)s"
    bench.add_argument("what", nargs="?", default="time", choices=("time", "static"), help=what)
    bench.add_argument("--set", default="cases", choices=sets, help="shapes to measure; default %(default)s")
    bench.add_argument("--shape", action="append", metavar="NAME", help="only this shape of the set; may be repeated")
    bench.add_argument("--pass", dest="passes", default="both", choices=("inference", "training", "both"))
    bench.add_argument("--threads", type=int, default=1, help="of every provider; default %(default)s")
    bench.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    bench.add_argument("--layout", default="nchw", choices=("nchw", "channels_last"), help="of inputs and weights")
    bench.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="of the set models; default %(default)s"
    )
    bench.add_argument(
        "--peers", help="all, or names with commas between; default all, for the registry the eager ones"
    )
    bench.add_argument("--rounds", type=int, help="of shuffled blocks; default 15")
    bench.add_argument("--stages", action="store_true", help="also where the time of a LiteMLA goes in inference")
    bench.add_argument("--markdown", action="store_true", help="tables as Markdown")
    bench.add_argument("--output", help="JSON file; default, for a whole set, one in benchmarks/results")


def run_bench(arguments: argparse.Namespace) -> int:
    """Runs the benchmark; 0 when every number agrees and ours ran natively, else 1.

    Raises:
        FileNotFoundError: the package is installed without its source tree, which holds the benchmarks.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "run.py").is_file():
        raise FileNotFoundError(
            f"bench: benchmarks must be beside the package, as in a source tree, got none in {root}"
        )
    if arguments.what == "static":
        sys.path.insert(0, str(root))
        static: Any = importlib.import_module("benchmarks.static")
        return int(static.run_static(arguments))
    from .demo import ENVIRONMENT

    if any(name not in os.environ for name in ENVIRONMENT) and sys.platform == "linux":
        os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
        os.execv(sys.executable, [sys.executable, "-m", "efficientvit_kernels", *sys.argv[1:]])
    sys.path.insert(0, str(root))
    run: Any = importlib.import_module("benchmarks.run")  # not `import`: an installed package has no such module
    return int(run.run_bench(arguments))
