"""The emulator of CUDA: its intrinsics against plain loops, what it reports, and the faults that it must catch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.cuda_emulator import build
from tests.cuda_emulator.sample_runs import Sample

pytestmark = build.needs_compiler
NAN = math.nan


@pytest.fixture(params=["forward", "reverse", "random"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test that takes it runs in each order of threads."""
    monkeypatch.setenv("EVK_EMULATOR_ORDER", request.param)
    monkeypatch.setenv("EVK_EMULATOR_SEED", "5")
    return str(request.param)


@pytest.fixture(scope="module")
def intrinsics() -> Sample:
    return Sample("intrinsics")


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=0, equal_nan=True)


def test_indices(intrinsics: Sample, order: str) -> None:
    grid, block = (3, 2, 2), (5, 4, 3)
    threads = [(x, y, z) for z in range(3) for y in range(4) for x in range(5)]
    blocks = [(x, y, z) for z in range(2) for y in range(2) for x in range(3)]
    expected = torch.tensor([[*t, *b, *block, *grid] for b, t in itertools.product(blocks, threads)])
    out = intrinsics.run("indices", torch.zeros(1), expected.numel(), grid=grid, block=block)
    same(out, expected.flatten())


@pytest.mark.parametrize(
    ("distance", "width"), [(1, 32), (16, 32), (3, 8), (7, 16), (5, 4), (31, 32), (0, 1), (33, 32)]
)
def test_shuffles(intrinsics: Sample, order: str, distance: int, width: int) -> None:
    x = torch.randn(64).mul(100).round()
    expected = torch.empty(4, 64)
    for t in range(64):
        lane = t % 32
        first = lane - lane % width
        sources = [
            first + distance % width,
            lane ^ distance if lane ^ distance < first + width else lane,
            lane + distance if lane + distance < first + width else lane,
            lane - distance if lane - distance >= first else lane,
        ]
        expected[:, t] = x[[t - lane + source for source in sources]]
    out = intrinsics.run("shuffles", x, 8 * 64, block=(64,), a=distance, b=width)
    same(out, torch.cat([expected, expected]).flatten())


@pytest.mark.parametrize("split", [1, 13, 16, 31])
def test_parts_of_a_warp(intrinsics: Sample, order: str, split: int) -> None:
    x = torch.arange(64.0)
    parts = [x[:split], x[split:32], x[32 : 32 + split], x[32 + split :]]
    out = intrinsics.run("split_warp", x, 64, block=(64,), a=split)
    same(out, torch.cat([part.sum().expand(len(part)) for part in parts]))


