"""One binary for every torch: the CPU library of this build, loaded into another version. Run by `make abi`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from efficientvit_kernels import _build, relu_linear_attention
from efficientvit_kernels.testing import make_qkv

OTHER = os.environ.get("EVK_ABI_PYTHON")

CODE = """
import json, sys, warnings
warnings.simplefilter("error", RuntimeWarning)
import torch
from efficientvit_kernels import relu_linear_attention, _library
from efficientvit_kernels.testing import make_qkv, native_calls
results = {}
for name in ("float32", "float64", "float16", "bfloat16"):
    qkv = [t.requires_grad_() for t in make_qkv(2, 3, 16, 9, 7, scales=2, dtype=getattr(torch, name))]
    out = relu_linear_attention(qkv, 16, backend="cpu")
    grads = torch.autograd.grad(out.double().sum(), qkv)
    results[name] = [float(t.double().abs().sum()) for t in (out, *grads)]
assert native_calls() == 8
ops = torch.ops.efficientvit_kernels
torch.library.opcheck(ops.relu_linear_attention_fwd.default, ([t.detach() for t in qkv], 16, 1e-15))
json.dump({"torch": torch.__version__, "results": results}, sys.stdout)
"""


@pytest.mark.nightly
@pytest.mark.skipif(OTHER is None, reason="EVK_ABI_PYTHON does not name an interpreter with another torch")
def test_the_same_binary_in_another_torch(tmp_path: Path) -> None:
    package = tmp_path / "efficientvit_kernels"
    shutil.copytree(_build.ROOT / "efficientvit_kernels", package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [str(OTHER), "-c", CODE],
        env={**environment, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    other = json.loads(result.stdout)
    assert other["torch"] != torch.__version__
    for name, sums in other["results"].items():
        qkv = [t.requires_grad_() for t in make_qkv(2, 3, 16, 9, 7, scales=2, dtype=getattr(torch, name))]
        out = relu_linear_attention(qkv, 16, backend="cpu")
        grads = torch.autograd.grad(out.double().sum(), qkv)
        assert sums == pytest.approx([float(t.detach().double().abs().sum()) for t in (out, *grads)], rel=1e-12)
