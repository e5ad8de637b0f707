"""compute-sanitizer on small shapes of every op and backend: memory, races, uninitialised reads, barriers.

Two planted faults come first: a tool that does not report these would report nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.calls import DTYPES, OPS, Sample, proof_of_native, results, runnable, served
from benchmarks.gpu.child import isolated, tail
from benchmarks.gpu.parts import Context, FailedError, NotRunError, Step

TOOLS = {
    "memcheck": ("--padding", "32"),  # bytes behind every allocation that nobody may touch
    "racecheck": ("--racecheck-report", "all"),
    "synccheck": (),
    "initcheck": (),
}
PLANTED = {"memcheck": "out_of_bounds", "initcheck": "uninitialised"}
CHILD_S = 240.0
# Every allocation its own, so that the tool knows where each ends.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# In the names of kernels that torch and NVIDIA's libraries bring.
FOREIGN = ("at::", "at_cuda", "cutlass", "cublas", "cudnn", "gemmk1", "gemvx", "nvjet", "ampere_", "sm80_", "sm90_")


def steps(context: Context) -> list[Step]:
    backends = runnable(context.device)
    planted = [Step(f"planted fault: {tool}", partial(plant, tool), 10.0) for tool in PLANTED]
    if not backends:
        return [*planted, Step("no backend", nothing_to_check)]
    return planted + [
        Step(f"{tool}: {op}, {backend}", partial(sanitize, tool, op, backend), 20.0)
        for tool in TOOLS
        for backend in backends
        for op in OPS
    ]


def nothing_to_check(context: Context) -> dict[str, Any]:
    raise NotRunError("no backend of this package has kernels for this device")


def samples_of(op: str) -> list[Sample]:
    """Twelve: head dimensions, tails in both axes, one pixel, fewer tokens than D, every layout, batches."""
    return [
        Sample(op, 1, 1, 8, 5, 7, extras=True),
        Sample(op, 2, 2, 16, 9, 7, (3, 5)),
        Sample(op, 1, 2, 16, 14, 14, layout="channels_last", extras=True),
        Sample(op, 1, 2, 32, 14, 14),
        Sample(op, 1, 1, 32, 17, 19, layout="sliced"),
        Sample(op, 1, 1, 40, 6, 5, layout="transposed"),
        Sample(op, 1, 1, 64, 9, 8),
        Sample(op, 1, 1, 160, 3, 5),
        Sample(op, 2, 2, 16, 1, 1, extras=True),
        Sample(op, 1, 2, 32, 2, 3, layout="offset"),
        Sample(op, 1, 1, 16, 33, 65),
        Sample(op, 3, 1, 16, 4, 5, layout="expanded"),
    ]


def workload(op: str, backend: str, where: str) -> dict[str, Any]:
    """Runs under the tool: forward and backward of every sample in every dtype."""
    ran = []
    with proof_of_native(backend):
        for sample in samples_of(op):
            for dtype in DTYPES:
                results(served(op, backend), sample.make(dtype, where), True, dtype)
            ran.append(str(sample))
        torch.cuda.synchronize()
    return {"ran": ran}


def planted(fault: str) -> dict[str, Any]:
    if fault == "out_of_bounds":
        probes = importlib.import_module("benchmarks.gpu.triton_probes")
        try:
            probes.out_of_bounds()
        except RuntimeError as error:
            return {"raised": str(error).splitlines()[0]}
    else:
        (torch.empty(4096, device="cuda") + 1).sum().item()
    return {"planted": fault}


def find_tool() -> str | None:
    """In PATH, in the CUDA toolkit, or in the package nvidia-cuda-sanitizer-api."""
    name = "compute-sanitizer"
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    found = shutil.which(name) or next(
        (path for home in homes if home and (path := shutil.which(str(Path(home) / "bin" / name)))), None
    )
    if found is not None:
        return found
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations if spec is not None and spec.submodule_search_locations else []:
        for wheel in Path(place).glob(f"*/bin/{name}"):
            return str(wheel)
    return None


def command(tool: str) -> list[str]:
    path = find_tool()
    if path is None:
        raise NotRunError("compute-sanitizer is not there (PATH, CUDA_HOME, package nvidia-cuda-sanitizer-api)")
    return [path, "--tool", tool, *TOOLS[tool], "--print-limit", "50", "--error-exitcode", "99"]


def plant(tool: str, context: Context) -> dict[str, Any]:
    """The tool must report a planted fault."""
    prefix = command(tool)
    if not context.on_gpu:
        raise NotRunError("needs a GPU")
    arguments, timeout = {"fault": PLANTED[tool]}, min(CHILD_S, context.left())
    _, process = isolated("sanitize:planted", arguments, timeout, prefix, ENVIRONMENT)
    report = parse(process.stdout + process.stderr)
    report["version"] = version(prefix[0])
    if not report["errors"]:
        raise FailedError("the planted fault was not reported", report | {"output": tail(process)})
    return report


def sanitize(tool: str, op: str, backend: str, context: Context) -> dict[str, Any]:
    prefix = command(tool)
    if not context.on_gpu:
        raise NotRunError("needs a GPU")
    arguments = {"op": op, "backend": backend, "where": context.device}
    timeout = min(CHILD_S, context.left())
    result, process = isolated("sanitize:workload", arguments, timeout, prefix, ENVIRONMENT)
    report = parse(process.stdout + process.stderr)
    if result is not None and "not_run" in result:
        raise NotRunError(result["not_run"])
    return judge(report, result, process)


def judge(
    report: dict[str, Any], result: dict[str, Any] | None, process: subprocess.CompletedProcess[str]
) -> dict[str, Any]:
    """No report in a kernel of ours, and the workload has ended: reports in torch's own kernels are kept, too."""
    report |= {"ran": (result or {}).get("ran", []), "status": process.returncode}
    if result is None or "failed" in result:
        report["output"] = tail(process)
        raise FailedError(f"the workload did not end: status {process.returncode}", report)
    ours = {name: count for name, count in report["kernels"].items() if not any(part in name for part in FOREIGN)}
    unnamed = report["errors"] and not report["kernels"]
    if ours or unnamed:
        raise FailedError(f"{report['errors']} errors, in {', '.join(ours) or 'an unnamed kernel'}", report)
    return report


def parse(text: str) -> dict[str, Any]:
    """Number of errors, the kernels that are named in them, and the first lines."""
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    summaries = [re.search(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", line) for line in lines]
    errors = sum(int(found[1] or found[2]) for found in summaries if found)
    names = [re.search(r"(?:^=========\s+|[Aa]ccess (?:by thread \([^)]*\) )?)at (.+?)\+0x", line) for line in lines]
    kernels = Counter(found[1][:120] for found in names if found)
    return {"errors": errors, "kernels": dict(kernels), "report": [line[:200] for line in lines[:60]] if errors else []}


def version(path: str) -> str:
    process = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return (process.stdout.strip().splitlines() or ["unknown"])[-1]
