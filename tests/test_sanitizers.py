"""The CPU kernels under the address and undefined-behaviour sanitizers: a read past a tail is a report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from efficientvit_kernels import _build, _library

CODE = """
import torch
import efficientvit_kernels
from efficientvit_kernels import _library
from tests.ops.common import SAMPLES, run
assert efficientvit_kernels.__file__.startswith(WHERE), efficientvit_kernels.__file__
for sample in SAMPLES:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        out, grads = run(sample.make(dtype), sample.head_dim, sample.eps, "cpu")
        assert torch.isfinite(out).all() or sample.eps == 0
print("clean", _library.cpu_isa())
"""


@pytest.mark.nightly
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_address_and_undefined_behaviour(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = ["baseline", "avx2", "avx512"]
    if order.index(isa) > order.index(str(_library.cpu_isa())):
        pytest.skip(f"this CPU has no {isa}")
    compiler = _build.compiler() or "g++"
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(os.path.isabs(path) for path in found):
        pytest.skip("the compiler comes without sanitizer libraries")
    package = tmp_path / "efficientvit_kernels"
    source = _build.ROOT / "efficientvit_kernels"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"
    monkeypatch.setenv("EFFICIENTVIT_KERNELS_CXXFLAGS", flags)
    _build.build(tmp_path / "build", package)
    result = subprocess.run(
        [sys.executable, "-c", CODE.replace("WHERE", repr(str(tmp_path)))],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(_build.ROOT)]),
            "LD_PRELOAD": " ".join(found),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep memory until the end of the process
            "EFFICIENTVIT_KERNELS_CPU_ISA": isa,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stdout.split() == ["clean", isa]
