"""What the CUDA kernels need of a multiprocessor, read from a built library without a GPU.

`python -m benchmarks.cuda_resources` builds the library for all of `ARCHS` in a folder of its own (several minutes of
nvcc on one core; `MAX_JOBS` says how many at once) and writes benchmarks/results/cuda_resources.json and
docs/cuda-resources.md. With `--library FILE` it prints what a library that is there already holds, and writes nothing.

Registers, stack, static shared and local memory come from `cuobjdump --dump-resource-usage`, spilled bytes from the
STL instructions of the code itself, as in efficientvit_kernels/triton_kernels/resources.py. Dynamic shared memory and
warps are those of the launch plan for `HEADS` heads of an image of `SIZE` by `SIZE` tokens; kernels whose plan the
introspection module does not give have neither. What is listed is what the library holds, whatever its names.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cuda_resources_report as report
from efficientvit_kernels import _build
from efficientvit_kernels.triton_kernels.resources import ARCHITECTURES, Resources, stored_locally

ARCHS = _build.ALL_ARCHS
BUILD = _build.ROOT / "build" / "wheel"  # whose objects are those of `make wheel` for all GPUs
HEADS, SIZE, MULTIPROCESSORS = 16, 64, 132
# From compute capability 9.0 on cuobjdump counts what the system takes of every block that uses shared memory.
SYSTEM_SHARED = 1024


@dataclass(frozen=True)
class Usage:
    """Of one kernel on one architecture: registers per thread; bytes per thread, but `static_shared`, per block."""

    kernel: str  # without namespaces and parameters: "apply_kernel<__half, 16, kTokens>"
    arch: str
    registers: int
    stack: int
    spills: int
    static_shared: int

    def with_plan(self) -> dict[str, object]:
        """A row of the table: with the plan's shared memory and warps, and the occupancy that follows."""
        plan = plan_of(self.kernel, self.arch)
        dynamic, warps = plan if plan else (None, None)
        found = Resources(
            *(self.kernel, self.arch, "", self.registers, self.stack, self.spills),
            self.static_shared + (dynamic or 0),
            warps or 1,
        )
        occupancy = round(found.occupancy, 3) if plan else None
        values = (self.kernel, self.arch, self.registers, self.stack, self.spills, self.static_shared)
        return dict(zip(report.COLUMNS, (*values, dynamic, warps, occupancy, found.fault), strict=True))


@functools.cache
def tools() -> Path | None:
    """The folder of cuobjdump and of nvdisasm, which it calls: the toolkit's, or those that Triton comes with."""
    folders = [Path(compiler).resolve().parent for compiler in [_build.nvcc()] if compiler]
    folders += [Path(entry) / "triton" / "backends" / "nvidia" / "bin" for entry in sys.path]
    return next((f for f in folders if (f / "cuobjdump").exists() and (f / "nvdisasm").exists()), None)


def why_not() -> str | None:
    """Why no library can be read here, or None."""
    if tools() is None:
        return "needs cuobjdump and nvdisasm, of the CUDA toolkit or of Triton"
    return None if shutil.which("c++filt") else "needs c++filt"


def nvcc_version() -> str | None:
    """ "13.0.88", or None without nvcc."""
    if (compiler := _build.nvcc()) is None:
        return None
    found = re.search(r"\bV(\d[\d.]*)", subprocess.check_output([compiler, "--version"], text=True))
    return found[1] if found else None


