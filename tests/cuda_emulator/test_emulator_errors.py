"""The emulator's errors: their words, that they reach the caller of a launch, that the next launch is in order."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from tests.cuda_emulator import build
from tests.cuda_emulator.sample_runs import Sample

pytestmark = build.needs_compiler

# kernel, its arguments a and b, threads, words; shared memory has 1024 bytes.
# In the words @ is a place in errors.cu, and "; 5" the block and thread 5.
MISUSES = [
    ("barriers", 40, 0, 64, "deadlock, block (0, 0, 0): 40 threads wait in __syncthreads @ (first (0, 0, 0)), 24 threads wait in __syncwarp @ (first (40, 0, 0)), 0 have finished"),
    ("barriers", 40, 1, 64, "threads meet in different __syncthreads, @ and @; 40"),
    ("barriers", 5, 2, 32, "deadlock, block (0, 0, 0): 5 threads wait in __syncwarp @ (first (0, 0, 0)), 27 threads wait in __syncthreads @ (first (5, 0, 0)), 0 have finished"),
    ("warps", 31, 0, 64, "deadlock, block (0, 0, 0): 62 threads wait in mma_m16n8k8_tf32 @ (first (0, 0, 0)), 2 have finished"),
    ("warps", 1, 1, 32, "mma_m16n8k8_tf32: all 32 lanes of the warp must take part, 31 are left @; 1"),
    ("warps", 32, 0, 24, "mma_m16n8k8_tf32: all 32 lanes of the warp must take part, 24 are left @; 0"),
    ("warps", 16, 2, 32, "different warp-wide calls meet: __shfl_xor_sync @, and __shfl_down_sync @; 16"),
    ("warps", 16, 3, 32, "different warp-wide calls meet: __shfl_xor_sync @, and __shfl_xor_sync @; 16"),
    ("warps", 16, 4, 32, "different warp-wide calls meet: __shfl_xor_sync @, and __shfl_xor_sync with another mask @; 16"),
    ("warps", 32, 5, 32, "__shfl_xor_sync: the width must be a power of two up to 32 @; 0"),
    ("addresses", 8, 0, 32, "ldmatrix_x4: misaligned shared address @; 0"),
    ("addresses", 1024, 0, 32, "ldmatrix_x4: not within the block's shared memory @; 0"),
    ("addresses", 4, 1, 32, "cp_async_16: misaligned shared address @; 0"),
    ("addresses", 1016, 1, 32, "cp_async_16: not within the block's shared memory @; 0"),
    ("addresses", 8, 2, 32, "cp_async_16: misaligned global address @; 0"),
    ("addresses", 4, 3, 32, "cp_async_8: misaligned global address @; 0"),
    ("addresses", 2, 4, 32, "cp_async_4: misaligned global address @; 0"),
    ("addresses", 0, 5, 32, "cp_async_4: not within the block's shared memory @; 0"),
]  # fmt: skip


@pytest.fixture(scope="module")
def errors() -> Sample:
    return Sample("errors")


@pytest.fixture(autouse=True)
def works_afterwards(errors: Sample, nan_filled_empties: None) -> Iterator[None]:
    yield
    assert not errors.run("barriers", torch.zeros(1), 256, grid=(2,), block=(256,), a=256, b=1).any()


def pattern(words: str) -> str:
    words = re.sub(r"; (\d+)$", r", block (0, 0, 0), thread (\1, 0, 0)", words)
    return "^cuda emulator: " + re.escape(words).replace("@", r"at errors\.cu:\d+") + "$"


@pytest.mark.parametrize(("kernel", "a", "b", "threads", "words"), MISUSES)
def test_misuse(errors: Sample, kernel: str, a: int, b: int, threads: int, words: str) -> None:
    with pytest.raises(RuntimeError, match=pattern(words)):
        errors.run(kernel, torch.zeros(64), 96, block=(threads,), shared=1024, a=a, b=b)


def test_stack_overflow(errors: Sample) -> None:
    if errors.sanitized:
        pytest.skip("sanitizers enlarge frames; stacks are larger there")
    assert errors.run("deep", torch.zeros(1), 32, a=8192)[1] > 100
    with pytest.raises(RuntimeError, match=pattern("a thread's stack overflowed, block (0, 0, 0), thread (1, 0, 0)")):
        errors.run("deep", torch.zeros(1), 32, a=512)


LIMITS = [
    ({"block": (32, 33)}, "launch failed: invalid configuration argument: grid (1, 1, 1), block (32, 33, 1)"),
    ({"block": (1, 1, 65)}, "launch failed: invalid configuration argument: grid (1, 1, 1), block (1, 1, 65)"),
    ({"grid": (0,)}, "launch failed: invalid configuration argument: grid (0, 1, 1), block (32, 1, 1)"),
    ({"grid": (1, 65536)}, "launch failed: invalid configuration argument: grid (1, 65536, 1), block (32, 1, 1)"),
    ({"shared": 227 * 1024 + 1}, "launch failed: invalid argument: 232449 bytes of shared memory, the device has 232448 per block"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), LIMITS)
def test_limits(errors: Sample, arguments: dict[str, int], words: str) -> None:
    with pytest.raises(RuntimeError, match=pattern(words)):
        errors.run("barriers", torch.zeros(1), 2048, a=2048, b=1, **arguments)


def test_environment(errors: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"kernel": "barriers", "inputs": torch.zeros(1), "outputs": 32, "a": 32, "b": 1}
    errors.run(**run, shared=200 * 1024)
    with monkeypatch.context() as patch:
        patch.setenv("EVK_EMULATOR_ARCH", "80")
        with pytest.raises(RuntimeError, match=r"204800 bytes of shared memory, the device has 166912 per block$"):
            errors.run(**run, shared=200 * 1024)
        patch.setenv("EVK_EMULATOR_ARCH", "70")
        with pytest.raises(RuntimeError, match=r"EVK_EMULATOR_ARCH must be 80, 86, 89, 90, 100, 103 or 120, got 70$"):
            errors.run(**run)
    with monkeypatch.context() as patch:
        patch.setenv("EVK_EMULATOR_ORDER", "sideways")
        with pytest.raises(RuntimeError, match=r"EVK_EMULATOR_ORDER must be forward, reverse or random, got sideways$"):
            errors.run(**run)
    errors.run(**run, shared=200 * 1024)