@pytest.mark.parametrize("threads", [32, 64, 40])
def test_votes(intrinsics: Sample, order: str, threads: int) -> None:
    x = torch.randn(threads)
    x[:32] = x[:32].abs() + 1
    warps = [x[start : start + 32] > 0 for start in range(0, threads, 32)]
    ballots = [sum(1 << lane for lane in range(len(warp)) if warp[lane]) for warp in warps]
    per_warp = [[ballot % 65536, ballot // 65536] for ballot in ballots]
    rows = [[*halves, warp.any(), warp.all()] for halves, warp in zip(per_warp, warps, strict=True)]
    expected = torch.cat([torch.tensor(row).expand(len(warp), 4) for row, warp in zip(rows, warps, strict=True)])
    same(intrinsics.run("votes", x, 4 * threads, block=(threads,)), expected.T.flatten())


def test_atomics(intrinsics: Sample, order: str) -> None:
    x = torch.arange(1.0, 97)
    out = torch.zeros(3 + 3 * 96)
    intrinsics.run("atomics", x, out, block=(96,), shared=8)
    same(out[:3], torch.tensor([x.sum(), -96, 192]))
    # Each addition returned another partial sum.
    same(out[3 + 96 : 3 + 192].sort().values, torch.arange(-95.0, 1))
    same(out[3 + 192 :].sort().values, torch.arange(0.0, 192, 2))
    assert out[3:99].min() == 0
    assert out[3:99].max() < x.sum()


def ranks(intrinsics: Sample, blocks: int = 1) -> list[int]:
    """How many of the block's threads came before each, at an atomic counter."""
    out = intrinsics.run("atomics", torch.zeros(96), torch.zeros(3 + 3 * 96), grid=(blocks,), block=(96,), shared=8)
    return [round(-rank) for rank in out[3 + 96 : 3 + 192].tolist()]


def test_order_of_threads(intrinsics: Sample, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ranks(intrinsics)
    assert sorted(found) == list(range(96))
    assert (found == list(range(96))) == (order == "forward")
    assert (found == list(range(95, -1, -1))) == (order == "reverse")
    assert ranks(intrinsics) == found
    monkeypatch.setenv("EVK_EMULATOR_SEED", "6")
    assert (ranks(intrinsics) == found) == (order != "random")


def test_order_of_blocks(intrinsics: Sample, order: str) -> None:
    """The last block to write its index leaves it."""
    out = intrinsics.run("last_block", torch.zeros(1), 1, grid=(5, 4), block=(1,))
    assert order == "random" or out.item() == (19 if order == "forward" else 0)
    first = intrinsics.run("last_block", torch.zeros(1), 1, grid=(5, 4), block=(1,), a=1)
    assert order == "random" or first.item() == (0 if order == "forward" else 19)
    assert order != "random" or (first.item(), out.item()) not in {(0, 19), (19, 0)}


def test_launches_are_counted(intrinsics: Sample) -> None:
    before = intrinsics.library.launches()
    intrinsics.run("unwritten", torch.zeros(1), 64, grid=(2,), shared=128)
    with pytest.raises(RuntimeError, match="launch failed"):
        intrinsics.run("unwritten", torch.zeros(1), 64, grid=(0,), shared=128)
    assert intrinsics.library.launches() == before + 1


def test_the_device_can_be_set(intrinsics: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    intrinsics.library.set_shared_limit(1000)
    with pytest.raises(RuntimeError, match="1001 bytes of shared memory, the device has 1000 per block"):
        intrinsics.run("unwritten", torch.zeros(1), 32, shared=1001)
    for arch in ("90", ""):  # a new value of the environment replaces it
        monkeypatch.setenv("EVK_EMULATOR_ARCH", arch)
        intrinsics.run("unwritten", torch.zeros(1), 32, shared=227 * 1024)


def test_unset_variables_are_not_what_was_there(intrinsics: Sample) -> None:
    if not build.if_known(build.SET_VARIABLES):
        pytest.skip("the compiler has no flag for it")
    assert (intrinsics.run("unset", torch.zeros(1), 32, a=3).abs() > 1e38).all()


def test_extremes(intrinsics: Sample) -> None:
    pairs = torch.tensor([[1.0, -1.0, NAN, 5.0, -3.0, 0.0, 7.0, 8.0], [2.0, 4.0, 3.0, NAN, -2.0, -1.0, 7.0, 6.0]])
    out = intrinsics.run("extremes", pairs, 6 * 8, block=(8,)).reshape(6, 8)
    integers = pairs.nan_to_num(0).int()
    same(out[0], torch.fmin(*pairs))
    same(out[1], torch.fmax(*pairs))
    same(out[2], torch.minimum(*integers))
    same(out[3], torch.maximum(*integers))
    same(out[4], torch.tensor([min(i % 2**32, 7) == 7 for i in integers[0].tolist()]))

    def bits(i: int, j: int) -> int:
        word = format(j % 2**32, "032b")
        zeros, lowest = (word.index("1"), 32 - word.rindex("1")) if j else (32, 0)
        return (i % 2**32).bit_count() + 100 * zeros + lowest

    same(out[5], torch.tensor([bits(*pair) for pair in integers.T.tolist()]))


def test_exited_threads_are_not_waited_for(intrinsics: Sample, order: str) -> None:
    x = torch.randn(80).mul(8).round()
    out = intrinsics.run("early_exit", x, 80, block=(80,), shared=80 * 4, a=56)
    # Lanes 8 to 15 of the second warp read from those that have left.
    expected = x[:56].sum().expand(80).clone()
    expected[40:48] = NAN
    expected[56:] = NAN
    same(out, expected)


def test_shared_memory_is_nan_in_every_block(intrinsics: Sample, order: str) -> None:
    assert intrinsics.run("unwritten", torch.zeros(1), torch.zeros(96), grid=(3,), shared=128).isnan().all()
