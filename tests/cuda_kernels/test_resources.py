"""What the CUDA kernels need of a multiprocessor, and what nvcc made of them: the committed table is that of today's
sources, nothing is spilled, 16-bit tokens are loaded 16 bytes at a time and multiplied by the matrix units.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the table of the Triton kernels, whose parts are used here, needs Triton")
from benchmarks import cuda_resources as resources
from benchmarks import cuda_resources_report as report
from efficientvit_kernels import _build
from tests.processes import python

LIBRARY = _build.ROOT / "efficientvit_kernels" / _build.CUDA_LIBRARY
SOURCES = [*(_build.ROOT / "csrc" / "cuda").glob("*.*"), _build.ROOT / "efficientvit_kernels" / "_build.py"]
KERNELS = sorted(
    name
    for path in SOURCES
    for name in re.findall(r"^__global__ void\b[^;{]*?\b(\w+_kernel)\(", path.read_text(), re.MULTILINE)
)
ARCHS = [f"sm_{arch}" for arch in resources.ARCHS]


@pytest.fixture(scope="module")
def library() -> Path:
    """The development library, where it is what the sources say."""
    if (reason := resources.why_not()) is not None:
        pytest.skip(reason)
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} was not built: needs nvcc")
    newest = max(SOURCES, key=lambda path: path.stat().st_mtime)
    if newest.suffix in (".cu", ".cuh", ".h") and newest.stat().st_mtime > LIBRARY.stat().st_mtime:
        pytest.skip(f"{LIBRARY.name} is older than {newest.name}: `make build` makes it anew")
    return LIBRARY


def hold_to_the_budget(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["stack"] == row["spills"] == row["static_shared"] == 0, row
        assert row["fault"] is None, row
        assert 0 < row["registers"] <= 255, row
        assert row["occupancy"] is None or row["occupancy"] > 0, row


def test_the_table_is_whole_and_keeps_to_the_budget() -> None:
    """Every kernel of the sources, each variant on every architecture."""
    _, rows = report.read()
    hold_to_the_budget(rows)
    assert sorted({row["kernel"].partition("<")[0] for row in rows}) == KERNELS
    archs = {row["kernel"]: [other["arch"] for other in rows if other["kernel"] == row["kernel"]] for row in rows}
    assert all(found == ARCHS for found in archs.values()), archs


def test_the_table_is_that_of_the_library(library: Path) -> None:
    """What was built here, for two architectures, has the kernels of the table and needs what it says."""
    version, rows = report.read()
    found = [usage.with_plan() for usage in usages(library)]
    archs = {row["arch"] for row in found}
    assert archs
    hold_to_the_budget(found)
    known = [row for row in rows if row["arch"] in archs]
    assert [(row["kernel"], row["arch"]) for row in found] == [(row["kernel"], row["arch"]) for row in known]
    if resources.nvcc_version() != version:
        pytest.skip(f"the table's registers are those of nvcc {version}, this is {resources.nvcc_version()}")
    assert found == known


def test_the_summary_is_that_of_the_table() -> None:
    version, rows = report.read()
    assert report.summary(rows, version) == report.SUMMARY.read_text()


@pytest.mark.nightly
def test_the_table_can_be_made_anew(tmp_path: Path) -> None:
    """Compiles all six architectures, unless build/cuda_resources holds them: about four minutes of nvcc."""
    if _build.nvcc() is None or (resources.why_not() is not None):
        pytest.skip(resources.why_not() or "needs nvcc")
    version, rows = report.read()
    output, summary = tmp_path / "table.json", tmp_path / "summary.md"
    arguments = ("-m", "benchmarks.cuda_resources", "--output", str(output), "--summary", str(summary))
    done = python(*arguments, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    today, found = report.read(output)
    hold_to_the_budget(found)
    assert [(row["kernel"], row["arch"]) for row in found] == [(row["kernel"], row["arch"]) for row in rows]
    assert found == rows or today != version


# --- machine code -----------------------------------------------------------------------------------------------------


usages = functools.cache(resources.usages)
symbols = functools.cache(resources.symbols)


def instructions(library: Path, kernel: str, arch: str) -> Counter[str]:
    """How often each stands in a kernel, with its modifiers: "LDG.E.128", "HMMA.1688.F32.TF32"."""
    code = resources.sass(library, symbols(library)[kernel], arch)
    return Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code, re.MULTILINE))


def count(found: Counter[str], pattern: str) -> int:
    return sum(times for name, times in found.items() if re.fullmatch(pattern, name))


def archs_of(library: Path) -> list[str]:
    return sorted({usage.arch for usage in usages(library)})


@pytest.mark.parametrize("dtype", ["__half", "__nv_bfloat16"])
@pytest.mark.parametrize("kernel", ["kv_state_kernel", "apply_kernel"])
def test_tokens_are_loaded_wide_and_multiplied_by_matrix_units(library: Path, kernel: str, dtype: str) -> None:
    """A lane's 8 tokens of a channel are one load, and half as wide only where rows are not aligned to 16 bytes."""
    for arch in archs_of(library):
        found = instructions(library, f"{kernel}<{dtype}, 16, kTokens>", arch)
        assert count(found, r"LDG\.E\.128.*") >= 2, found
        assert found["HMMA.1688.F32.TF32"] >= 8, found
        assert count(found, r"LDG\.E\.[SU](8|16).*") == 0, found
        assert count(found, r"STG?\.E\.128.*") > 0 or kernel == "kv_state_kernel", found


