"""The package as a whole: import, missing or broken native libraries, environment switches, processes and threads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import efficientvit_kernels
from efficientvit_kernels import FusedLiteMLA, _library, relu_linear_attention
from efficientvit_kernels._build import CPU_LIBRARY
from efficientvit_kernels.testing import make_qkv
from tests.ops.common import run
from tests.processes import python

PACKAGE = Path(efficientvit_kernels.__file__).parent


def succeed(code: str, **kwargs: object) -> str:
    result = python("-c", code, **kwargs)  # type: ignore[arg-type]
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_native_library_is_here() -> None:
    """Everything else in this suite would quietly test the reference."""
    assert _library.WHY_NOT_CPU is None
    assert _library.cpu_isa() in ("baseline", "avx2", "avx512")


def test_import_leaves_cuda_triton_and_timm_alone() -> None:
    """What makes an import slow is what it pulls in; its time is measured by benchmarks/import_time.py."""
    code = """
import sys, torch
before = set(sys.modules)
import efficientvit_kernels
light = set(sys.modules) - before
from efficientvit_kernels import relu_linear_attention, FusedLiteMLA, accelerate
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(torch.cuda.is_initialized(), *sorted(light), "|", *sorted(new - set(sys.stdlib_module_names)))
"""
    light, _, new = succeed(code).partition("|")
    assert light.split() == ["False", "efficientvit_kernels", "efficientvit_kernels._lazy"]
    assert set(new.split()) <= {"efficientvit_kernels", "torch"}


def test_public_names() -> None:
    for name in efficientvit_kernels.__all__:
        value = getattr(efficientvit_kernels, name)
        assert value.__doc__, name
    assert set(efficientvit_kernels.__all__) <= set(dir(efficientvit_kernels))
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = efficientvit_kernels.no_such_name


DEGRADED = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, efficientvit_kernels as evk
    out = evk.relu_linear_attention(torch.randn(1, 48, 4, 4, requires_grad=True), 16)
    out.sum().backward()
    evk.FusedLiteMLA(32, 32)(torch.randn(1, 32, 4, 4)).sum().backward()
ours = [str(w.message) for w in caught if "efficientvit_kernels" in str(w.message)]
assert len(ours) == 1, ours
try:
    evk.relu_linear_attention(torch.randn(1, 48, 4, 4), 16, backend="cpu")
except NotImplementedError as error:
    print(error)
print(evk.info())
"""


@pytest.mark.parametrize("fault", ["absent", "empty", "truncated", "garbage", "undefined symbol"])
def test_without_a_working_native_library(fault: str, tmp_path: Path) -> None:
    """F4, F5: the package imports and works on plain torch, with one warning, and says how to build."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    library = tmp_path / PACKAGE.name / CPU_LIBRARY
    content = (PACKAGE / CPU_LIBRARY).read_bytes()
    if fault == "undefined symbol":
        source = tmp_path / "broken.cpp"
        source.write_text("extern void no_such_symbol(); struct S { S() { no_such_symbol(); } } s;")
        subprocess.run([os.environ.get("CXX", "g++"), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    elif fault != "absent":
        library.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "garbage": b"\0" * 4096}[fault])
    out = succeed(DEGRADED, path=tmp_path)
    assert "relu_linear_attention: backend must be one that can run here, got 'cpu'" in out
    assert "pip install" in out
    assert "relu_linear_attention on cpu: reference" in out


def test_environment_switch() -> None:
    code = """
import torch, efficientvit_kernels as evk
from efficientvit_kernels.testing import native_calls
evk.relu_linear_attention(torch.randn(1, 48, 4, 4), 16)
auto = native_calls()
evk.relu_linear_attention(torch.randn(1, 48, 4, 4), 16, backend="cpu")
print(auto, native_calls() - auto)
"""
    assert succeed(code).split() == ["1", "1"]
    assert succeed(code, EFFICIENTVIT_KERNELS_BACKEND="auto").split() == ["1", "1"]
    assert succeed(code, EFFICIENTVIT_KERNELS_BACKEND="reference").split() == ["0", "1"]  # names are not overridden
    result = python("-c", code, EFFICIENTVIT_KERNELS_BACKEND="fast")
    assert result.returncode == 1
    assert "EFFICIENTVIT_KERNELS_BACKEND must be one of auto, reference, cpu, triton, cuda, got 'fast'" in result.stderr
    result = python("-c", code, EFFICIENTVIT_KERNELS_BACKEND="triton")
    assert "backend must be one that can run here, got 'triton'" in result.stderr


def test_info_is_complete_and_serialisable() -> None:
    found = efficientvit_kernels.info()
    content = json.loads(json.dumps(found.as_dict()))
    assert content["ops"]["relu_linear_attention"]["cpu"] == "cpu"
    assert content["missing"].keys() == {"triton", "cuda"}
    assert content["versions"]["torch"] == torch.__version__
    assert "backend triton cannot run" in str(found)


def test_child_processes_after_fork() -> None:
    """F26: fork after the first native call; the child computes the same bits and ends."""
    code = """
import os, sys, torch
from efficientvit_kernels import relu_linear_attention
qkv = torch.randn(2, 96, 40, 40, generator=torch.Generator().manual_seed(0))
expected = relu_linear_attention(qkv, 16)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # torch's own thread pool does not survive a fork
    os._exit(0 if torch.equal(relu_linear_attention(qkv, 16), expected) else 1)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    succeed(code)


def test_eight_threads_on_one_module() -> None:
    """F27"""
    module = FusedLiteMLA(64, 64, dim=16).eval()
    x = torch.randn(2, 64, 17, 13)
    qkv = make_qkv(2, 2, 16, 17, 13)
    expected, (out, grads) = module(x), run(qkv, 16, 1e-15, "cpu")

    def work(_: int) -> bool:
        again, again_grads = run(qkv, 16, 1e-15, "cpu")
        with torch.no_grad():
            same = torch.allclose(module(x), expected, rtol=1e-6, atol=1e-6)
        return same and torch.equal(again, out) and torch.equal(again_grads[0], grads[0])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))


def test_out_of_memory_leaves_everything_usable() -> None:
    """F24: an allocation that cannot succeed raises, and the next call is right."""
    qkv = make_qkv(1, 2, 16, 5, 5)[0]
    expected = relu_linear_attention(qkv, 16)
    huge = torch.zeros(1, 1, 1, 1).expand(2**20, 3 * 2**10, 2**10, 2**10)
    with pytest.raises(RuntimeError, match=r"allocate|memory|overflow"):
        relu_linear_attention(huge, 2**10, backend="cpu")
    assert torch.equal(relu_linear_attention(qkv, 16), expected)
