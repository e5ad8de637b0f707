"""Sanitized builds of the CPU library in a copy of the sources, planted faults in it, and runs under it.

What GCC's sanitizers would not see on their own is made visible by edits of the copy; each must find its place:

- Tensors. torch takes their memory from posix_memalign, which AddressSanitizer replaces, so every storage lies between
  red zones: the library's first access outside one is a report, although torch itself is not instrumented. What lies
  inside a storage but outside a view of it is not seen, so most samples are dense.
- Masked loads and stores are intrinsics, and those are not instrumented. The copy takes the loops over single elements
  that the baseline has. The masks themselves run in a third kind of copy, "guards": no sanitizer, but tensors and
  scratch memory that end where a forbidden page begins (tests/guard_pages.cpp).
- Scratch memory is kept from call to call, and pieces of it lie side by side. The copy allocates exactly what is asked
  for, and puts a red zone between the pieces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from efficientvit_kernels import _build, _library

ISAS = ["baseline", "avx2", "avx512"]
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1",
    "thread": "-fsanitize=thread -g1 -O1",
    "guards": "-O1",
}
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",), "guards": ()}
# What is loaded before torch, beside the runtimes.
INTERPOSERS = {"thread": "thread_pool.cpp", "guards": "guard_pages.cpp"}


@dataclass(frozen=True)
class Edit:
    """`old`, which must stand exactly once in csrc/cpu/`file`, becomes `new`."""

    file: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        found = text.count(self.old)
        assert found == 1, f"{self.file} has changed, {self.old!r} stands in it {found} times: adapt the edit"
        return text.replace(self.old, self.new)


ELEMENTWISE_TAILS = (
    Edit(
        "vec.h",
        "#if defined(__AVX512F__)\nstatic inline __mmask16 first_lanes",
        "#if 0\nstatic inline __mmask16 first_lanes",
    ),
    Edit(
        "vec.h",
        "#elif defined(__AVX2__)\nstatic inline __m256i first_lanes",
        "#elif 0\nstatic inline __m256i first_lanes",
    ),
)
EXACT_SIZE = Edit("launch.cpp", "if (bytes > size)", "if (bytes != size)")
RED_ZONES = (
    Edit("tile.h", "#pragma once\n", "#pragma once\n#include <sanitizer/asan_interface.h>\n"),
    Edit(
        "tile.h",
        "    used += (count + 15) / 16 * 16;\n    return piece;\n  }\n",
        "    used += (count + 15) / 16 * 16;\n"
        "    if (memory) ASAN_POISON_MEMORY_REGION(memory + used, 16 * sizeof(T));\n"
        "    used += 16;\n    return piece;\n  }\n"
        "  ~Arena() { if (memory) ASAN_UNPOISON_MEMORY_REGION(memory, used * sizeof(T)); }\n",
    ),
)
EDITS = {
    "address": (*ELEMENTWISE_TAILS, EXACT_SIZE, *RED_ZONES),
    "thread": ELEMENTWISE_TAILS,
    "guards": (EXACT_SIZE,),
}
ONE_INSTRUCTION_SET = (
    Edit("isa.h", "#if defined(__x86_64__)\n#define EVK_DECLARE_KERNELS", "#if 0\n#define EVK_DECLARE_KERNELS"),
)


def runtimes(sanitizer: str) -> list[str] | None:
    """The libraries to load before Python, which is not built with them; None if the compiler has none."""
    compiler = _build.compiler() or "g++"
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in RUNTIMES[sanitizer]
    ]
    return found if all(os.path.isabs(path) for path in found) else None


class SanitizedCopy:
    """A copy of the package and its C++ sources in `folder`, built with a sanitizer; one instruction set is quicker."""

    def __init__(self, folder: Path, sanitizer: str, only_baseline: bool = False) -> None:
        self.folder, self.sanitizer = folder, sanitizer
        source, package = _build.ROOT / "efficientvit_kernels", folder / "efficientvit_kernels"
        shutil.copytree(source, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        shutil.copytree(_build.ROOT / "csrc", folder / "csrc")
        edits = list(EDITS[sanitizer])
        if only_baseline:
            edits += ONE_INSTRUCTION_SET
            for isa in ISAS[1:]:
                (folder / "csrc" / "cpu" / f"kernels_{isa}.cpp").unlink()
        for edit in edits:
            self._apply(edit)
        self.preloads = runtimes(sanitizer) or []
        if sanitizer in INTERPOSERS:
            self.preloads.append(str(self._interposer()))
        self.build()

    def _apply(self, edit: Edit) -> None:
        path = self.folder / "csrc" / "cpu" / edit.file
        path.write_text(edit.applied(path.read_text()))

    def build(self) -> None:
        # The copy's own _build.py: it finds the sources beside itself.
        result = subprocess.run(
            [sys.executable, "-P", str(self.folder / "efficientvit_kernels" / "_build.py")],
            env={**os.environ, "EFFICIENTVIT_KERNELS_CXXFLAGS": FLAGS[self.sanitizer]},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-5000:]

    def _interposer(self) -> Path:
        library = self.folder / "interposer.so"
        source = _build.ROOT / "tests" / INTERPOSERS[self.sanitizer]
        command = [_build.compiler() or "g++", "-std=c++20", "-fPIC", "-shared", *FLAGS[self.sanitizer].split()]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        return library

    @contextmanager
    def planted(self, *faults: Edit) -> Iterator[None]:
        """While active, the library is built with these faults."""
        paths = {self.folder / "csrc" / "cpu" / fault.file for fault in faults}
        before = {path: path.read_text() for path in paths}
        try:
            for fault in faults:
                self._apply(fault)
            self.build()
            yield
        finally:
            for path, text in before.items():
                path.write_text(text)

    def run(self, calls: str, isa: str) -> subprocess.CompletedProcess[str]:
        """tests/sanitizer_calls.py on this copy."""
        return subprocess.run(
            [*_fixed_addresses(), sys.executable, "-m", "tests.sanitizer_calls", calls],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(self.folder), str(_build.ROOT)]),
                "LD_PRELOAD": " ".join(self.preloads),
                "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep memory until the end of the process
                "TSAN_OPTIONS": "halt_on_error=1",
                # torch's own ops then start no OpenMP threads, whose hand-overs ThreadSanitizer would misread.
                **({"OMP_NUM_THREADS": "1"} if self.sanitizer == "thread" else {}),
                "EFFICIENTVIT_KERNELS_CPU_ISA": isa,
                "EVK_SANITIZED_PACKAGE": str(self.folder),
            },
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )


def _fixed_addresses() -> list[str]:
    """ThreadSanitizer of GCC 12 fails under more than 28 random bits of an address, which newer kernels have."""
    path = Path("/proc/sys/vm/mmap_rnd_bits")
    many = path.exists() and int(path.read_text()) > 28
    return ["setarch", "-R"] if many and shutil.which("setarch") else []


def available(isa: str) -> bool:
    return ISAS.index(isa) <= ISAS.index(str(_library.cpu_isa()))
