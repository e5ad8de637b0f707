"""What the Triton kernels need of a multiprocessor: nothing is spilled, shared memory is there.

Kernels are compiled for architectures that need not be there. This process may interpret kernels; those of the
subprocesses are compiled.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from efficientvit_kernels._build import ROOT
from efficientvit_kernels.triton_kernels import launch
from tests.processes import python

pytest.importorskip("triton.backends.nvidia", reason="this Triton has no NVIDIA compiler")

TABLE = ROOT / "benchmarks" / "results" / "triton_resources.json"
SUMMARY = ROOT / "docs" / "triton-resources.md"
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
FOLDER = ROOT / "efficientvit_kernels" / "triton_kernels"
KERNELS = sorted(
    name for file in FOLDER.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
)


def rows_of(path: Path) -> tuple[str, list[dict[str, Any]]]:
    content = json.loads(path.read_text())
    return content["triton"], [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]


def compiling(*arguments: str, cache: Path, seconds: int = 600) -> str:
    """What a process says that compiles kernels, afresh."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    done = python(*arguments, timeout=seconds, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hold_to_the_budget(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["stack"] == row["spills"] == 0, row
        assert row["fault"] is None, row
        assert 0 < row["registers"] <= (512 if row["arch"] == "gfx942" else 255), row
        assert row["occupancy"] > 0, row


def test_every_kernel_keeps_to_the_budget(tmp_path: Path) -> None:
    output = tmp_path / "resources.json"
    arguments = ("--arch", "sm_80,sm_90", "--quick", "--processes", "1", "--output", str(output))
    compiling("-m", "efficientvit_kernels.triton_kernels.resources", *arguments, cache=tmp_path)
    _, rows = rows_of(output)
    hold_to_the_budget(rows)
    for arch in ("sm_80", "sm_90"):
        assert sorted({row["kernel"] for row in rows if row["arch"] == arch}) == KERNELS


def test_the_table_is_whole_and_keeps_to_the_budget() -> None:
    _, rows = rows_of(TABLE)
    hold_to_the_budget(rows)
    for arch in ARCHS:
        assert sorted({row["kernel"] for row in rows if row["arch"] == arch}) == KERNELS
    for kind in ("float16", "bfloat16", "tf32", "float32"):
        assert {row["arch"] for row in rows if row["kind"] == kind} == set(ARCHS)


VARIANTS = """
import json, sys
from efficientvit_kernels.triton_kernels import resource_report, resources

for arch in sys.argv[1].split(","):
    for job in resources.jobs_of(resources.cases_for(arch, resources.all_cases()), arch):
        print(json.dumps(resource_report.variant(job)))
"""


def test_the_table_holds_what_would_be_launched_today(tmp_path: Path) -> None:
    """Every variant of every configuration: one that was changed since the table was made fails here."""
    lines = compiling("-c", VARIANTS, ",".join(ARCHS), cache=tmp_path).splitlines()
    _, rows = rows_of(TABLE)
    names = list(rows[0])[: len(json.loads(lines[0]))]
    assert lines == [json.dumps([row[name] for name in names]) for row in rows]


def test_the_summary_is_that_of_the_table(tmp_path: Path) -> None:
    code = "import sys, pathlib; from efficientvit_kernels.triton_kernels import resource_report as report; "
    code += "version, rows = report.read(pathlib.Path(sys.argv[1])); print(report.summary(rows, version), end='')"
    assert compiling("-c", code, str(TABLE), cache=tmp_path) == SUMMARY.read_text()


@pytest.mark.nightly
def test_the_table_can_be_made_anew(tmp_path: Path) -> None:
    """About an hour on one core. Another Triton makes other code, which must keep to the budget, too."""
    version, rows = rows_of(TABLE)
    output = tmp_path / "resources.json"
    arguments = ("--output", str(output), "--summary", str(tmp_path / "summary.md"))
    compiling("-m", "efficientvit_kernels.triton_kernels.resources", *arguments, cache=tmp_path, seconds=3 * 3600)
    today, found = rows_of(output)
    hold_to_the_budget(found)
    assert (today, found) == (version, rows) or today != version


MUTANT = """
from efficientvit_kernels.triton_kernels import relu_linear_attention, resources
from efficientvit_kernels.triton_kernels.configs import AttentionConfig

for dim, config in ((32, AttentionConfig(256, 32, 1, 1)), (128, AttentionConfig(64, 128, 8, 5))):
    case = resources.Case("relu_linear_attention", "float16", dim, "nchw", 64, 64)
    relu_linear_attention.attention_config = lambda *_: config
    print(resources.compile_launch(resources.launches_of(case, "sm_86")[0], "sm_86").fault)
"""


def test_what_breaks_the_budget_is_reported(tmp_path: Path) -> None:
    """One warp for 256 tokens: 512 values for each thread. Five stages of 32 KB on 99 KB of shared memory."""
    spilled, too_large = compiling("-c", MUTANT, cache=tmp_path).splitlines()
    found = re.fullmatch(r"stack (\d+) and spills (\d+) bytes must be 0", spilled)
    assert found
    assert int(found[1]) > 100
    assert int(found[2]) > 100
    assert re.fullmatch(r"shared memory must be at most 101376 bytes, got \d+", too_large)


PARTS = """
from efficientvit_kernels.triton_kernels.resources import Resources, stored_locally

def blocks(arch, registers, shared, warps):
    found = Resources("", arch, "", registers, 0, 0, shared, warps)
    return found.blocks, round(found.occupancy, 3)

print(blocks("sm_90", 128, 0, 4), blocks("sm_90", 129, 0, 4), blocks("sm_90", 32, 100 * 1024, 4))
print(blocks("sm_86", 16, 0, 1), blocks("sm_89", 40, 0, 8), blocks("gfx942", 128, 20 * 1024, 4))
print(stored_locally("STL.64 [R1], R2 ;\\n @P0 STL [R1+0x8], R4 ;\\n LDL R3, [R1] ;\\n STL.128 [R1+0x10], R8 ;"))
"""


def test_blocks_of_a_multiprocessor_and_spilled_bytes(tmp_path: Path) -> None:
    """By hand: 65536 / (128 * 128) = 4; 136 registers after rounding: 3; 228 KB / 101 KB = 2. sm_86 has 16 blocks,
    sm_89 48 warps. gfx942: 4 * (512 / 128) = 16 waves, 4 a block, and 64 KB / 20 KB = 3.
    """
    lines = compiling("-c", PARTS, cache=tmp_path).splitlines()
    assert lines == ["(4, 0.25) (3, 0.188) (2, 0.125)", "(16, 0.333) (6, 1.0) (3, 0.375)", "28"]


def test_the_interpreter_compiles_nothing() -> None:
    call = "from efficientvit_kernels.triton_kernels import resources; resources.compile_launch(None, 'sm_90')"
    done = python("-c", call, TRITON_INTERPRET="1")
    assert "RuntimeError: resources: TRITON_INTERPRET must be unset, got 1" in done.stderr
    done = python("-c", call.replace("sm_90", "sm_10"), TRITON_INTERPRET="0")
    assert "ValueError: resources: arch must be one of sm_80" in done.stderr


def test_recorded_launches_do_not_run() -> None:
    before = launch.launches()
    with launch.recording("sm_90") as recorded:
        launch.launch(None, 3, num_warps=4, num_stages=1)
        launch.launch(None, 0, num_warps=4, num_stages=1)
    assert [entry.grid for entry in recorded] == [3]
    assert launch.launches() == before
