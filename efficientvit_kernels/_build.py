"""Sources, flags and the ninja file of the native libraries: one truth for setup.py and for development builds.

`python -m efficientvit_kernels._build` (or `make build`) rebuilds in place what changed.

Products, next to this file:
  libefficientvit_kernels_cpu.so   the CPU ops, on libtorch's stable ABI: one binary for every torch from FLOOR on
  libefficientvit_kernels_cuda.so  the CUDA ops, where nvcc is; a CPU-only torch cannot load it
  _C*.so                           pybind11, introspection only; the package works without it

FORCE_CUDA=1 makes a missing nvcc an error, FORCE_CUDA=0 leaves the CUDA ops out.
EFFICIENTVIT_KERNELS_CUDA_ARCHS names the compute capabilities to compile for, e.g. "80;86;90", or is "all".
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_FLOOR = (2, 11)
CPU_LIBRARY = "libefficientvit_kernels_cpu.so"
CUDA_LIBRARY = "libefficientvit_kernels_cuda.so"
INTROSPECTION_MODULE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")

# No -ffast-math: it breaks NaN propagation and the eps of 1e-15.
# -Wno-maybe-uninitialized: GCC 12's AVX-512 headers trip it in every intrinsic.
COMMON_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}


# Machine code for 8.0 also runs on 8.6 and 8.9, and the PTX that comes with the last one is compiled on a newer GPU at
# its first launch; a wheel for others has them all.
DEVELOPMENT_ARCHS = ("80", "90")
ALL_ARCHS = ("80", "86", "89", "90", "100", "120")
# No --use_fast_math, as above.
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]


@dataclass(frozen=True)
class Library:
    """One shared library: sources (with their own flags) and what it links to. rules: the ending of ninja's rules."""

    name: str
    sources: list[Path]
    flags: list[str]
    link_flags: list[str]
    rules: str = ""


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX, else g++, else c++; None if there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def nvcc() -> str | None:
    """Path of the CUDA compiler: $CUDA_HOME's, else the one on the PATH; None if there is none, or FORCE_CUDA is 0.

    Raises RuntimeError if FORCE_CUDA is 1 and there is none.
    """
    force = os.environ.get("FORCE_CUDA")
    if force not in (None, "0", "1"):
        raise RuntimeError(f"FORCE_CUDA must be 0 or 1, got {force!r}")
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    found = found or shutil.which("nvcc")
    if force == "1" and found is None:
        raise RuntimeError("FORCE_CUDA is 1, but nvcc was not found: set CUDA_HOME, or install the CUDA toolkit")
    return None if force == "0" else found


def cuda_archs() -> list[str]:
    """Compute capabilities to compile for, "80", "90", ..., in ascending order."""
    wanted = os.environ.get("EFFICIENTVIT_KERNELS_CUDA_ARCHS")
    if wanted == "all":
        return list(ALL_ARCHS)
    archs = re.split(r"[;,\s]+", wanted.strip()) if wanted else list(DEVELOPMENT_ARCHS)
    if not all(re.fullmatch(r"\d{2,3}", arch) and int(arch) >= 80 for arch in archs):
        raise RuntimeError(f"EFFICIENTVIT_KERNELS_CUDA_ARCHS must be all, or like '80;90', 80 or above, got {wanted!r}")
    return sorted(set(archs), key=int)


def why_no_cuda() -> str | None:
    """Why a build leaves out the CUDA kernels, or None. Raises RuntimeError as `nvcc` does."""
    import torch

    if (compiler := nvcc()) is None and os.environ.get("FORCE_CUDA") == "0":
        return "FORCE_CUDA is 0"
    if compiler is None:
        return "nvcc was not found (set CUDA_HOME, or install the CUDA toolkit)"
    if torch.version.cuda is None and os.environ.get("FORCE_CUDA") != "1":
        return f"torch {torch.__version__} has no CUDA (FORCE_CUDA=1 builds them all the same)"
    return None


def check_cuda_version(nvcc_says: str, torch_cuda: str | None) -> None:
    """Raises RuntimeError where nvcc and the CUDA that torch was built for differ in their major version."""
    found = re.search(r"release (\d+)\.(\d+)", nvcc_says)
    if found is None:
        raise RuntimeError(f"nvcc --version must name its release, got {nvcc_says!r}")
    if torch_cuda is not None and found[1] != torch_cuda.split(".")[0]:
        raise RuntimeError(
            f"nvcc must be of CUDA {torch_cuda.split('.')[0]}, as torch is, got {found[1]}.{found[2]}: "
            "set CUDA_HOME, or FORCE_CUDA=0 to build without the CUDA kernels"
        )


def libraries() -> list[Library]:
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    major, minor = TORCH_FLOOR
    torch_flags = [f"-isystem {path}" for path in include_paths()]  # nvcc wants the space
    torch_flags.append(f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000")
    torch_links = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    found = [Library(CPU_LIBRARY, sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), torch_flags, torch_links)]
    if (compiler := nvcc()) is not None and why_no_cuda() is None:
        found.append(_cuda_library(compiler, torch_flags, library_paths()))
    flags = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    return [*found, Library(INTROSPECTION_MODULE, [ROOT / "csrc" / "module.cpp"], flags, [])]


def _cuda_library(compiler: str, torch_flags: list[str], torch_folders: list[str]) -> Library:
    import torch

    check_cuda_version(subprocess.check_output([compiler, "--version"], text=True), torch.version.cuda)
    archs = cuda_archs()
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    flags = [*torch_flags, *codes]
    # Of libtorch_cuda the linker needs the name alone, so that this builds beside a CPU-only torch, too.
    links = [*(f"-L{path}" for path in torch_folders), "-ltorch_cpu", "-lc10", *codes]
    links.append("-Xlinker --no-as-needed -Xlinker $stub")
    return Library(CUDA_LIBRARY, sorted((ROOT / "csrc" / "cuda").glob("*.cu")), flags, links, "_cuda")


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
        f"nvcc = {nvcc()}",
        "rule compile_cuda",
        f"  command = $nvcc -MMD -MF $out.d {' '.join(NVCC_FLAGS)} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link_cuda",
        "  command = $nvcc -shared -cudart static $in -o $out $flags",
        "rule link",
        f"  command = $cxx -shared {extra} $in -o $out $flags",
        f"stub = {build_dir / 'libtorch_cuda.so'}",
        "rule stub",
        "  command = $cxx -shared -x c++ /dev/null -Wl,-soname,libtorch_cuda.so -o $out",
        "build $stub: stub",
    ]
    for library in libraries():
        objects = []
        for source in library.sources:
            obj = build_dir / library.name / (source.stem + ".o")
            objects.append(str(obj))
            flags = " ".join([*library.flags, *_source_flags(source)])
            lines += [f"build {obj}: compile{library.rules} {source}", f"  flags = {flags}"]
        lines += [
            f"build {out_dir / library.name}: link{library.rules} {' '.join(objects)} | $stub",
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

    if (reason := why_no_cuda()) is not None:
        print(f"efficientvit_kernels: built without the CUDA kernels: {reason}", flush=True)
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
