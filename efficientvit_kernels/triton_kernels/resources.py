"""Compiles, for any architecture and without a GPU, what a call would launch, and reads back what the code needs.

`python -m efficientvit_kernels.triton_kernels.resources` writes the table (see `--help`). Registers, stack and spills
come from the cuobjdump that Triton ships with, shared memory from Triton's own metadata; AMD's figures from its
assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch

# Shared memory that one block may use, in bytes.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
ARCHITECTURES = tuple(SHARED_LIMIT)
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Resources:
    """Of one compiled variant. `registers` per thread; `stack` and `spills` in bytes per thread; `shared` per block."""

    kernel: str
    arch: str
    variant: str
    registers: int
    stack: int
    spills: int
    shared: int
    num_warps: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def variant_of(launch: Launch) -> str:
    """The specialisation of a launch: types, strides that are 1, constexprs. Equal variants share their code."""
    signature, constexprs, aligned = _specialisation(launch)
    names = list(signature)
    types = ",".join(
        f"{name}:{kind}{'/16' if names.index(name) in aligned else ''}"
        for name, kind in signature.items()
        if kind != "constexpr"
    )
    return f"{types};{','.join(f'{name}={value}' for name, value in constexprs.items())}"


def compile_launch(launch: Launch, arch: str) -> Resources:
    """Compiles the variant of `launch` for "sm_80", ..., "gfx942" and reads its resources."""
    signature, constexprs, aligned = _specialisation(launch)
    source = ASTSource(
        launch.kernel,
        signature,
        constexprs=constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {name: launch.meta[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    compiled = triton.compile(source, target=target, options=options)
    registers, stack, spills = _amd_usage(compiled.asm["amdgcn"]) if amd else _nvidia_usage(compiled)
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
    for i, name in enumerate(names):
        value = values[name]
        if name in launch.meta or (isinstance(value, int) and value == 1):
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                aligned.append(i)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(i)
    return signature, constexprs, aligned


def _nvidia_usage(compiled: Any) -> tuple[int, int, int]:
    """Registers and stack from the binary, spills from the assembler's report (they are part of the stack)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"resources: cuobjdump must report REG and STACK, got {text!r}")
    registers, stack, local = (int(group) for group in found.groups())
    return registers, stack, local


def _amd_usage(assembly: str) -> tuple[int, int, int]:
    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return value("vgpr_count"), value("private_segment_fixed_size"), value("vgpr_spill_count") * 4


def unique(launches: Iterable[Launch]) -> list[Launch]:
    """One launch per variant, in order."""
    return list({(launch.kernel.__name__, variant_of(launch)): launch for launch in launches}.values())
