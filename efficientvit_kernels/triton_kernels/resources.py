"""Compiles, for any architecture and without a GPU, what a call would launch, and reads back what the code needs.

`python -m efficientvit_kernels.triton_kernels.resources` writes the table of all variants (see `--help`).

Registers, stack and local memory come from `cuobjdump -res-usage` of the cuobjdump that Triton ships with: REG is
registers per thread, of 255; STACK the bytes per thread of the stack frame, where ptxas puts what it spills (the
kernels call nothing and index no array, so nothing else is there); LOCAL the bytes of local memory outside of it;
SHARED counts static shared memory alone, which Triton does not use. What was spilled shows in the code itself: `spills`
counts the bytes that its STL instructions, which write local memory, store. Shared memory per block, all of it dynamic,
comes from Triton's metadata, AMD's figures from its assembly.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch, recording


@dataclass(frozen=True)
class Architecture:
    """What one multiprocessor has. `shared_block`: bytes that one block may use; a warp of gfx942 has 64 threads."""

    shared_block: int
    shared: int
    warps: int
    blocks: int
    warp_size: int = 32


# CUDA C++ Programming Guide, technical specifications per compute capability; AMD CDNA3 ISA guide.
_KB = 1024
ARCHITECTURES = {
    "sm_80": Architecture(163 * _KB, 164 * _KB, 64, 32),
    "sm_86": Architecture(99 * _KB, 100 * _KB, 48, 16),
    "sm_89": Architecture(99 * _KB, 100 * _KB, 48, 24),
    "sm_90": Architecture(227 * _KB, 228 * _KB, 64, 32),
    "sm_100": Architecture(227 * _KB, 228 * _KB, 64, 32),
    "sm_120": Architecture(99 * _KB, 100 * _KB, 48, 24),
    "gfx942": Architecture(64 * _KB, 64 * _KB, 32, 32, 64),
}
SHARED_LIMIT = {name: architecture.shared_block for name, architecture in ARCHITECTURES.items()}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Resources:
    """Of one variant. `registers` per thread; `stack` and `spills` in bytes per thread; `shared` in bytes per block."""

    kernel: str
    arch: str
    variant: str
    registers: int
    stack: int
    spills: int
    shared: int
    num_warps: int

    @property
    def blocks(self) -> int:
        """Blocks that fit one multiprocessor at the same time."""
        arch = ARCHITECTURES[self.arch]
        if arch.warp_size == 64:  # 4 SIMDs of 512 registers a lane, 8 waves each, registers in steps of 8
            waves = 4 * min(8, 512 // _up(max(self.registers, 1), 8))
            fit = min(waves // self.num_warps, arch.shared // max(self.shared, 1))
        else:  # 65536 registers, given in steps of 8 per thread; the system takes 1 KB of shared memory per block
            registers = _up(max(self.registers, 1), 8) * 32 * self.num_warps
            fit = min(65536 // registers, arch.shared // (_up(self.shared, 128) + _KB), arch.warps // self.num_warps)
        return min(fit, arch.blocks)

    @property
    def occupancy(self) -> float:
        return self.blocks * self.num_warps / ARCHITECTURES[self.arch].warps

    @property
    def fault(self) -> str | None:
        """Why this variant may not be launched, or None."""
        if self.stack or self.spills:
            return f"stack {self.stack} and spills {self.spills} bytes must be 0"
        limit = SHARED_LIMIT[self.arch]
        return f"shared memory must be at most {limit} bytes, got {self.shared}" if self.shared > limit else None


def variant_of(launch: Launch) -> str:
    """The specialisation of a launch: types, strides that are 1, constexprs. Equal variants share their code."""
    signature, constexprs, aligned = _specialisation(launch)
    names = list(signature)
    types = ",".join(
        f"{name}:{kind}{'/16' if names.index(name) in aligned else ''}"
        for name, kind in signature.items()
        if kind != "constexpr"
    )
    values = constexprs | {name: launch.meta[name] for name in _OPTIONS if name in launch.meta}
    return f"{types};{','.join(f'{name}={value}' for name, value in values.items())}"


def compile_launch(launch: Launch, arch: str) -> Resources:
    """Compiles the variant of `launch` for "sm_80", ..., "gfx942" and reads its resources.

    Raises:
        ValueError: `arch` is none of `ARCHITECTURES`.
        RuntimeError: in the interpreter, whose kernels cannot be compiled.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"resources: arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("resources: TRITON_INTERPRET must be unset, got 1: interpreted kernels are not compiled")
    signature, constexprs, aligned = _specialisation(launch)
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(launch.kernel, signature, constexprs=constexprs, attrs=attributes)
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {name: launch.meta[name] for name in (*_OPTIONS, "enable_fp_fusion") if name in launch.meta}
    compiled = triton.compile(source, target=target, options=options)
    registers, stack, spills = _amd_usage(compiled.asm["amdgcn"]) if amd else _nvidia_usage(compiled.asm["cubin"])
    name = launch.kernel.__name__
    shared = int(compiled.metadata.shared)
    return Resources(name, arch, variant_of(launch), registers, stack, spills, shared, launch.meta["num_warps"])


