"""relu_linear_attention at the edges: zeros, NaN and inf, extreme magnitudes, empty inputs.

The row names (E1, ...) are those of the edge table in docs/numerics.md, which every kernel of this package is held to.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import reference, relu_linear_attention
from efficientvit_kernels.testing import make_qkv, official_relu_linear_attention, rule_t
from tests.ops.common import DTYPES, EXECUTORS, HALF, device_of, executors, grad_out_like, run, truth_and_base

inf, nan = float("inf"), float("nan")


def packed(
    *, heads: int = 2, dim: int = 16, size: int = 8, dtype: torch.dtype = torch.float32, batch: int = 1
) -> Tensor:
    return make_qkv(batch, heads, dim, size, size, dtype=dtype)[0]


def part(qkv: Tensor, name: str, dim: int = 16) -> Tensor:
    """View of all heads' q, k or v: [B, heads, D, H, W]."""
    batch, channels, height, width = qkv.shape
    first = "qkv".index(name) * dim
    return qkv.view(batch, channels // (3 * dim), 3 * dim, height, width)[:, :, first : first + dim]


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("size", [8, 3], ids=["linear", "quadratic"])  # as the official module would choose
@pytest.mark.parametrize("what", ["k", "q", "all"])
@pytest.mark.parametrize(("backend", "dtype"), executors(DTYPES), ids=str)
def test_e1_e2_zero_denominators(backend: str, dtype: torch.dtype, what: str, size: int, scale: float) -> None:
    """T4: no positive q or k: exact 0 in the output and in every gradient, however large grad_out is."""
    qkv = packed(size=size, dtype=dtype)
    for name in "qk" if what == "all" else what:
        part(qkv, name).abs_().neg_()
    if what == "all":
        qkv.zero_()
    leaf = qkv.to(device_of(backend)).requires_grad_()
    out = relu_linear_attention(leaf, 16, backend=backend)
    (grad,) = torch.autograd.grad(out, leaf, (grad_out_like(out).to(leaf.device) * scale).clamp(-6e4, 6e4))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("magnitude", [60.0, 64.0, 300.0, 3e4, 6e4])
@pytest.mark.parametrize("size", [8, 4], ids=["linear", "quadratic"])
@pytest.mark.parametrize(("backend", "dtype"), executors([torch.float32, *HALF]), ids=str)
def test_e3_e4_large_magnitudes(backend: str, dtype: torch.dtype, size: int, magnitude: float) -> None:
    """With q = k = v = magnitude everywhere, the output is a mean of equal values. A 16-bit state would overflow."""
    qkv = torch.full((1, 96, size, size), magnitude).to(dtype)
    out, grads = run([qkv], 16, 1e-15, backend)
    assert torch.allclose(out, qkv[:, :32], rtol=max(1e-6, torch.finfo(dtype).eps), atol=0)
    assert torch.isfinite(grads[0]).all()


@pytest.mark.parametrize(("backend", "dtype"), executors([torch.float32, *HALF]), ids=str)
def test_e4_random_large_magnitudes(backend: str, dtype: torch.dtype) -> None:
    qkv = (torch.rand(1, 96, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 6e4
    qkv = qkv.to(dtype)
    out, grads = run([qkv], 16, 1e-15, backend)
    truth = reference.relu_linear_attention(qkv.double(), 16)
    base = official_relu_linear_attention(qkv, 16)
    verdict = rule_t(out, truth, base)
    assert verdict.ok, verdict
    assert torch.isfinite(grads[0]).all()


@pytest.mark.parametrize(("backend", "dtype"), executors([torch.float32, torch.bfloat16]), ids=str)
def test_e6_finite_up_to_1e12(backend: str, dtype: torch.dtype) -> None:
    qkv = (make_qkv(1, 2, 16, 32, 32)[0] * 2e11).to(dtype)
    out, _ = run([qkv], 16, 1e-15, backend)
    truth = reference.relu_linear_attention(qkv.double(), 16)
    verdict = rule_t(out, truth, official_relu_linear_attention(qkv.float(), 16).to(dtype))
    assert verdict.ok, verdict


@pytest.mark.parametrize("scale", [1e-7, 1e-8, 1e-10, 1e-20])
@pytest.mark.parametrize("backend", EXECUTORS)
def test_e9_eps_counts_in_full(backend: str, scale: float) -> None:
    """For tiny q and k the eps of 1e-15 dominates the denominator, in float32 as in float64."""
    qkv = packed()
    part(qkv, "q").mul_(scale)
    part(qkv, "k").mul_(scale)
    out, grads = run([qkv], 16, 1e-15, backend)
    truth, _ = run([qkv.double()], 16, 1e-15, "reference")
    assert (out.double() - truth).abs().max() <= 1e-6 * truth.abs().max()
    assert torch.isfinite(grads[0]).all()


@pytest.mark.parametrize("backend", EXECUTORS)
def test_e10_half_inputs_that_underflow(backend: str) -> None:
    qkv = packed()
    part(qkv, "q").mul_(1e-9)
    out, grads = run([qkv.half()], 16, 1e-15, backend)
    assert not out.any()
    assert not part(grads[0], "k").any()


def mask_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.isnan(x), torch.isposinf(x), torch.isneginf(x)


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(("backend", "dtype"), executors(DTYPES), ids=str)
def test_e11_e12_e13_special_values(backend: str, dtype: torch.dtype, name: str, value: float) -> None:
    """T3: one NaN or inf spreads exactly as the linear formula in float32 spreads it, forward and backward."""
    qkv = packed(batch=2, dtype=dtype)
    part(qkv, name)[0, 1, 3, 5, 2] = value
    out, grads = run([qkv], 16, 1e-15, backend)
    expected, expected_grads = run([qkv.float()], 16, 1e-15, "reference")
    for actual, wanted in zip(mask_of(out), mask_of(expected), strict=True):
        assert torch.equal(actual, wanted)
    assert torch.equal(torch.isfinite(grads[0]), torch.isfinite(expected_grads[0]))
    affected = torch.isnan(out).sum()
    if value != -inf or name == "v":
        assert affected == {"q": 16, "k": 1024, "v": 64}[name]
    else:
        assert affected == 0  # relu turns -inf into 0


@pytest.mark.parametrize("count", range(1, 40))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_every_lane(dtype: torch.dtype, count: int) -> None:
    """A NaN in the last token of rows of every length: no lane of a vector and no tail swallows it."""
    qkv = make_qkv(1, 1, 4, 1, count, dtype=dtype)[0]
    for channel in range(12):
        poisoned = qkv.clone()
        poisoned[0, channel, 0, -1] = nan
        out, grads = run([poisoned], 4, 1e-15, "cpu")
        expected, expected_grads = run([poisoned], 4, 1e-15, "reference")
        assert torch.equal(torch.isnan(out), torch.isnan(expected))
        assert torch.equal(torch.isnan(grads[0]), torch.isnan(expected_grads[0]))


@pytest.mark.parametrize("backend", EXECUTORS)
def test_nan_in_grad_out_stays_in_its_head_and_image(backend: str) -> None:
    qkv = packed(batch=2).to(device_of(backend)).requires_grad_()
    out = relu_linear_attention(qkv, 16, backend=backend)
    grad_out = torch.ones_like(out)
    grad_out[1, 20, 3, 3] = nan
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    assert torch.isfinite(grad[0]).all()
    assert torch.isfinite(grad[1, :48]).all()
    assert torch.isnan(grad[1, 48:]).any()


@pytest.mark.parametrize(("backend", "dtype"), executors([torch.float32, *HALF]), ids=str)
def test_e26_one_tiny_positive_key(backend: str, dtype: torch.dtype) -> None:
    """The official bfloat16 gradient of k cancels catastrophically here; ours may err as float32 does, not more.

    What remains after the cancellation is a few quanta of rounding, so one input compares luck: the largest errors over
    eight inputs are compared.
    """
    worst = {"ours": 0.0, "base": 0.0}
    for seed in range(8):
        qkv = make_qkv(1, 1, 16, 8, 8, dtype=dtype, seed=seed)[0]
        part(qkv, "k").abs_().neg_()
        part(qkv, "k")[0, 0, 3, 4, 4] = 1e-6
        _, grads = run([qkv], 16, 1e-15, backend)
        truth, _ = truth_and_base([qkv], 16, 1e-15)
        leaf = qkv.float().requires_grad_()
        out = official_relu_linear_attention(leaf, 16)
        (base,) = torch.autograd.grad(out, leaf, grad_out_like(out.to(dtype)).float())
        for name, result in (("ours", grads[0]), ("base", base)):
            assert torch.isfinite(result).all()
            worst[name] = max(worst[name], float((result.double() - truth[1]).abs().max()))
    assert worst["ours"] <= 2 * worst["base"], worst


@pytest.mark.parametrize("backend", EXECUTORS)
def test_e27_flush_denormal(backend: str) -> None:
    qkv = packed()
    part(qkv, "q").mul_(1e-20)
    part(qkv, "k").mul_(1e-20)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        out, grads = run([qkv], 16, 1e-15, backend)
        flushing = torch.tensor(1e-39) * 0.5 == 0  # the caller's mode is still on
    finally:
        torch.set_flush_denormal(False)
    assert flushing
    assert torch.isfinite(out).all()
    assert torch.isfinite(grads[0]).all()
    assert torch.tensor(1e-39) * 0.5 != 0


@pytest.mark.parametrize("shape", [(0, 96, 8, 8), (2, 96, 0, 8), (2, 96, 8, 0), (0, 96, 0, 0), (2, 0, 3, 3)])
@pytest.mark.parametrize(("backend", "dtype"), executors(DTYPES), ids=str)
def test_e15_e16_empty_inputs(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        qkv = torch.zeros(shape, dtype=dtype, device=device_of(backend)).contiguous(memory_format=memory_format)
        qkv.requires_grad_()
        out = relu_linear_attention([qkv, qkv], 16, backend=backend)
        assert out.shape == (shape[0], 2 * shape[1] // 3, *shape[2:])
        assert out.dtype == dtype
        (grad,) = torch.autograd.grad(out.sum(), qkv)
        assert grad.shape == qkv.shape


@pytest.mark.parametrize("backend", EXECUTORS)
def test_no_eps(backend: str) -> None:
    """eps = 0 is allowed: 0 / 0 is then NaN, as the formula says."""
    qkv = torch.zeros(1, 48, 4, 4, device=device_of(backend))
    qkv[:, :, 2:] = 1
    out = relu_linear_attention(qkv, 16, eps=0.0, backend=backend)
    assert torch.isnan(out[:, :, :2]).all()
    assert (out[:, :, 2:] == out[0, 0, 2, 0]).all()


@pytest.mark.parametrize("exponent", [-140, -100, -97, -96, -50, 50, 95, 96, 97, 100, 120])
def test_denominators_of_every_magnitude(exponent: int) -> None:
    """The reciprocal is used only where it is exact to an ulp; beyond, a true division: no overflow, no lost value."""
    qkv = torch.ones(1, 12, 2, 3)
    qkv[:, :4] = 2.0 ** (exponent / 2)
    qkv[:, 4:8] = 2.0 ** (exponent / 2)
    out = relu_linear_attention(qkv, 4, eps=0.0, backend="cpu")
    expected = reference.relu_linear_attention(qkv.double(), 4, eps=0.0)
    assert torch.allclose(out.double(), expected, rtol=1e-6, atol=0)


def test_values_next_to_the_input_do_not_matter() -> None:
    """Inputs inside a buffer full of NaN: nothing outside the view is read into the result."""
    for dim, height, width in ((16, 5, 3), (8, 1, 17), (5, 3, 7), (32, 2, 9)):
        qkv = make_qkv(2, 2, dim, height, width)[0]
        guarded = torch.full((2, 6 * dim + 2, height + 2, width + 2), nan)
        view = guarded[:, 1:-1, 1:-1, 1:-1].copy_(qkv)
        assert not view.is_contiguous()
        assert torch.equal(run([view], dim, 1e-15, "cpu")[0], run([qkv], dim, 1e-15, "cpu")[0])
        assert torch.isnan(guarded).sum() == guarded.numel() - qkv.numel()
