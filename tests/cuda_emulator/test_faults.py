"""Planted faults: the emulator must catch each, by a wrong value or an error; the kernels without a fault are right."""

from __future__ import annotations

import math

import pytest
import torch

from tests.cuda_emulator import build
from tests.cuda_emulator.sample_runs import Sample

pytestmark = build.needs_compiler
ORDERS = ["forward", "reverse", "random"]
WRONG = "wrong values"

# The fault's number in samples/faults.cu, and what catches it, in every order.
NORMALISE_FAULTS = {
    "no barrier after the copy": (1, WRONG),
    "no barrier before shared memory is used again": (2, WRONG),
    "no barrier before the total": (3, WRONG),
    "divergent barrier": (4, "threads meet in different __syncthreads, at faults.cu"),
    "unmasked tail": (5, WRONG),
    "overrun of shared memory by one": (6, "something was written after shared memory of 1040 bytes, block"),
    "underrun of shared memory by one": (7, "something was written before shared memory, block"),
    "relu drops NaN": (8, WRONG),
    "no wait for copies": (9, WRONG),
    "no commit of copies": (10, WRONG),
    "wait for one group too few": (11, WRONG),
    "mask of half the warp": (12, "__shfl_xor_sync: the mask lacks the calling lane at faults.cu"),
    "half the distance of a shuffle": (13, WRONG),
}
MULTIPLY_FAULTS = {
    "no barrier of the warp": 14,
    "fragments swapped": 15,
    "halves of a fragment swapped": 16,
}


@pytest.fixture(scope="module")
def faults() -> Sample:
    return Sample("faults")


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("EVK_EMULATOR_ORDER", request.param)
    monkeypatch.setenv("EVK_EMULATOR_SEED", "3")
    return ORDERS.index(request.param)


def outcome(actual: torch.Tensor, expected: torch.Tensor) -> str:
    # A thousand terms of one sign in float32; the faults are off by percents.
    return "right" if torch.allclose(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True) else WRONG


def normalise(faults: Sample, fault: int) -> str:
    """Rows of which one holds a NaN, followed by memory that must be neither read nor written."""
    n, rows = 300, 3
    x = torch.randn(rows, n)
    x[1, 77] = math.nan
    positive = x.double().relu()
    expected = positive / (positive.sum(1, keepdim=True) + 1e-15)
    buffer, out = (torch.full((rows * n + 128,), math.nan) for _ in range(2))
    buffer[: x.numel()] = x.flatten()
    try:
        faults.run("normalise", buffer, out, grid=(rows,), block=(128,), shared=260 * 4, a=n, b=fault)
    except RuntimeError as error:
        return str(error)
    assert out[rows * n :].isnan().all()
    return outcome(out[: rows * n].reshape(rows, n), expected.float())


def multiply(faults: Sample, fault: int) -> str:
    a, b = torch.randint(-9, 9, (16, 8)).float(), torch.randint(-9, 9, (8, 8)).float()
    out = faults.run("multiply", torch.cat([a.flatten(), b.flatten()]), 128, shared=256, b=fault)
    return outcome(out.reshape(16, 8), a @ b)


def test_no_fault(faults: Sample, order: int) -> None:
    assert normalise(faults, 0) == "right"
    assert multiply(faults, 0) == "right"


@pytest.mark.nightly
def test_with_the_c_library_s_switch(order: int) -> None:
    """What processors other than x86-64 take."""
    faults = Sample("faults", "-DEVK_EMULATOR_UCONTEXT")
    assert normalise(faults, 0) == "right"
    assert normalise(faults, 3) == WRONG
    assert NORMALISE_FAULTS["divergent barrier"][1] in normalise(faults, 4)
    assert multiply(faults, 0) == "right"


@pytest.mark.parametrize("name", NORMALISE_FAULTS)
def test_fault_of_normalise(faults: Sample, order: int, name: str) -> None:
    fault, caught = NORMALISE_FAULTS[name]
    assert caught in normalise(faults, fault)


@pytest.mark.parametrize("name", MULTIPLY_FAULTS)
def test_fault_of_multiply(faults: Sample, order: int, name: str) -> None:
    assert multiply(faults, MULTIPLY_FAULTS[name]) == WRONG


@pytest.mark.parametrize(
    ("distance", "hidden_in"), [(-32, "forward"), (32, "reverse"), (-1, "forward"), (1, "reverse")]
)
def test_races_show_in_one_order(faults: Sample, order: int, distance: int, hidden_in: str) -> None:
    """A missing barrier before reading what lower threads write shows when higher ones run first, and the reverse."""
    x = torch.randn(128)
    sources = [t + distance if 0 <= t + distance < 128 else t for t in range(128)]
    run = {"inputs": x, "outputs": 128, "block": (128,), "shared": 512, "a": distance}
    assert torch.equal(faults.run("neighbours", b=1, **run), x[sources])
    racy = faults.run("neighbours", b=0, **run)
    assert torch.equal(racy, x[sources]) == (ORDERS[order] == hidden_in)