def _specialisation(launch: Launch) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    """Signature, constexprs and the positions of arguments divisible by 16, as Triton's own launcher derives them."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.arguments, strict=False))
    values |= {name: value for name, value in launch.meta.items() if name in names}
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    aligned = []
    for i, (name, parameter) in enumerate(zip(names, launch.kernel.params, strict=True)):
        value = values[name]
        general = parameter.do_not_specialize
        if name in launch.meta or value is None or (isinstance(value, int) and value == 1 and not general):
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                aligned.append(i)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not general:
                aligned.append(i)
    return signature, constexprs, aligned


def _nvidia_usage(cubin: bytes) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _cuobjdump("-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
        if found is None:
            raise RuntimeError(f"resources: cuobjdump must report REG, STACK and LOCAL, got {text!r}")
        registers, stack, local = (int(group) for group in found.groups())
        # Without local memory there is nothing to spill to; disassembling every variant would double the time.
        return registers, stack, (stored_locally(_cuobjdump("-sass", file.name)) if stack or local else 0)


def _cuobjdump(option: str, path: str) -> str:
    tools = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
    command = [str(tools / "cuobjdump"), option, path]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": str(tools)})
    return found.stdout


def stored_locally(sass: str) -> int:
    """Bytes per thread that the STL instructions of a disassembly store, each counted once."""
    widths = [int(width) if width else 32 for width in re.findall(r"\bSTL(?:\.(64|128))?(?=[.\s])", sass)]
    return sum(widths) // 8


def _amd_usage(assembly: str) -> tuple[int, int, int]:
    """Vector registers, private segment, and the vector registers spilled to it."""

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"resources: the assembly must hold .{name}, got none")
        return int(found.group(1))

    return value("vgpr_count"), value("private_segment_fixed_size"), value("vgpr_spill_count") * 4


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def unique(launches: Iterable[Launch]) -> list[Launch]:
    """One launch per variant, in order."""
    return list({(launch.kernel.__name__, variant_of(launch)): launch for launch in launches}.values())


@dataclass(frozen=True)
class Case:
    """One call: what decides which variants of the kernels it launches. `kind`: a dtype, or "tf32" for float32."""

    op: str
    kind: str
    dim: int
    layout: str
    height: int
    width: int
    batch: int = 2

    @property
    def heads(self) -> int:
        """As many as 256 channels have, a width of the official models."""
        return max(1, 256 // self.dim)

    @property
    def scales(self) -> tuple[int, ...]:
        """The windows of the official models, and at D = 64 one that is too large to be unrolled."""
        return {32: (3, 5), 64: (5, 9)}.get(self.dim, (5,))

    def image(self, channels: int) -> Tensor:
        memory_format = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        dims = (self.batch, channels, self.height, self.width)
        return torch.empty(dims, dtype=self.dtype, device="meta", memory_format=memory_format)

    @property
    def dtype(self) -> torch.dtype:
        dtype = getattr(torch, "float32" if self.kind == "tf32" else self.kind)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def __str__(self) -> str:
        return f"{self.kind}, D {self.dim}, {self.layout}, {self.height} x {self.width}"


def _attention(case: Case) -> None:
    from . import relu_linear_attention as kernels

    qkv = case.image(3 * case.heads * case.dim)
    out, state = kernels.relu_linear_attention_fwd([qkv], case.dim, 1e-15)
    kernels.relu_linear_attention_bwd(out, [qkv], state, case.dim, 1e-15, [0])


def _weights(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Of the depthwise convolutions of all scales, and of the grouped ones."""
    channels = 3 * case.heads * case.dim

    def weight(*dims: int) -> Tensor:
        return torch.empty(channels, *dims, dtype=case.dtype, device="meta")

    return [weight(1, k, k) for k in case.scales], [weight(case.dim, 1, 1) for _ in case.scales]