@pytest.mark.parametrize(
    ("kernel", "products"),
    [
        ("aggregate_kernel<__half, 16, 5>", "HMMA.1688.F32.TF32"),
        ("aggregate_gradients_kernel<__nv_bfloat16, 16, 5>", "HMMA.1688.F32.TF32"),
        ("aggregate_kv_state_kernel<__half, 16, 5>", "HMMA.1688.F32.TF32"),
        ("aggregate_apply_kernel<__nv_bfloat16, 32, 5>", "HMMA.1688.F32.TF32"),
        ("projection_kernel<__half, 64>", "HMMA.16816.F32"),
    ],
)
def test_tiles_come_asynchronously_and_leave_in_vectors(library: Path, kernel: str, products: str) -> None:
    """16 bytes at a time, from global to shared memory and back; the state kernel alone writes no tokens."""
    for arch in archs_of(library):
        found = instructions(library, kernel, arch)
        assert found[products] >= 8, found
        assert count(found, r"LDGSTS\.E\.BYPASS\.128.*") > 0, found
        assert count(found, r"STG\.E\.128.*") > 0 or "kv_state" in kernel, found


def test_float32_is_multiplied_in_float32(library: Path) -> None:
    """IEEE products: a matrix unit would round the operands."""
    names = [name for name in symbols(library) if re.search(r"_fp32_kernel<16>|kernel<float, 16, 5>", name)]
    assert len(names) >= 6
    for name in names:
        found = instructions(library, name, archs_of(library)[0])
        assert count(found, "HMMA.*") == 0, name
        assert count(found, "FFMA.*") > 0, name


# --- the reader itself ------------------------------------------------------------------------------------------------

SPILLING = """\
__global__ void spilling_kernel(const float* in, float* out, int n) {
  float x[64];
  for (int i = 0; i < 64; ++i) x[i] = in[i * n + threadIdx.x];
  for (int step = 0; step < n; ++step)
    for (int i = 0; i < 64; ++i) x[i] = x[i] * x[(i * 7 + 1) % 64] + in[step];
  for (int i = 0; i < 64; ++i) out[i * n + threadIdx.x] = x[i];
}
template <int D> __global__ void plain_kernel(float* out) { __shared__ float s[D]; s[D - 1 - threadIdx.x] = threadIdx.x;
  __syncthreads(); out[threadIdx.x] = s[threadIdx.x]; }
namespace { enum class Colour { kRed, kBlue }; template <class T, Colour kColour> __global__ void named_kernel(T*) {} }
void run() { plain_kernel<32><<<1, 32>>>(nullptr); named_kernel<int, Colour::kBlue><<<1, 1>>>(nullptr); }
"""


def test_what_breaks_the_budget_is_reported(tmp_path: Path) -> None:
    """A kernel with too few registers spills, and static shared memory is told from the system's kilobyte."""
    if (nvcc := _build.nvcc()) is None or resources.why_not() is not None:
        pytest.skip(resources.why_not() or "needs nvcc")
    (tmp_path / "kernels.cu").write_text(SPILLING)
    product = tmp_path / "kernels.o"
    command = [nvcc, "-std=c++20", "-arch=sm_90", "-maxrregcount=32", "-c", str(tmp_path / "kernels.cu")]
    subprocess.run([*command, "-o", str(product)], check=True, capture_output=True)
    rows = {usage.kernel: usage.with_plan() for usage in resources.usages(product)}
    assert sorted(rows) == ["named_kernel<int, Colour(1)>", "plain_kernel<32>", "spilling_kernel"]
    assert rows["plain_kernel<32>"]["static_shared"] == 128
    spilling = rows["spilling_kernel"]
    assert spilling["stack"] > 100
    assert spilling["spills"] > 100
    assert re.fullmatch(r"stack \d+ and spills \d+ bytes must be 0", str(spilling["fault"]))
    with pytest.raises(AssertionError):
        hold_to_the_budget([spilling])
    with pytest.raises(AssertionError, match="has no such_kernel"):
        resources.sass(product, "such_kernel", "sm_90")


def test_without_tools_the_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "tools", lambda: None)
    assert resources.why_not() == "needs cuobjdump and nvdisasm, of the CUDA toolkit or of Triton"
    monkeypatch.setattr(resources, "tools", lambda: Path("/"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert resources.why_not() == "needs c++filt"
