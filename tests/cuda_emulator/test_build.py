"""Compiling for the emulator: the cache, errors, torch's stable ABI; and that nvcc compiles the same samples."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.cuda_emulator import build
from tests.cuda_emulator.sample_runs import SAMPLES

pytestmark = build.needs_compiler
SOURCE = (
    '#include "constant.h"\nextern "C" __attribute__((visibility("default"))) int constant() { return kConstant; }\n'
)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """A source that was never compiled before; its libraries are called `tmp_path.name`."""
    (tmp_path / "constant.h").write_text("constexpr int kConstant = 1;\n")
    (tmp_path / "source.cu").write_text(f"{SOURCE}// {time.time_ns()}\n")
    yield tmp_path / "source.cu"
    for product in build.BUILD.glob(f"{tmp_path.name}-*.so"):
        product.unlink()


def constant(path: Path) -> int:
    return int(ctypes.CDLL(str(path)).constant())


def test_a_library_is_made_once_per_content(source: Path) -> None:
    name = source.parent.name
    first = build.library([source], name)
    made = first.stat().st_mtime_ns
    assert build.library([source], name) == first
    assert first.stat().st_mtime_ns == made
    assert build.library([source], name, flags=["-DOTHER"]) != first
    source.with_name("constant.h").write_text("constexpr int kConstant = 2;\n")
    second = build.library([source], name)
    # Both in one process: neither takes the other's functions.
    assert (constant(first), constant(second), constant(first)) == (1, 2, 1)


def test_two_at_once(source: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: build.library([source], source.parent.name), range(2))
    assert first == second
    assert constant(first) == 1


def test_the_compiler_has_the_word(source: Path) -> None:
    source.write_text("int f() { return undeclared_name; }\n")
    with pytest.raises(RuntimeError, match=r"(?s)^cuda emulator: compiling source-\w+.o failed.*undeclared_name"):
        build.library([source], "wrong")


def test_missing_headers(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cuda_include", lambda: None)
    with pytest.raises(RuntimeError, match=r"^cuda emulator: CUDA's headers not found: set CUDA_HOME"):
        build.library([source], "one")


def test_an_op_on_the_stable_abi() -> None:
    torch.ops.load_library(build.library([SAMPLES / "op.cu"], "sample_op", torch=True))
    x = torch.randn(300)
    assert torch.equal(torch.ops.efficientvit_kernels_emulator_sample.doubled(x), 2 * x)
    with pytest.raises(RuntimeError, match=r"cuda emulator: launch failed: invalid configuration argument"):
        torch.ops.efficientvit_kernels_emulator_sample.doubled(x[:0])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("sample", ["errors", "faults", "gram", "intrinsics", "ptx"])
def test_nvcc_compiles_the_samples(tmp_path: Path, sample: str, arch: str) -> None:
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("needs nvcc")
    command = [nvcc, "-std=c++20", f"-arch={arch}", "-cubin", f"-I{build.DEVICE_CODE}", f"-I{SAMPLES}"]
    command += [str(SAMPLES / f"{sample}.cu"), "-o", str(tmp_path / "sample.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    source = SAMPLES / ("gram.cuh" if sample == "gram" else f"{sample}.cu")
    kernels = re.findall(r"EVK_SAMPLE\((\w+)\)", source.read_text())
    symbols = (tmp_path / "sample.cubin").read_bytes()
    assert kernels
    assert all(kernel.encode() in symbols for kernel in kernels)