def _aggregation(case: Case) -> None:
    from . import multiscale_aggregate as kernels

    qkv, (depthwise, pointwise) = case.image(3 * case.heads * case.dim), _weights(case)
    outs = kernels.multiscale_aggregate_fwd(qkv, depthwise, pointwise, [], [], case.dim)
    kernels.multiscale_aggregate_bwd(outs, qkv, depthwise, pointwise, [], case.dim, True, True, False)


def _lite_mla(case: Case) -> None:
    """The backward launches the kernels of the two other ops."""
    from . import lite_mla as kernels

    channels, (depthwise, pointwise) = case.heads * case.dim, _weights(case)
    x = case.image(channels)
    weight = partial(torch.empty, dtype=case.dtype, device="meta")
    vector = torch.empty(channels, dtype=torch.float32, device="meta")
    qkv_weight = weight((3 * channels, channels, 1, 1))
    proj_weight = weight((channels, channels * (1 + len(case.scales)), 1, 1))
    weights = (qkv_weight, depthwise, pointwise, proj_weight)
    for save in (False, True):
        kernels.lite_mla_fwd(x, *weights, None, [], [], vector, vector, x, case.dim, 1e-15, save)


# What launches the kernels of an op, forward and backward, on meta tensors.
OPS: dict[str, Callable[[Case], None]] = {
    "relu_linear_attention": _attention,
    "multiscale_aggregate": _aggregation,
    "lite_mla": _lite_mla,
}
KINDS = ("float16", "bfloat16", "tf32", "float32")
LAYOUTS = ("nchw", "channels_last")
OFFICIAL_DIMS = (16, 32)
# Of the others each block once whole and once padded, which is all that the kernels tell apart, and float16 for both
# 16-bit dtypes.
OTHER_DIMS = (8, 40, 64, 112, 128, 160, 256)
OTHER_KINDS = ("float16", "tf32", "float32")
# Triton makes of a kernel for these what it makes for sm_80; only ptxas knows them. So the official D are enough, and
# one that takes the kernels for large windows.
LIKE_SM_80 = ("sm_86", "sm_89", "sm_120")
DIMS_THERE = (*OFFICIAL_DIMS, 64)
OFFICIAL_IMAGES = ((7, 7), (8, 8), (14, 14), (16, 16), (32, 32), (64, 64), (64, 128), (128, 128))
TILED_IMAGES = ((7, 7), (14, 14), (32, 32), (64, 64))  # of those, what the kernels with tiles of rows tell apart
ODD_IMAGES = ((7, 7), (33, 33))


