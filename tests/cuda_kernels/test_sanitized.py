"""The CUDA kernels and their launchers, in the emulator, under sanitizers: no access beyond a tensor or a block's own
shared memory, no undefined behaviour, no race between threads; and planted faults, which must be reported.

Without torch (tests/cuda_emulator/plain_torch), whose memory ends where a tensor does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests import sanitizing
from tests.cuda_emulator import build
from tests.cuda_emulator.mutants import Mutant, mutants_of, mutated_library
from tests.cuda_emulator.plain_runs import PLAIN
from tests.cuda_emulator.plain_trials import AGGREGATE, ATTENTION, DRIVERS, Driver
from tests.cuda_emulator.test_sanitized import FLAGS, python

pytestmark = [
    build.needs_compiler,
    pytest.mark.skipif(sanitizing.runtimes("address") is None, reason="the compiler comes without sanitizer libraries"),
    pytest.mark.skipif("EVK_EMULATOR_SANITIZER" in os.environ, reason="starts processes under a sanitizer itself"),
]
# Levels of the drivers' tables.
LEAST = {
    "plain_attention.cu": (1, 1),
    "plain_aggregate.cu": (1,),
    "plain_aggregate_attention.cu": (1,),
    "plain_projection.cu": (),
    "plain_two_launches.cu": (1,),
}
ALL = {source: tuple(2 for _ in levels) for source, levels in LEAST.items()}
drivers = pytest.mark.parametrize("driver", DRIVERS, ids=lambda driver: driver.source)


Levels = tuple[int, ...]


def checked(sanitizer: str, *libraries: tuple[Path, Driver, Levels]) -> subprocess.CompletedProcess[str]:
    chosen = json.dumps([(str(path), driver.source, levels) for path, driver, levels in libraries])
    return python(sanitizer, "-m", "tests.cuda_emulator.plain_trials", "--check", chosen)


def flags(sanitizer: str, driver: Driver, levels: Levels) -> list[str]:
    return [*driver.flags(levels), *FLAGS[sanitizer]]


def assert_clean(sanitizer: str, levels: dict[str, Levels], *drivers: Driver) -> None:
    libraries = []
    for driver in drivers:
        own = levels[driver.source]
        name, wanted = Path(driver.source).stem, flags(sanitizer, driver, own)
        libraries.append((build.library([PLAIN / driver.source], name, wanted, [PLAIN]), driver, own))
    result = checked(sanitizer, *libraries)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-6000:]
    assert result.stdout.split() == ["clean"]


def test_memory_and_behaviour_quickly() -> None:
    assert_clean("address", LEAST, *DRIVERS)


@pytest.mark.nightly
@drivers
def test_memory_and_behaviour(driver: Driver) -> None:
    assert_clean("address", ALL, driver)


@pytest.mark.nightly
@drivers
def test_no_races(driver: Driver) -> None:
    assert_clean("thread", LEAST, driver)


# The sanitizer; whose tables; the file, kind and line of the first such mutant; what is reported for it.
FAULTS = {
    "a store without its mask": (
        "address",
        ATTENTION,
        ("tile.cuh", "condition dropped", "if (n < stop) store_packed<kCount / 2>"),
        "AddressSanitizer: (use-after-poison|SEGV)",
    ),
    "an index beyond a fragment": (
        "address",
        ATTENTION,
        ("operands.cuh", "bound off by one", "for (int part = 0; part < kParts; ++part)"),
        "runtime error: index [0-9] out of bounds",
    ),
    "no barrier before the states are added up": (
        "thread",
        ATTENTION,
        ("relu_linear_attention_kernels.cuh", "barrier removed", "__syncthreads();"),
        "ThreadSanitizer: data race",
    ),
    "no barrier after the halo": (
        "thread",
        AGGREGATE,
        ("multiscale_aggregate_kernels.cuh", "barrier removed", "__syncthreads();"),
        "ThreadSanitizer: data race",
    ),
}


def fault_of(name: str) -> Mutant:
    file, kind, line = FAULTS[name][2]
    found = [mutant for mutant in mutants_of(build.DEVICE_CODE / file) if f": {kind}: {line}" in mutant.label]
    assert found, f"{name}: {file} has no such line any more"
    return found[0]


def test_faults_find_their_places() -> None:
    """On every push, so that a change of the sources is not found out by the nightly run."""
    assert len({fault_of(name) for name in FAULTS}) == len(FAULTS)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_reported(name: str, tmp_path: Path) -> None:
    sanitizer, driver, _, words = FAULTS[name]
    levels = LEAST[driver.source]
    wanted = flags(sanitizer, driver, levels)
    path = mutated_library(fault_of(name), [PLAIN / driver.source], "fault", tmp_path, flags=wanted, includes=[PLAIN])
    result = checked(sanitizer, (path, driver, levels))
    assert result.returncode != 0
    assert re.search(words, result.stderr), result.stderr[-6000:]
