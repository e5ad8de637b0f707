"""The Triton kernels of relu_linear_attention: rule T, exact states, determinism, layouts.

In the interpreter where there is no GPU. The edge table and the laws are in tests/ops, for all executors.
"""

from __future__ import annotations

import statistics

import pytest
import torch

from efficientvit_kernels import reference, relu_linear_attention
from efficientvit_kernels.testing import make_qkv, triton_launches
from efficientvit_kernels.triton_kernels import configs, launch
from efficientvit_kernels.triton_kernels.relu_linear_attention import relu_linear_attention_fwd
from tests.ops.common import HALF, SAMPLES, Sample, as_layout, device_of, grad_out_like, judge, run, truth_and_base

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, *HALF]
inf, nan = float("inf"), float("nan")
SMALL = [
    sample
    for sample in SAMPLES
    if sample.batch * sample.heads * sample.scales <= 8 and sample.tokens <= 260 and sample.head_dim <= 65
]
TINY_DENOMINATORS = [s for s in SMALL if str(s).startswith(("b2h2d2_9x7_s1_nchw", "b1h2d8_1x129_s1_nchw"))]
WIDE = [  # several blocks of rows of the state, several splits of the tokens, more than a reader adds up itself
    Sample(1, 1, 96, 5, 7),
    Sample(2, 1, 112, 4, 9, layout="channels_last"),
    Sample(1, 1, 160, 6, 5, layout="sliced"),
    Sample(1, 1, 16, 20, 27, scales=2),
    Sample(1, 1, 16, 40, 33, layout="channels_last"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", [*SMALL[::3], *TINY_DENOMINATORS, *WIDE], ids=str)
def test_rule_t(sample: Sample, dtype: torch.dtype) -> None:
    before = triton_launches()
    verdicts = judge(sample.make(dtype), sample.head_dim, sample.eps, "triton")
    assert all(verdict.ok for verdict in verdicts.values()), {name: str(verdict) for name, verdict in verdicts.items()}
    assert triton_launches() - before == 4 * sample.scales


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", [*SMALL, Sample(1, 1, 256, 3, 5)], ids=str)
def test_rule_t_of_all_small_samples(sample: Sample, dtype: torch.dtype) -> None:
    test_rule_t(sample, dtype)


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [(torch.float32, 1.5, 1.5), (torch.float16, 2.0, 2.0), (torch.bfloat16, 0.7, 1.0)],
    ids=str,
)
def test_median_error_meets_the_target(dtype: torch.dtype, forward: float, backward: float) -> None:
    """T2: the median over samples of our error against the official formula's."""
    ratios: dict[str, list[float]] = {"out": [], "grad": []}
    for sample in SMALL[1::3]:
        if sample.tokens > sample.head_dim:
            for name, verdict in judge(sample.make(dtype), sample.head_dim, sample.eps, "triton").items():
                ratios["out" if name == "out" else "grad"].append(verdict.ratio)
    assert len(ratios["out"]) > 8
    assert statistics.median(ratios["out"]) <= forward
    assert statistics.median(ratios["grad"]) <= backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "height", "width"), [(16, 14, 14), (33, 9, 33), (5, 40, 33), (96, 5, 5)])
