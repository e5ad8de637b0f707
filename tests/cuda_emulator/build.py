"""Compiles CUDA sources with the C++ compiler and the emulator into a shared library that runs on the CPU.

    path = library([ROOT / "csrc/cuda/op.cu"], "op", torch=True)
    torch.ops.load_library(path)

Libraries and object files are kept under build/cuda_emulator, by a hash of everything that goes into them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from efficientvit_kernels import _build

EMULATOR = Path(__file__).resolve().parent
DEVICE_CODE = _build.ROOT / "csrc" / "cuda"
BUILD = _build.ROOT / "build" / "cuda_emulator"

# -O1: half the compile time of -O2. No contraction, as results must not depend on the CPU. Hidden and not unique: two
# libraries in one process, one of them with a fault, must not share functions. Local variables that nobody sets are
# -1.7e38 rather than what a thread before has left (GCC 12; other compilers may not know the flag).
FLAGS = (
    *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
)
SET_VARIABLES = "-ftrivial-auto-var-init=pattern"
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")
THREAD = ("-fsanitize=thread", "-g1")


def cuda_include() -> Path | None:
    """The folder of cuda_fp16.h, which host compilers can read: $CUDA_HOME, nvcc's, /usr/local/cuda, or a package's."""
    homes = [Path(home) for home in [os.environ.get("CUDA_HOME")] if home]
    if nvcc := shutil.which("nvcc"):
        homes.append(Path(nvcc).resolve().parent.parent)
    homes.append(Path("/usr/local/cuda"))
    homes += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    homes += [folder for entry in sys.path for folder in sorted(Path(entry).glob("nvidia/cu*"), reverse=True)]
    return next((home / "include" for home in homes if (home / "include" / "cuda_fp16.h").exists()), None)


needs_compiler = pytest.mark.skipif(
    cuda_include() is None or _build.compiler() is None, reason="needs a C++ compiler and CUDA's headers"
)


def sanitizer_runtimes(flags: Sequence[str]) -> list[str] | None:
    """What must be loaded before Python when a library has these flags; None where the compiler lacks one."""
    names = {ADDRESS: ("libasan.so", "libubsan.so"), THREAD: ("libtsan.so",)}.get(tuple(flags), ())
    command = [_build.compiler() or "g++"]
    paths = [subprocess.check_output([*command, f"-print-file-name={name}"], text=True).strip() for name in names]
    return paths if all(os.path.isabs(path) for path in paths) else None


def library(
    sources: Sequence[Path],
    name: str,
    flags: Sequence[str] = (),
    includes: Sequence[Path] = (),
    *,
    torch: bool = False,
    scratch: Path | None = None,
) -> Path:
    """The shared library of these .cu files, compiled where something has changed.

    Args:
        flags: added for the sources; ADDRESS and THREAD are the sanitizers'. The emulator itself takes its own
            -DEVK_EMULATOR_... alone.
        includes: folders of headers, looked through after each file's own and before csrc/cuda.
        torch: compile against torch's stable ABI, as the op libraries are.
        scratch: a folder for what is not under build/cuda_emulator already; the caller removes it.

    Raises RuntimeError with the compiler's words, or when the compiler or CUDA's headers are missing.
    """
    folders = [*includes, DEVICE_CODE, EMULATOR]
    own_flags = [*FLAGS, *if_known(SET_VARIABLES), *flags, *(_torch_flags() if torch else ())]
    link_flags = [*flags, "-Wl,-Bsymbolic", *(_torch_link_flags() if torch else ())]
    jobs = [(source, own_flags) for source in sources]
    jobs += [
        (EMULATOR / file, [*FLAGS, "-O2"]) for file in ("launch.cpp", "scheduler.cpp", "fibers.cpp", "collectives.cpp")
    ]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        objects = list(pool.map(lambda job: _object(job[0], job[1], folders, scratch), jobs))
    key = _digest(*sorted(path.name for path in objects), *link_flags)
    # No rpath: torch is there before the library is loaded.
    return _made(BUILD / f"{name}-{key}.so", [_compiler(), "-shared", *map(str, objects), *link_flags], scratch)


def gpu_library(source: Path, includes: Sequence[Path] = ()) -> Path:
    """The same source by nvcc, for the GPU of this machine: what the emulator is checked against."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    flags = ["-std=c++20", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC"]
    folders = [*includes, DEVICE_CODE]
    key = _digest(*(path.read_text() for path in _with_headers(source, folders)), *flags)
    command = ["nvcc", *flags, *(f"-I{folder}" for folder in folders), str(source)]
    return _made(BUILD / f"gpu_{source.stem}-{key}.so", command, None)


def _compiler() -> str:
    if (compiler := _build.compiler()) is None:
        raise RuntimeError("cuda emulator: no C++ compiler found: set CXX, or install g++")
    return compiler


@cache
def _compiler_version(compiler: str) -> str:
    return subprocess.check_output([compiler, "--version"], text=True)


@cache
def if_known(flag: str) -> tuple[str, ...]:
    command = [_compiler(), "-Werror", flag, "-fsyntax-only", "-x", "c++", os.devnull]
    return (flag,) if subprocess.run(command, capture_output=True, check=False).returncode == 0 else ()


@cache
def _torch_flags() -> tuple[str, ...]:
    from torch.utils.cpp_extension import include_paths

    major, minor = _build.TORCH_FLOOR
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
    return (*(f"-isystem{path}" for path in include_paths()), target)


@cache
def _torch_link_flags() -> tuple[str, ...]:
    from torch.utils.cpp_extension import library_paths

    return (*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10")


def _object(source: Path, flags: Sequence[str], folders: Sequence[Path], scratch: Path | None) -> Path:
    cuda = cuda_include()
    if cuda is None:
        raise RuntimeError("cuda emulator: CUDA's headers not found: set CUDA_HOME, or install nvidia-cuda-runtime")
    texts = [path.read_text() for path in _with_headers(source, folders)]
    key = _digest(*texts, *flags, str(cuda), _compiler_version(_compiler()))
    command = [_compiler(), *flags, *(f"-I{folder}" for folder in folders), f"-isystem{cuda}"]
    return _made(BUILD / "objects" / f"{source.stem}-{key}.o", [*command, "-x", "c++", "-c", str(source)], scratch)


def _with_headers(source: Path, folders: Sequence[Path]) -> list[Path]:
    """The source and what it includes in quotes, directly or not."""
    found = [source.resolve()]
    for path in found:
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            candidates = [folder / name for folder in (path.parent, *folders)]
            header = next((candidate.resolve() for candidate in candidates if candidate.exists()), None)
            if header and header not in found:
                found.append(header)
    return found


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _made(product: Path, command: Sequence[str], scratch: Path | None) -> Path:
    """`product`, by `command` where it does not exist. Two processes may make it at once: each renames its own file."""
    if product.exists():
        return product
    if scratch:
        product = scratch / product.name
    product.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=product.parent) as folder:
        part = Path(folder) / product.name
        result = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"cuda emulator: compiling {product.name} failed\n{result.stderr[-10000:]}")
        part.replace(product)
    return product
