"""The CPU's twins of PTX instructions, against the layouts that the PTX ISA documents and plain arithmetic.

Marked gpu, the same tests run the instructions themselves: what the twins and this file believe is checked there.
"""

from __future__ import annotations

import math
import struct

import pytest
import torch

from tests.cuda_emulator import build
from tests.cuda_emulator.sample_runs import Sample

pytestmark = build.needs_compiler
KINDS = {"tf32": 0, "f16": 1, "bf16": 2}
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
FORMS = {"x4": (0, 4, False), "x4_trans": (1, 4, True), "x2": (2, 2, False), "x2_trans": (3, 2, True)}


@pytest.fixture(scope="module", params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def ptx(request: pytest.FixtureRequest) -> Sample:
    return Sample("ptx", gpu=request.param == "gpu")


def word(low: torch.Tensor, high: torch.Tensor) -> int:
    """Two 16-bit values in one register."""
    bits = [int(half.view(torch.int16)) & 0xFFFF for half in (low, high)]
    return bits[0] | bits[1] << 16


def float_of(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0])


def words(values: list[int]) -> torch.Tensor:
    return torch.tensor([value - 2**32 if value >= 2**31 else value for value in values], dtype=torch.int32)


# The element of A, B or D that the ISA's figures give a lane: a0 ... a7, b0 ... b3, c0 ... c3 of "Matrix Fragments".
def a_16_bits(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    return row, (lane % 4) * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_16_bits(lane: int, i: int) -> tuple[int, int]:
    return (lane % 4) * 2 + (i & 1) + (8 if i >= 2 else 0), lane >> 2


def a_tf32(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) if i in (0, 2) else (lane >> 2) + 8, lane % 4 if i < 2 else lane % 4 + 4


def b_tf32(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 if i == 0 else lane % 4 + 4, lane >> 2


def c_any(lane: int, i: int) -> tuple[int, int]:
    return lane >> 2 if i < 2 else (lane >> 2) + 8, (lane % 4) * 2 + (i & 1)


def fragments(kind: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    rows = []
    for lane in range(32):
        row = [int(c[c_any(lane, i)].view(torch.int32)) for i in range(4)]
        if kind == "tf32":
            row += [int(a[a_tf32(lane, i)].view(torch.int32)) for i in range(4)]
            row += [int(b[b_tf32(lane, i)].view(torch.int32)) for i in range(2)]
        else:
            row += [word(a[a_16_bits(lane, 2 * i)], a[a_16_bits(lane, 2 * i + 1)]) for i in range(4)]
            row += [word(b[b_16_bits(lane, 2 * i)], b[b_16_bits(lane, 2 * i + 1)]) for i in range(2)]
        rows.append(words([value & 0xFFFFFFFF for value in row]))
    return torch.stack(rows)


def d_of(out: torch.Tensor) -> torch.Tensor:
    d = torch.empty(16, 8)
    for lane in range(32):
        for i in range(4):
            d[c_any(lane, i)] = out[4 * lane + i]
    return d


@pytest.mark.parametrize("kind", KINDS)
def test_mma(ptx: Sample, kind: str) -> None:
    """Small integers: every product and sum is exact, so an element in a wrong place shows."""
    k = 8 if kind == "tf32" else 16
    dtype = DTYPES.get(kind, torch.float32)
    a, b = (torch.randint(-64, 64, shape).to(dtype) for shape in ((16, k), (k, 8)))
    c = torch.randint(-1000, 1000, (16, 8)).float()
    out = ptx.run("fragments", fragments(kind, a, b, c), 128, a=KINDS[kind])
    assert torch.equal(d_of(out), c + a.float() @ b.float())


def test_mma_rounds_its_sum_once(ptx: Sample) -> None:
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    a, b = (
        torch.tensor([[float_of(bits & ~0x1FFF) for bits in row] for row in x.view(torch.int32).tolist()])
        for x in (a, b)
    )
    out = ptx.run("fragments", fragments("tf32", a, b, c), 128, a=KINDS["tf32"])
    if ptx.on_gpu:
        pytest.skip("a GPU rounds more often, and not always to nearest")
    assert torch.equal(d_of(out), (c.double() + a.double() @ b.double()).float())


def test_mma_tf32_ignores_the_low_bits(ptx: Sample) -> None:
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.zeros(16, 8)
    full = ptx.run("fragments", fragments("tf32", a, b, c), 128, a=KINDS["tf32"])
    a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    assert torch.equal(full, ptx.run("fragments", fragments("tf32", a, b, c), 128, a=KINDS["tf32"]))


@pytest.mark.parametrize("kind", KINDS)
def test_mma_keeps_nan_and_infinity(ptx: Sample, kind: str) -> None:
    k = 8 if kind == "tf32" else 16
    dtype = DTYPES.get(kind, torch.float32)
    a, b = torch.ones(16, k, dtype=dtype), torch.ones(k, 8, dtype=dtype)
    a[3, 5], a[9, 0], b[k - 1, 6] = math.nan, math.inf, -math.inf
    d = d_of(ptx.run("fragments", fragments(kind, a, b, torch.zeros(16, 8)), 128, a=KINDS[kind]))
    assert torch.equal(d.isnan(), (a.float() @ b.float()).isnan())
    assert torch.equal(d.nan_to_num(), (a.float() @ b.float()).nan_to_num())


@pytest.mark.parametrize("form", FORMS)
def test_ldmatrix(ptx: Sample, form: str) -> None:
    number, count, trans = FORMS[form]
    memory = torch.randint(-(2**31), 2**31, (512,), dtype=torch.int32)
    rows = torch.randperm(128)[:32]
    halves = memory.view(torch.int16).reshape(128, 8)
    out = ptx.run(
        "matrices",
        torch.cat([memory, rows.int() * 16]),
        torch.zeros(128, dtype=torch.int32),
        shared=2048,
        a=number,
        b=512,
    )
    for lane in range(32):
        for i in range(4):
            matrix = halves[rows[8 * i : 8 * i + 8]]
            matrix = matrix.T if trans else matrix
            pair = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].contiguous()
            assert out[4 * lane + i] == (pair.view(torch.int32).item() if i < count else 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", DTYPES)
def test_ldmatrix_and_mma_agree(ptx: Sample, kind: str, transposed: bool) -> None:
    a, b = (torch.randint(-8, 8, shape).to(DTYPES[kind]) for shape in ((16, 16), (16, 8)))
    stored = [x.T.contiguous() if transposed else x for x in (a, b)]
    memory = torch.cat([x.flatten() for x in stored]).view(torch.int32)
    out = ptx.run("product", memory, 128, shared=768, a=KINDS[kind], b=int(transposed))
    assert torch.equal(out.reshape(16, 8), a.float() @ b.float())


def test_to_tf32(ptx: Sample) -> None:
    values = torch.cat(
        [torch.randn(200) * 10.0 ** torch.randint(-40, 38, (200,)), torch.tensor([0.0, -0.0, math.inf, -math.inf])]
    )
    ties = [0x3F801000, 0xBF801000, 0x3F801001, 0x3F800FFF, 0x3F803000, 0x7F7FFFFF, 0x00001000, 0x007FFFFF]
    x = torch.cat([values.view(torch.int32), words(ties)])
    out = ptx.run("conversions", x.view(torch.float32), len(x), grid=(len(x),), block=(1,))
    for before, after in zip(x.view(torch.float32).tolist(), out.tolist(), strict=True):
        if math.isinf(before) or before == 0:
            expected = before
        else:
            # The exponent of the kept bits: 10 after the leading one, at least those of the smallest subnormal.
            step = math.ldexp(1.0, max(math.frexp(before)[1] - 11, -136))
            expected = math.copysign(math.floor(abs(before) / step + 0.5) * step, before)
            expected = math.copysign(math.inf, before) if abs(expected) >= 2.0**128 else expected
        assert after == expected


def test_to_tf32_keeps_nan(ptx: Sample) -> None:
    x = words([0x7F800001, 0xFFFFFFFF, 0x7FC00000])
    out = ptx.run("conversions", x.view(torch.float32), 3, grid=(3,), block=(1,))
    # Also without the bits that mma ignores.
    assert (out.view(torch.int32) & ~0x1FFF).view(torch.float32).isnan().all()


@pytest.mark.parametrize("kind", DTYPES)
def test_relu_of_every_value(ptx: Sample, kind: str) -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    halves = torch.stack([halves, halves[torch.randperm(2**16)]], 1).flatten()
    x = halves.view(torch.float32)
    out = ptx.run("conversions", x, len(x), grid=(len(x) // 1024,), block=(1024,), a=KINDS[kind])
    expected = halves.view(DTYPES[kind]).float().relu()
    torch.testing.assert_close(out.view(DTYPES[kind]).float(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_copies_arrive_at_the_wait(ptx: Sample, size: int) -> None:
    x = torch.randn(64, size)
    x[::3] = 0
    x[::3, 1:] = 5.0  # would be seen if a copy that is not valid took the words
    out = ptx.run("copies", x.flatten(), 4 * x.numel(), block=(64,), shared=8 * x.numel(), a=size).reshape(4, 64, size)
    expected = torch.where(x[:, :1] == 0, 0.0, x)
    assert torch.equal(out[1], expected)
    assert torch.equal(out[3], expected)
    if not ptx.on_gpu:  # where they may arrive earlier
        assert out[0].isnan().all()
        assert out[2].isnan().all()


@pytest.mark.parametrize("words", [2, 4])
def test_stores(ptx: Sample, words: int) -> None:
    """To global memory, and to shared memory."""
    x = torch.randn(64, words)
    out = ptx.run("stores", x.flatten(), 2 * x.numel(), block=(64,), shared=4 * x.numel(), a=words)
    assert torch.equal(out.reshape(2, 64, words), x.expand(2, 64, words))
