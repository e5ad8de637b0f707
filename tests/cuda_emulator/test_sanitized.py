"""The emulator under sanitizers: no report where nothing is wrong, and planted faults that are reported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import sanitizing
from tests.cuda_emulator import build
from tests.cuda_emulator.sample_runs import SAMPLES

FLAGS = {"address": build.ADDRESS, "thread": build.THREAD}
pytestmark = [
    build.needs_compiler,
    pytest.mark.skipif(sanitizing.runtimes("address") is None, reason="the compiler comes without sanitizer libraries"),
    pytest.mark.skipif("EVK_EMULATOR_SANITIZER" in os.environ, reason="starts processes under a sanitizer itself"),
]
TESTS = ["test_emulator.py", "test_ptx_twins.py", "test_emulator_errors.py", "test_faults.py"]


def python(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*sanitizing._fixed_addresses(), sys.executable, *arguments],
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(sanitizing.runtimes(sanitizer) or []),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep memory until the end of the process
            "TSAN_OPTIONS": "halt_on_error=1",
            "OMP_NUM_THREADS": "1",  # ThreadSanitizer would misread how OpenMP's threads hand over
            "EVK_EMULATOR_SANITIZER": sanitizer,
        },
        cwd=build._build.ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def marked(sanitizer: str, *arguments: str) -> object:
    """ThreadSanitizer takes half a minute."""
    return pytest.param(sanitizer, *arguments, marks=[pytest.mark.nightly] if sanitizer == "thread" else [])


@pytest.mark.parametrize("sanitizer", [marked("address"), marked("thread")])
def test_nothing_is_reported(sanitizer: str) -> None:
    """The other tests of this folder, but for the faults that a sanitizer would rightly report."""
    chosen = [str(build.EMULATOR / name) for name in TESTS]
    result = python(
        sanitizer, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, "-k", "not fault_of and not races"
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]


# The sanitizer; kernel of samples/faults.cu, blocks, threads, shared bytes, a, b; what is reported for it.
FAULTS = {
    "no fault": ("address", ("normalise", 3, 128, 1040, 300, 0), "no error"),
    "unmasked tail": ("address", ("normalise", 3, 128, 1040, 300, 5), "heap-buffer-overflow"),
    "overrun of shared memory": ("address", ("normalise", 3, 128, 1040, 300, 6), "use-after-poison"),
    "underrun of shared memory": ("address", ("normalise", 3, 128, 1040, 300, 7), "use-after-poison"),
    "aligned vectors": ("address", ("vectors", 1, 8, 0, 0, 0), "no error"),
    "misaligned vectors": ("address", ("vectors", 1, 8, 0, 1, 0), "misaligned address"),
    "no race": ("thread", ("normalise", 3, 128, 1040, 300, 0), "no error"),
    "no barrier after the copy": ("thread", ("normalise", 3, 128, 1040, 300, 1), "data race"),
    "no barrier before reuse": ("thread", ("normalise", 3, 128, 1040, 300, 2), "data race"),
    "no barrier before the total": ("thread", ("normalise", 3, 128, 1040, 300, 3), "data race"),
    "no barrier of the warp": ("thread", ("multiply", 1, 32, 256, 0, 14), "data race"),
    "no race of neighbours": ("thread", ("neighbours", 1, 128, 512, -32, 1), "no error"),
    "race hidden in this order": ("thread", ("neighbours", 1, 128, 512, -32, 0), "data race"),
    "atomic sum of blocks": ("thread", ("accumulate", 8, 4, 0, 0, 1), "no error"),
    "race of blocks": ("thread", ("accumulate", 8, 4, 0, 0, 0), "data race"),
}


@pytest.mark.parametrize(("sanitizer", "name"), [marked(fault[0], name) for name, fault in FAULTS.items()])
def test_fault_is_reported(sanitizer: str, name: str) -> None:
    _, call, words = FAULTS[name]
    library = build.library([SAMPLES / "faults.cu"], "sample_faults", FLAGS[sanitizer], [SAMPLES])
    result = python(sanitizer, str(build.EMULATOR / "fault_call.py"), str(library), *map(str, call))
    assert words in result.stdout + result.stderr
    assert (result.returncode == 0) == (words == "no error"), result.stderr[-3000:]
