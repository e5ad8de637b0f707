"""Loads the native libraries, once, and keeps the reason for every backend that cannot serve in this process.

The results are plain module constants, so that traced code (torch.compile, torch.export) reads them as such.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ._build import CPU_LIBRARY, CUDA_LIBRARY

OLDEST_TRITON = (3, 6)
BACKENDS = ("reference", "cpu", "triton", "cuda")
HOW_TO_BUILD = "build it with `pip install --no-build-isolation .` from the source folder (needs a C++ compiler)"
HOW_TO_BUILD_CUDA = f"{HOW_TO_BUILD[:-1]}, and nvcc of the CUDA that torch is built for)"

# What "auto" means in this process. Names given in code are never overridden.
DEFAULT_BACKEND = os.environ.get("EFFICIENTVIT_KERNELS_BACKEND", "auto")
if DEFAULT_BACKEND not in ("auto", *BACKENDS):
    raise ValueError(
        f"EFFICIENTVIT_KERNELS_BACKEND must be one of {', '.join(('auto', *BACKENDS))}, got {DEFAULT_BACKEND!r}"
    )


def _load(name: str, how_to_build: str) -> tuple[ctypes.CDLL | None, str | None]:
    """The library of that name with its ops registered, or None and the reason."""
    path = Path(__file__).with_name(name)
    if not path.exists():
        return None, f"{name} was not built: {how_to_build}"
    if _is_truncated(path):
        return None, f"{name} is truncated: {how_to_build}"
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        return ctypes.CDLL(str(path)), None
    except (OSError, RuntimeError) as error:  # another platform, a truncated file, a torch below the floor
        return None, f"{name} does not load into torch {torch.__version__} ({error}): {how_to_build}"


def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    """The CUDA library, which needs the CPU library's definitions of the ops, and torch's CUDA library."""
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} has no CUDA"
    if WHY_NOT_CPU is not None:
        return None, f"{CUDA_LIBRARY} needs the CPU kernels beside it: {WHY_NOT_CPU}"
    return _load(CUDA_LIBRARY, HOW_TO_BUILD_CUDA)


def _is_truncated(path: Path) -> bool:
    """Whether an ELF file ends before its last part, the section headers: loading it would end in a bus error."""
    with path.open("rb") as file:
        header = file.read(64)
        size = file.seek(0, os.SEEK_END)
    if len(header) < 64:
        return True
    if header[:5] != b"\x7fELF\x02":
        return False  # another format: the loader itself says what is wrong
    order = "<" if header[5] == 1 else ">"
    (start,) = struct.unpack_from(order + "Q", header, 40)
    entry_size, entries = struct.unpack_from(order + "HH", header, 58)
    return bool(start + entry_size * entries > size)


_cpu, WHY_NOT_CPU = _load(CPU_LIBRARY, HOW_TO_BUILD)
WHY_NOT_TRITON: str | None = None if importlib.util.find_spec("triton") else "triton is not installed"
# Triton's interpreter runs the kernels on CPU tensors, slowly: for tests, and only where the backend is named.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_cuda, WHY_NOT_CUDA = _load_cuda()
# The tests' emulator runs the CUDA kernels on CPU tensors, and sets this: only where the backend is named.
CUDA_EMULATED = False

if WHY_NOT_CPU is not None:
    warnings.warn(f"efficientvit_kernels runs without its CPU kernels: {WHY_NOT_CPU}", RuntimeWarning, stacklevel=2)


def why_not_run_triton(device_type: str) -> str | None:
    """Why Triton cannot run on such a device; traced code takes the answer as a constant."""
    return _ask_triton(device_type)


# All that torch.compiler.assume_constant_result does, but that imports the compiler, and Triton with it.
why_not_run_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _ask_triton(device_type: str) -> str | None:
    """Asked once: the first question imports it."""
    try:
        import triton
    except Exception as error:  # a broken installation may raise anything
        return f"triton does not import ({type(error).__name__}: {error})"
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if version < OLDEST_TRITON:
        return f"it needs triton {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} or newer, this is {triton.__version__}"
    if device_type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return None


def why_not_run_cuda(device_type: str) -> str | None:
    """Why the CUDA kernels cannot run on the current device; traced code takes the answer as a constant."""
    return _ask_cuda(device_type)


why_not_run_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _ask_cuda(device_type: str) -> str | None:
    if device_type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    archs = cuda_archs()
    if (major, minor) < (8, 0) or not archs:
        return f"it needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    # Machine code runs on later minor versions of its major one, the PTX of the last on everything later.
    codes = [divmod(arch, 10) for arch in archs]
    if (major, minor) >= codes[-1] or any(code[0] == major and code[1] <= minor for code in codes):
        return None
    return f"it was compiled for {', '.join(f'{a}.{b}' for a, b in codes)}, this GPU has {major}.{minor}"


def cuda_archs() -> list[int]:
    """What the CUDA library was compiled for, as 10 * major + minor, ascending; none without the library."""
    if _cuda is None:
        return []
    _cuda.efficientvit_kernels_cuda_archs.restype = ctypes.c_char_p
    return [int(arch) // 10 for arch in _cuda.efficientvit_kernels_cuda_archs().decode().split(",")]


def cpu_isa() -> str | None:
    """Instruction set of the CPU kernels ("baseline", "avx2", "avx512"); None without the library."""
    if _cpu is None:
        return None
    _cpu.efficientvit_kernels_cpu_isa.restype = ctypes.c_char_p
    return str(_cpu.efficientvit_kernels_cpu_isa().decode())


def _check_wanted_isa() -> None:
    """The environment may ask for a lesser instruction set; one that is not there must not pass in silence."""
    wanted = os.environ.get("EFFICIENTVIT_KERNELS_CPU_ISA")
    if wanted is not None and _cpu is not None and wanted != cpu_isa():
        raise ValueError(
            f"EFFICIENTVIT_KERNELS_CPU_ISA must be baseline, avx2 or avx512, and this CPU must have it, got {wanted!r}"
        )


def cpu_calls() -> int:
    """How often a CPU kernel has run in this process, eager or compiled: proof that one did."""
    if _cpu is None:
        return 0
    _cpu.efficientvit_kernels_cpu_calls.restype = ctypes.c_int64
    return int(_cpu.efficientvit_kernels_cpu_calls())


def cuda_calls() -> int:
    """How often a launcher of the CUDA library has run in this process, eager or compiled."""
    if _cuda is None:
        return 0
    _cuda.efficientvit_kernels_cuda_calls.restype = ctypes.c_int64
    return int(_cuda.efficientvit_kernels_cuda_calls())


@contextmanager
def stage_seconds() -> Iterator[dict[str, float]]:
    """Fills the yielded dictionary, at the end, with the CPU time of every stage of the CPU ops that ran meanwhile.

    CPU time is summed over threads: with two threads at work, twice what a clock shows.
    """
    seconds: dict[str, float] = {}
    if _cpu is None:
        yield seconds
        return
    _cpu.efficientvit_kernels_cpu_stage_ns.restype = ctypes.c_int64
    _cpu.efficientvit_kernels_cpu_stage_name.restype = ctypes.c_char_p
    _cpu.efficientvit_kernels_cpu_time_stages.argtypes = [ctypes.c_bool]
    _cpu.efficientvit_kernels_cpu_time_stages(True)
    try:
        yield seconds
        stage = 0
        while (name := _cpu.efficientvit_kernels_cpu_stage_name(stage)) is not None:
            nanoseconds = _cpu.efficientvit_kernels_cpu_stage_ns(stage)
            if nanoseconds:
                seconds[name.decode()] = nanoseconds / 1e9
            stage += 1
    finally:
        _cpu.efficientvit_kernels_cpu_time_stages(False)


_check_wanted_isa()
