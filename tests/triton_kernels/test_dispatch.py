"""Which calls reach the Triton kernels, and how a call that cannot says why."""

from __future__ import annotations

import pytest
import torch

from efficientvit_kernels import relu_linear_attention
from efficientvit_kernels.testing import make_qkv, native_calls, triton_launches
from tests.processes import python

QKV = make_qkv(1, 1, 8, 3, 4)[0]


def said(code: str, **environment: str) -> str:
    """What `code` prints in a process of its own."""
    done = python("-W", "error::RuntimeWarning", "-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_auto_never_takes_the_interpreter() -> None:
    launches, calls = triton_launches(), native_calls()
    relu_linear_attention(QKV, 8)
    assert triton_launches() == launches
    assert native_calls() == calls + 1


def test_a_named_backend_runs_the_kernels() -> None:
    launches, calls = triton_launches(), native_calls()
    relu_linear_attention(QKV, 8, backend="triton")
    assert triton_launches() - launches == 2  # the state, then its application
    assert native_calls() == calls


@pytest.mark.parametrize(
    ("qkv", "head_dim", "reason"),
    [
        (QKV.double(), 8, "it has no float64 kernels"),
        (torch.zeros(1, 3 * 257, 1, 1), 257, "it serves head_dim up to 256, got 257"),
    ],
)
def test_what_the_kernels_do_not_serve_is_refused(qkv: torch.Tensor, head_dim: int, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=f"got 'triton': {reason}"):
        relu_linear_attention(qkv, head_dim, backend="triton")


CALL = """
import efficientvit_kernels as evk
try:
    evk.relu_linear_attention(torch.zeros(1, 24, 2, 2), 8, backend="triton")
except NotImplementedError as error:
    print(error)
"""


def test_cpu_tensors_without_the_interpreter() -> None:
    assert said("import torch" + CALL).endswith("got 'triton': it needs CUDA tensors, these are on cpu")


def test_without_triton() -> None:
    hide = "import torch, importlib.util as u; u.find_spec = lambda name, *rest: None"
    assert said(hide + CALL).endswith("got 'triton': triton is not installed")


def test_a_triton_that_does_not_import() -> None:
    broken = "import sys; sys.modules['triton'] = None"
    assert "triton does not import (ModuleNotFoundError" in said(FOUND + broken + CALL, TRITON_INTERPRET="1")


def test_an_old_triton() -> None:
    old = (
        "import torch, types, sys; old = sys.modules['triton'] = types.ModuleType('triton'); old.__version__ = '3.5.1'"
    )
    assert said(FOUND + old + CALL, TRITON_INTERPRET="1").endswith("it needs triton 3.6 or newer, this is 3.5.1")


FOUND = "import torch, importlib.util as u; u.find_spec = lambda *arguments: True\n"