def cuobjdump(*arguments: str) -> str:
    folder = tools()
    assert folder is not None, why_not()
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(folder / "cuobjdump"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [_short(line) for line in done.stdout.splitlines()]


def _short(name: str) -> str:
    """Without result, namespaces and parameters; enumerators by their names."""
    name = name.removeprefix("void ")
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        # An argument of a template may hold brackets, too: "(Access)1".
        if letter == "(" and depth == 0 and i > 0 and name[i - 1] not in ": ":
            end = i
            break
    name = re.sub(r"\(anonymous namespace\)::", "", name[:end])
    name = re.sub(r"\((?:\w+::)*(\w+)\)(\d+)", lambda found: _enumerator(found[1], int(found[2])), name)
    return re.sub(r"\b(?:\w+::)+", "", name)


@functools.cache
def _enumerators() -> dict[str, list[str]]:
    """Of the enum classes of csrc/cuda, whose enumerators count from 0."""
    found = {}
    for path in sorted((_build.ROOT / "csrc" / "cuda").glob("*.*h")):
        for name, body in re.findall(r"enum class (\w+)[^{;]*\{([^}]*)\}", path.read_text()):
            found[name] = re.findall(r"\bk\w+", re.sub(r"//[^\n]*", "", body))
    return found


def _enumerator(name: str, value: int) -> str:
    names = _enumerators().get(name, [])
    return names[value] if value < len(names) else f"{name}({value})"


def usages(library: Path) -> list[Usage]:
    """Of every kernel of a library on every architecture that it holds machine code for."""
    arch, mangled = "", ""
    found: list[tuple[str, str, re.Match[str]]] = []
    for line in cuobjdump("--dump-resource-usage", str(library)).splitlines():
        if head := re.match(r"arch = (sm_\w+)", line):
            arch = head[1]
        elif head := re.match(r"\s*Function (\S+):$", line):
            mangled = head[1]
        elif usage := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            found.append((arch, mangled, usage))
    names = dict(zip([entry[1] for entry in found], demangled([entry[1] for entry in found]), strict=True))
    result = []
    for arch, mangled, usage in found:
        registers, stack, shared, local = map(int, usage.groups())
        spills = 0
        if stack or local:  # without local memory there is nothing to spill to
            spills = stored_locally(sass(library, mangled, arch))
        if int(arch.removeprefix("sm_")) >= 90 and shared:
            shared -= SYSTEM_SHARED
        result.append(Usage(names[mangled], arch, registers, stack, spills, shared))
    return sorted(result, key=lambda usage: (usage.kernel, int(usage.arch.removeprefix("sm_"))))


def symbols(library: Path) -> dict[str, str]:
    """The kernels of a library: their short names, and those of the linker."""
    text = cuobjdump("--dump-resource-usage", str(library))
    mangled = sorted(set(re.findall(r"^\s*Function (\S+):$", text, re.MULTILINE)))
    return dict(zip(demangled(mangled), mangled, strict=True))


def sass(library: Path, mangled: str, arch: str) -> str:
    """The machine code of one kernel."""
    text = cuobjdump("-sass", "-fun", mangled, "-arch", arch, str(library))
    assert f"Function : {mangled}" in text, f"{library.name} has no {mangled} for {arch}"
    return text


# What of a launch plan a kernel's name says: "grad_kv_fp32_kernel<64>", "aggregate_kernel<__half, 16, 5>".
_NAME = re.compile(r"(?P<name>\w+?)(?P<fp32>_fp32)?_kernel<(?:(?P<type>\w+), )?(?P<first>\d+)(?:, (?P<second>\w+))?>")


def plan_of(kernel: str, arch: str) -> tuple[int, int] | None:
    """Dynamic shared memory in bytes and the warps of a block, where the introspection module gives the plan."""
    from efficientvit_kernels import _C

    if (found := _NAME.fullmatch(kernel)) is None:
        return None
    name, first, second = found["name"], int(found["first"]), found["second"]
    fp32, shared_block = found["fp32"] is not None or found["type"] == "float", ARCHITECTURES[arch].shared_block
    if name in ("kv_state", "apply", "grad_state", "grad_kv"):
        launch = _C.cuda_relu_linear_attention_plan(HEADS, SIZE * SIZE, first, fp32, MULTIPROCESSORS)[name]
        staged = launch["stage_bytes"] if second == "kElements" else 0
        return launch["shared_bytes"] + staged, launch["threads"] // 32
    if name in ("aggregate", "aggregate_gradients"):
        plan = _C.cuda_multiscale_aggregate_plan(1, HEADS, SIZE, SIZE, first, int(second), fp32, shared_block)
        launch = plan["forward" if name == "aggregate" else "gradients"]
    elif name in ("aggregate_kv_state", "aggregate_apply"):
        sizes = (1, HEADS, SIZE, SIZE, first, int(second))
        plan = _C.cuda_lite_mla_plan(*sizes, 256, MULTIPROCESSORS, shared_block)
        launch = plan["state" if name == "aggregate_kv_state" else "apply"]
    elif name in ("lite_mla_state", "lite_mla_apply"):  # of 64 channels
        heads = 64 // first
        plan = _C.cuda_two_launches_plan(1, 64, heads, SIZE, SIZE, first, int(second), 64, shared_block)
        if not plan["served"]:
            return None
        launch = plan[name.removeprefix("lite_mla_")]
    elif name == "projection":  # blocks of fewer tokens at batch 1
        plans = [_C.cuda_lite_mla_plan(b, 1, SIZE, SIZE, 8, 3, 256, MULTIPROCESSORS, shared_block) for b in (1, 32)]
        (launch,) = (plan["projection"] for plan in plans if plan["projection"]["tokens"] == first)
    else:
        return None
    return launch["shared_bytes"], launch["threads"] // 32


def build(folder: Path = BUILD) -> Path:
    """The library for all of `ARCHS`, compiled where something has changed."""
    import ninja

    os.environ.update(FORCE_CUDA="1", EFFICIENTVIT_KERNELS_CUDA_ARCHS=";".join(ARCHS))
    products = folder / "libraries"  # beside the folders of objects, which have the libraries' names
    products.mkdir(parents=True, exist_ok=True)
    library = products / _build.CUDA_LIBRARY
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(_build.write_ninja(folder, products))]
    command += ["-j", os.environ.get("MAX_JOBS", "2"), str(library)]
    if subprocess.run(command, check=False).returncode != 0:
        raise RuntimeError("compiling the CUDA library failed; the compiler's messages are above")
    return library


def main(argv: list[str] | None = None) -> int:
    """0 when every kernel keeps to the budget, else 1."""
    parser = argparse.ArgumentParser("python -m benchmarks.cuda_resources", description=__doc__)
    parser.add_argument("--library", type=Path, help="print what this one holds")
    parser.add_argument("--output", type=Path, default=report.TABLE, help="default %(default)s")
    parser.add_argument("--summary", type=Path, default=report.SUMMARY, help="default %(default)s")
    arguments = parser.parse_args(argv)
    if (reason := why_not()) is not None:
        parser.error(reason)
    rows = [usage.with_plan() for usage in usages(arguments.library or build())]
    version = nvcc_version() or "unknown"
    if arguments.library:
        print(report.summary(rows, version))
    else:
        report.write(rows, version, arguments.output)
        arguments.summary.write_text(report.summary(rows, version))
    return 1 if any(row["fault"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