def test_integers_give_the_exact_state(head_dim: int, height: int, width: int, dtype: torch.dtype) -> None:
    """T5: sums below 2^24 are exact in float32, so every order of summation gives the same state."""
    shape = (1, 2 * 3 * head_dim, height, width)
    qkv = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0))
    _, state = relu_linear_attention_fwd([qkv.to(device_of("triton"), dtype)], head_dim, 1e-15)
    _, k, v = qkv.reshape(1, 2, 3 * head_dim, -1).split(head_dim, dim=2)
    k = k.clamp(min=0)
    expected = torch.cat([v @ k.transpose(-1, -2), k.sum(-1).unsqueeze(2)], dim=2)
    assert int(expected.abs().max()) < 2**24
    assert torch.equal(state.cpu(), expected.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_repeats_give_equal_results(dtype: torch.dtype) -> None:
    """Two runs are bit-equal. So are layouts in the interpreter; a GPU may order the terms of a product by layout."""
    qkv = make_qkv(2, 1, 16, 5, 9, dtype=dtype)[0]
    out, grads = run([qkv], 16, 1e-15, "triton")
    for layout in ("nchw", "channels_last", "sliced", "transposed", "permuted", "offset"):
        other, other_grads = run([as_layout(qkv, layout)], 16, 1e-15, "triton")
        if layout == "nchw" or device_of("triton") == "cpu":
            assert torch.equal(other, out), layout
            assert torch.equal(other_grads[0], grads[0]), layout
        tolerance = 4 * torch.finfo(dtype).eps * float(out.abs().max())
        assert torch.allclose(other, out, rtol=0, atol=tolerance), layout
        assert other.is_contiguous(memory_format=torch.channels_last) or layout != "channels_last"


@pytest.mark.parametrize("head_dim", [5, 96])
def test_neighbours_full_of_nan(head_dim: int) -> None:
    """Another head leaves no trace, not even where lanes beyond the head dim meet zeros."""
    qkv = make_qkv(1, 2, head_dim, 2, 3, dtype=torch.float16)[0]
    out, (grad,) = run([qkv], head_dim, 1e-15, "triton")
    qkv[:, 3 * head_dim :] = float("nan")
    found, (found_grad,) = run([qkv], head_dim, 1e-15, "triton")
    assert torch.equal(found[:, :head_dim], out[:, :head_dim])
    assert torch.equal(found_grad[:, : 3 * head_dim], grad[:, : 3 * head_dim])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_e26_with_blocks_of_rows(dtype: torch.dtype) -> None:
    """One tiny positive key, where the terms of a gradient cancel, and a state that no program holds as a whole.

    The largest of the errors over a few inputs, which are luck one by one, against the formula's in float32; the
    specification's, as the official module would take its quadratic path for so few tokens.
    """
    worst = {"ours": 0.0, "float32": 0.0}
    for seed in range(4):
        qkv = make_qkv(1, 1, 96, 4, 5, dtype=dtype, seed=seed)[0]
        k = qkv[:, 96:192]
        k.abs_().neg_()
        k[0, 70, 2, 2] = 1e-6
        _, (grad,) = run([qkv], 96, 1e-15, "triton")
        (truth,) = truth_and_base([qkv], 96, 1e-15)[0][1:]
        leaf = qkv.float().requires_grad_()
        out = reference.relu_linear_attention(leaf, 96)
        base = torch.autograd.grad(out, leaf, grad_out_like(out.to(dtype)).float())[0].to(dtype)
        for name, result in (("ours", grad), ("float32", base)):
            worst[name] = max(worst[name], float((result.double() - truth).abs().max()))
    assert 0 < worst["ours"] <= 2 * worst["float32"], worst


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from the interpreter's products
def test_infinite_gradients(dtype: torch.dtype) -> None:
    """T3: an infinite product is rounded to TF32, and leaves no NaN behind as the second part of an operand."""
    qkv = torch.ones(1, 48, 1, 3)
    qkv[0, 32:] = 0
    qkv[0, 32, 0] = torch.tensor([3.0, -1.0, 2.0**-12])  # out is their mean; the sum has more than 11 bits
    leaf = qkv.to(device_of("triton"), dtype).requires_grad_()
    out = relu_linear_attention(leaf, 16, backend="triton")
    grad_out = torch.zeros_like(out)
    grad_out[0, 0, 0, 0] = inf
    (grad,) = torch.autograd.grad(out, leaf, grad_out)
    expected = torch.zeros_like(qkv)
    expected[0, :32, 0, 0] = expected[0, 16:32, 0, 2] = nan  # inf - inf
    expected[0, 16:32, 0, 1] = -inf  # as v and out have unlike signs
    expected[0, 32] = inf
    assert torch.equal(grad.float().cpu().nan_to_num(7.0, inf, -inf), expected.nan_to_num(7.0, inf, -inf))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [5, 96])
def test_no_eps_and_tiles_that_reach_beyond_the_tokens(head_dim: int, dtype: torch.dtype) -> None:
    """Every token's denominator is positive; there are none beyond the tokens."""
    qkv = [tensor.abs() for tensor in Sample(1, 2, head_dim, 3, 7).make(dtype)]
    verdicts = judge(qkv, head_dim, 0.0, "triton")
    assert all(verdict.ok for verdict in verdicts.values()), {name: str(verdict) for name, verdict in verdicts.items()}


def test_tf32_only_where_torch_allows_it() -> None:
    assert launch.product_precision(torch.float32) == "ieee"
    assert launch.product_precision(torch.bfloat16) == "tf32"
    torch.set_float32_matmul_precision("high")
    try:
        assert launch.product_precision(torch.float32) == "tf32"
        qkv = make_qkv(1, 2, 16, 9, 7)
        loose, _ = run(qkv, 16, 1e-15, "triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    exact, _ = run(qkv, 16, 1e-15, "triton")
    error = float((loose - exact).abs().max() / exact.abs().max())
    assert 1e-6 < error < 2e-3  # operands with 11 bits


def test_no_rounding_turns_a_nan_into_a_number() -> None:
    """The NaN of GPUs has all bits set: rounding up to TF32 would carry into its sign."""
    qkv = make_qkv(1, 1, 4, 2, 2)[0]
    qkv.view(torch.int32)[0, 8, 1, 1] = 0x7FFFFFFF  # in the first channel of v
    torch.set_float32_matmul_precision("high")
    try:
        out, _ = run([qkv], 4, 1e-15, "triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert out[0, 0].isnan().all()
    assert out[0, 1:].isfinite().all()


def test_splits_depend_on_the_tokens_alone() -> None:
    assert [configs.tokens_per_split(tokens) for tokens in (1, 256, 257, 8192, 8193)] == [256, 256, 256, 256, 512]
    for tokens in (1, 49, 4096, 16384, 10**6):
        split = configs.tokens_per_split(tokens)
        assert split % configs.TOKENS_PER_SPLIT == 0
        assert -(-tokens // split) <= configs.MAX_SPLITS
