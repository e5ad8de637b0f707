"""Sources, flags and the ninja file of the native libraries: one truth for setup.py and for development builds.

`python -m efficientvit_kernels._build` (or `make build`) rebuilds in place what changed.

Products, next to this file:
  libefficientvit_kernels_cpu.so   the CPU ops, on libtorch's stable ABI: one binary for every torch from FLOOR on
  _C*.so                           pybind11, introspection only; the package works without it
The CUDA ops get a library of their own (it needs libtorch_cuda, which a CPU-only torch lacks).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_FLOOR = (2, 11)
CPU_LIBRARY = "libefficientvit_kernels_cpu.so"
INTROSPECTION_MODULE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")

# No -ffast-math: it breaks NaN propagation and the eps of 1e-15.
# -Wno-maybe-uninitialized: GCC 12's AVX-512 headers trip it in every intrinsic.
COMMON_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}


@dataclass(frozen=True)
class Library:
    """One shared library: sources (with their own flags) and what it links to."""

    name: str
    sources: list[Path]
    flags: list[str]
    link_flags: list[str]


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX, else g++, else c++; None if there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def libraries() -> list[Library]:
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    major, minor = TORCH_FLOOR
    torch_includes = [f"-isystem{path}" for path in include_paths()]
    cpu = Library(
        CPU_LIBRARY,
        sorted((ROOT / "csrc" / "cpu").glob("*.cpp")),
        [*torch_includes, f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"],
        [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"],
    )
    flags = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    return [cpu, Library(INTROSPECTION_MODULE, [ROOT / "csrc" / "module.cpp"], flags, [])]


def _source_flags(source: Path) -> list[str]:
    isa = ISA_FLAGS.get(source.name, [])
    return isa if platform.machine() in ("x86_64", "AMD64") else []


def write_ninja(build_dir: Path, out_dir: Path) -> Path:
    """Writes build.ninja into `build_dir`; its products go to `out_dir`."""
    # Paths in messages are relative to the source folder; sanitizers and debug information come from the environment.
    extra = f"-ffile-prefix-map={ROOT}/= {os.environ.get('EFFICIENTVIT_KERNELS_CXXFLAGS', '')}"
    lines = [
        f"cxx = {compiler()}",
        "rule compile",
        f"  command = $cxx -MMD -MF $out.d {' '.join(COMMON_FLAGS)} $flags {extra} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared {extra} $in -o $out $flags",
    ]
    for library in libraries():
        objects = []
        for source in library.sources:
            obj = build_dir / library.name / (source.stem + ".o")
            objects.append(str(obj))
            flags = " ".join([*library.flags, *_source_flags(source)])
            lines += [f"build {obj}: compile {source}", f"  flags = {flags}"]
        lines += [
            f"build {out_dir / library.name}: link {' '.join(objects)}",
            f"  flags = {' '.join(library.link_flags)}",
        ]
    build_dir.mkdir(parents=True, exist_ok=True)
    ninja_file = build_dir / "build.ninja"
    ninja_file.write_text("\n".join(lines) + "\n")
    return ninja_file


def build(build_dir: Path, out_dir: Path) -> list[Path]:
    """Compiles what changed and returns the libraries. Raises RuntimeError with the compiler's words on failure."""
    if compiler() is None:
        raise RuntimeError("no C++ compiler found: set CXX, or install g++")
    import ninja

    ninja_file = write_ninja(build_dir, out_dir)
    program = Path(ninja.BIN_DIR) / "ninja"
    command = [str(program), "-f", str(ninja_file), "-j", os.environ.get("MAX_JOBS", "2")]
    if subprocess.run(command, check=False).returncode != 0:
        raise RuntimeError("compiling the native library failed; the compiler's messages are above")
    return [out_dir / library.name for library in libraries()]


if __name__ == "__main__":
    try:
        for path in build(ROOT / "build" / "native", ROOT / "efficientvit_kernels"):
            print(path)
    except RuntimeError as error:
        sys.exit(f"efficientvit_kernels: {error}")
