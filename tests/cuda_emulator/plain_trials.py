"""Trials of mutants of csrc/cuda: which source compiles a file's kernels without torch, and what checks them.

`python -m tests.cuda_emulator.plain_trials [FILE...]` tries all mutants of these files, or of all, and prints a line of
JSON for each: its label, and how it ended. The files are whatever csrc/cuda holds; one that no source here includes is
an error. `... plain_trials --check JSON` checks libraries that were built: [[path, source, levels], ...].
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.cuda_emulator import build, plain_aggregate, plain_lite_mla, plain_runs, plain_two_launches
from tests.cuda_emulator.mutants import SURVIVED, Mutant, Trial, mutants_of
from tests.cuda_emulator.plain_runs import PLAIN

# An index outside of a local array ends the process, whatever lies there.
BOUNDS = ("-O0", "-fsanitize=bounds-strict", "-fsanitize-undefined-trap-on-error")
# nvcc alone reads the instructions of ptx.cuh: their twins have tests of their own.
NOT_DEVICE_CODE = ("platform.cuh", "ptx.cuh")
FILES = [
    path
    for path in sorted(build.DEVICE_CODE.glob("*.cuh"))
    if path.name not in NOT_DEVICE_CODE and re.search(r"__(?:device|global)__", path.read_text())
]


@dataclass(frozen=True)
class Driver:
    """A source of plain_torch/, and levels of its tables for a file's kernels: all that differ in what they do."""

    source: str
    macros: tuple[str, ...]
    check: Callable[..., None]  # (path, *levels)
    expect_all: Callable[..., None]  # (*levels)
    levels: dict[str, tuple[int, ...]]  # by file; "" for others
    seconds: int = 60

    def includes(self, file: Path) -> bool:
        return file.resolve() in build._with_headers(PLAIN / self.source, [PLAIN, build.DEVICE_CODE, build.EMULATOR])

    def levels_for(self, file: Path) -> tuple[int, ...]:
        return self.levels.get(file.name, self.levels[""])

    def flags(self, levels: Sequence[int]) -> list[str]:
        return [f"-D{macro}={level}" for macro, level in zip(self.macros, levels, strict=True)]

    def trial(self, levels: Sequence[int], *, far: bool = True) -> Trial:
        self.expect_all(*levels)
        return Trial(
            [PLAIN / self.source],
            Path(self.source).stem,
            lambda path: self.check(path, *levels, far=far),
            flags=[*self.flags(levels), *BOUNDS],
            includes=[PLAIN],
            seconds=self.seconds,
        )


ATTENTION = Driver(
    "plain_attention.cu",
    ("EVK_TRIAL_HALF", "EVK_TRIAL_FP32"),
    plain_runs.check_attention,
    plain_runs.expect_all,
    {
        "": (2, 0),
        "relu_linear_attention_fp32_kernels.cuh": (0, 2),
        "sum_splits_kernels.cuh": (0, 2),
        "tile.cuh": (2, 1),
    },
)
AGGREGATE = Driver(
    "plain_aggregate.cu",
    ("EVK_TRIAL_AGGREGATE",),
    plain_aggregate.check_aggregate,
    plain_aggregate.expect_all,
    {"": (2,)},
)
AGGREGATE_ATTENTION = Driver(
    "plain_aggregate_attention.cu",
    ("EVK_TRIAL_AGGREGATE_ATTENTION",),
    plain_lite_mla.check_fused,
    plain_lite_mla.expect_fused,
    {"": (2,)},
)
PROJECTION = Driver(
    "plain_projection.cu", (), plain_lite_mla.check_projection, plain_lite_mla.expect_projection, {"": ()}
)
TWO_LAUNCHES = Driver(
    "plain_two_launches.cu",
    ("EVK_TRIAL_TWO_LAUNCHES",),
    plain_two_launches.check_two_launches,
    plain_two_launches.expect_two_launches,
    {"": (2,)},
)
DRIVERS = [ATTENTION, AGGREGATE, AGGREGATE_ATTENTION, PROJECTION, TWO_LAUNCHES]


def drivers_of(file: Path) -> list[Driver]:
    return [driver for driver in DRIVERS if driver.includes(file)]


def verdicts_of(file: Path, mutants: Sequence[Mutant] | None = None, at_once: int = 16) -> Iterator[tuple[Mutant, str]]:
    """How each mutant of a file ends, with the first driver that finds it."""
    remaining = list(mutants_of(file) if mutants is None else mutants)
    drivers = drivers_of(file)
    assert drivers, f"{file.name}: no source of {PLAIN.name}/ includes it"
    while remaining:
        group, remaining = remaining[:at_once], remaining[at_once:]
        found = dict.fromkeys(group, SURVIVED)
        for driver in drivers:
            left = [mutant for mutant, verdict in found.items() if verdict == SURVIVED]
            if left:
                found |= driver.trial(driver.levels_for(file)).verdicts(left)
        yield from found.items()


def check_libraries(libraries: list[tuple[str, str, list[int]]]) -> None:
    for path, source, levels in libraries:
        (driver,) = (driver for driver in DRIVERS if driver.source == source)
        driver.check(Path(path), *levels, far=False)  # sanitizers keep a shadow of all memory between
    print("clean")


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)  # processes are forked
    if names[:1] == ["--check"]:
        check_libraries(json.loads(names[1]))
        return
    for file in FILES:
        if not names or file.name in names:
            for mutant, verdict in verdicts_of(file):
                print(json.dumps([mutant.label, verdict.split("\n")[0][:200]]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