def all_cases(quick: bool = False) -> list[Case]:
    """Every D, kind and layout, the official D on all official planes, the others on an aligned one; in NCHW, where it
    decides how all of it is loaded, also on planes that are not. `quick`: calls that launch every kernel.
    """
    if quick:
        large = Case("multiscale_aggregate", "float16", 64, "nchw", 64, 64)
        return [large, *(Case(op, "float16", 32, "nchw", 64, 64) for op in OPS)]
    cases = []
    for op, layout in product(OPS, LAYOUTS):
        odd = ODD_IMAGES if layout == "nchw" else ()
        official = OFFICIAL_IMAGES if op == "relu_linear_attention" else TILED_IMAGES
        for dim, kind, image in product(OFFICIAL_DIMS, KINDS, official + odd):
            cases.append(Case(op, kind, dim, layout, *image))
        for dim, kind, image in product(OTHER_DIMS, OTHER_KINDS, ((64, 64), *odd)):
            if op != "lite_mla" or dim <= 64:  # beyond, it launches the kernels of the two other ops
                cases.append(Case(op, kind, dim, layout, *image))
    return cases


def cases_for(arch: str, cases: Iterable[Case]) -> list[Case]:
    return [case for case in cases if arch not in LIKE_SM_80 or case.dim in DIMS_THERE]


def launches_of(case: Case, arch: str) -> list[Launch]:
    """What the call would launch on `arch`: one launch per variant."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.kind == "tf32" else "highest")
    try:
        with recording(arch) as launches:
            OPS[case.op](case)
    finally:
        torch.set_float32_matmul_precision(before)
    return unique(launches)


@dataclass(frozen=True)
class Job:
    """The variant to compile: launch `index` of a case."""

    arch: str
    case: Case
    index: int

    def launch(self) -> Launch:
        return launches_of(self.case, self.arch)[self.index]

    def run(self) -> Resources:
        return compile_launch(self.launch(), self.arch)


def jobs_of(cases: Iterable[Case], arch: str) -> list[Job]:
    """One job per variant of all the cases."""
    jobs: dict[tuple[str, str], Job] = {}
    for case in cases:
        for i, launch in enumerate(launches_of(case, arch)):
            jobs.setdefault((launch.kernel.__name__, variant_of(launch)), Job(arch, case, i))
    return list(jobs.values())


def run_jobs(jobs: Sequence[Job], processes: int = 2, progress: bool = True) -> Iterator[tuple[Job, Resources]]:
    """Compiles all, in processes of their own."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for i, (job, found) in enumerate(zip(jobs, pool.map(Job.run, jobs, chunksize=4), strict=True), 1):
            if progress and (i % 50 == 0 or i == len(jobs) or found.fault):
                fault = f": {found.kernel}, {job.case}: {found.fault}" if found.fault else ""
                print(f"{i} of {len(jobs)}, {job.arch}{fault}", file=sys.stderr, flush=True)
            yield job, found


def main(argv: list[str] | None = None) -> int:
    """0 when every variant keeps to the budget, else 1."""
    from . import resource_report as report

    parser = argparse.ArgumentParser("python -m efficientvit_kernels.triton_kernels.resources", description=__doc__)
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="names with commas between; default all")
    parser.add_argument("--op", default=",".join(OPS), help="names with commas between; default all")
    parser.add_argument("--quick", action="store_true", help="one configuration of every kernel")
    parser.add_argument("--processes", type=int, default=2, help="default %(default)s")
    parser.add_argument("--output", help="JSON file; without it the summary is printed alone")
    parser.add_argument("--summary", help="Markdown file for the summary")
    arguments = parser.parse_args(argv)
    cases = [case for case in all_cases(arguments.quick) if case.op in arguments.op.split(",")]
    rows: list[report.Row] = []
    for arch in arguments.arch.split(","):
        if arch not in ARCHITECTURES:
            parser.error(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
        jobs = jobs_of(cases_for(arch, cases), arch)
        if arguments.quick:
            jobs = list({job.launch().kernel.__name__: job for job in jobs}.values())
        rows += [report.row(job, found) for job, found in run_jobs(jobs, arguments.processes)]
    if arguments.output is not None:
        report.write(rows, Path(arguments.output))
    if arguments.summary is not None:
        Path(arguments.summary).write_text(report.summary(rows))
    elif arguments.output is None:
        print(report.summary(rows))
    return 1 if any(row["fault"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
