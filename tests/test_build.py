"""The native build: every instruction set gives right results, none leaks into another, and no fast-math."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from efficientvit_kernels import _build, _library
from tests.processes import python

ROOT = _build.ROOT
ISAS = ["baseline", "avx2", "avx512"]
ON_X86 = platform.machine() in ("x86_64", "AMD64")

CHECK_ISA = """
import torch
from efficientvit_kernels import _library
from tests.ops.common import SAMPLES, judge
print(_library.cpu_isa())
failed = []
for sample in SAMPLES[::2]:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        verdicts = judge(sample.make(dtype), sample.head_dim, sample.eps, "cpu")
        # Without fused multiply-add, one float32 sample in twenty is unlucky (ratio up to 3); the medians are equal.
        slack = 1e-5 if (_library.cpu_isa(), dtype) == ("baseline", torch.float32) else 0
        for name, v in verdicts.items():
            if not (v.ok or v.error <= slack * v.largest):
                failed.append(f"{sample} {dtype} {name}: {v}")
assert not failed, failed
"""


def run_with(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    return python("-c", code, EFFICIENTVIT_KERNELS_CPU_ISA=isa)


@pytest.mark.skipif(not ON_X86, reason="other processors have one instruction set here")
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    """F30: forced by the environment; rule T for half of the samples."""
    if ISAS.index(isa) > ISAS.index(str(_library.cpu_isa())):
        pytest.skip(f"this CPU has no {isa}")
    result = run_with(isa, CHECK_ISA)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [isa]


def test_unknown_instruction_set_is_told() -> None:
    result = run_with("sse9", "from efficientvit_kernels import _library; print(_library.cpu_isa())")
    assert result.returncode == 1
    assert "EFFICIENTVIT_KERNELS_CPU_ISA must be baseline, avx2 or avx512" in result.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_instruction_sets_share_no_weak_symbol() -> None:
    """The linker merges equal inline functions of two objects: an old CPU would meet AVX-512 code.

    Only what lies in the namespace of the object's own instruction set has a name of its own.
    """
    objects = sorted((ROOT / "build" / "native" / _build.CPU_LIBRARY).glob("kernels_*.o"))
    if not objects:
        pytest.skip("the objects of the build are not here (installed from a wheel)")
    weak: dict[str, set[str]] = {}
    for path in objects:
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        for line in symbols.splitlines():
            fields = line.split(maxsplit=2)
            own = f"efficientvit_kernels::cpu::{path.stem.removeprefix('kernels_')}::"
            if len(fields) == 3 and fields[1] in "WVu" and not fields[2].startswith(own):
                weak.setdefault(fields[2], set()).add(path.stem)
    assert len(objects) == 3
    assert not weak, weak


def test_flags(tmp_path: Path) -> None:
    text = _build.write_ninja(tmp_path, tmp_path).read_text()
    assert "fast-math" not in text
    assert "Ofast" not in text
    assert "-march=native" not in text
    assert text.count("-mavx512f") == (1 if ON_X86 else 0)


def test_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """F6"""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"^no C\+\+ compiler found: set CXX, or install g\+\+$"):
        _build.build(tmp_path, tmp_path)


def test_the_introspection_module() -> None:
    native = pytest.importorskip("efficientvit_kernels._C", reason="optional at run time")
    assert native.cpu_isa() == _library.cpu_isa()
    assert native.build_info()
    assert native.relu_linear_attention_plan.__doc__


def test_operators_are_registered_once() -> None:
    schema = str(torch.ops.efficientvit_kernels.relu_linear_attention_fwd.default._schema)
    assert schema == (
        "efficientvit_kernels::relu_linear_attention_fwd(Tensor[] qkv, int head_dim, float eps) -> (Tensor, Tensor)"
    )
