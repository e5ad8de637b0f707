"""The CUDA kernels of relu_linear_attention: rule T, exact states, determinism, layouts, thread orders.

In the emulator where there is no GPU. The edge table and the laws are in tests/ops, for all executors.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from efficientvit_kernels.ops._backends import CUDA_HEAD_DIMS, registered
from efficientvit_kernels.testing import make_qkv
from tests.cuda_emulator.ops import cuda_calls
from tests.ops.common import HALF, SAMPLES, Sample, as_layout, device_of, judge, run

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("backend", ["cuda"])]
DTYPES = [torch.float32, *HALF]
SMALL = [
    sample
    for sample in SAMPLES
    if sample.head_dim in CUDA_HEAD_DIMS and sample.batch * sample.heads * sample.scales * sample.tokens <= 2100
]
WIDE = [
    Sample(2, 1, 64, 12, 16, layout="channels_last"),  # all tokens aligned, the rows of a state shared by warps
    Sample(1, 1, 64, 16, 18, scales=2),  # rows of tokens aligned
    Sample(1, 1, 64, 20, 27, layout="sliced"),  # several splits
    Sample(1, 1, 8, 5, 9, scales=6),  # more scales than a launch takes
    Sample(1, 1, 16, 46, 50),  # more splits than a reader adds up
    Sample(1, 1, 32, 47, 51, layout="channels_last"),
    Sample(1, 2, 32, 10, 10),  # rows aligned to 8 bytes, not to 16
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", [*SMALL, *WIDE], ids=str)
def test_rule_t(backend: str, sample: Sample, dtype: torch.dtype) -> None:
    before = cuda_calls()
    verdicts = judge(sample.make(dtype), sample.head_dim, sample.eps, backend)
    assert all(verdict.ok for verdict in verdicts.values()), {name: str(verdict) for name, verdict in verdicts.items()}
    assert cuda_calls() - before == 2


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [(torch.float32, 1.5, 1.5), (torch.float16, 2.0, 2.0), (torch.bfloat16, 0.7, 1.0)],
    ids=str,
)
def test_median_error_meets_the_target(backend: str, dtype: torch.dtype, forward: float, backward: float) -> None:
    """T2: the median over samples of our error against the official formula's."""
    ratios: dict[str, list[float]] = {"out": [], "grad": []}
    for sample in [*SMALL, *WIDE]:
        if sample.tokens > sample.head_dim:
            for name, verdict in judge(sample.make(dtype), sample.head_dim, sample.eps, backend).items():
                ratios["out" if name == "out" else "grad"].append(verdict.ratio)
    assert len(ratios["out"]) > 20
    assert statistics.median(ratios["out"]) <= forward
    assert statistics.median(ratios["grad"]) <= backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "height", "width", "layout"),
    [(8, 14, 14, "nchw"), (16, 8, 16, "nchw"), (32, 9, 33, "channels_last"), (64, 7, 9, "transposed")],
)
def test_integers_give_the_exact_state(
    backend: str, head_dim: int, height: int, width: int, layout: str, dtype: torch.dtype
) -> None:
    """T5: sums below 2^24 are exact in float32, so every order of summation gives the same state."""
    shape = (2, 2 * 3 * head_dim, height, width)
    qkv = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0))
    forward = registered("relu_linear_attention", "fwd", backend)
    _, state = forward([as_layout(qkv.to(dtype), layout).to(device_of(backend))], head_dim, 1e-15)
    _, k, v = qkv.reshape(2, 2, 3 * head_dim, -1).split(head_dim, dim=2)
    k = k.clamp(min=0)
    expected = torch.cat([v @ k.transpose(-1, -2), k.sum(-1).unsqueeze(2)], dim=2)
    assert int(expected.abs().max()) < 2**24
    assert torch.equal(state.cpu(), expected.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", CUDA_HEAD_DIMS)
def test_layouts_and_repeats_give_equal_bits(backend: str, head_dim: int, dtype: torch.dtype) -> None:
    qkv = make_qkv(2, 1, head_dim, 6, 12, dtype=dtype)[0]
    out, grads = run([qkv], head_dim, 1e-15, backend)
    for layout in ("nchw", "channels_last", "sliced", "transposed", "permuted", "offset"):
        other, other_grads = run([as_layout(qkv, layout)], head_dim, 1e-15, backend)
        assert torch.equal(other, out), layout
        assert torch.equal(other_grads[0], grads[0]), layout
        assert other.is_contiguous(memory_format=torch.channels_last) or layout != "channels_last"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU orders its threads itself")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_orders_of_threads_and_blocks_give_equal_bits(
    backend: str, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = make_qkv(1, 2, head_dim, 18, 17, scales=2, dtype=dtype)
    out, grads = run(qkv, head_dim, 1e-15, backend)
    for order in ("reverse", "random"):
        monkeypatch.setenv("EVK_EMULATOR_ORDER", order)
        other, other_grads = run(qkv, head_dim, 1e-15, backend)
        assert torch.equal(other, out), order
        assert all(torch.equal(a, b) for a, b in zip(other_grads, grads, strict=True)), order


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_some_scales(backend: str, dtype: torch.dtype) -> None:
    qkv = make_qkv(2, 1, 16, 5, 7, scales=3, dtype=dtype)
    _, grads = run(qkv, 16, 1e-15, backend)
    leaves = [tensor.to(device_of(backend)) for tensor in qkv]
    out, state = registered("relu_linear_attention", "fwd", backend)(leaves, 16, 1e-15)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    some: list[Tensor] = registered("relu_linear_attention", "bwd", backend)(grad_out, leaves, state, 16, 1e-15, [2, 0])
    assert torch.equal(some[0].cpu(), grads[2])
    assert torch.equal(some[1].cpu(), grads[0])
