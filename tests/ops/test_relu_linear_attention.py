"""relu_linear_attention: rule T over shapes, dtypes and layouts; the bit promises; the laws that need no oracle."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import reference, relu_linear_attention
from efficientvit_kernels.testing import Verdict, make_qkv, native_calls
from tests.ops.common import (
    BACKENDS,
    DTYPES,
    EXECUTORS,
    SAMPLES,
    Sample,
    as_layout,
    device_of,
    executors,
    grad_out_like,
    judge,
    run,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ops = torch.ops.efficientvit_kernels


def accepted(verdict: Verdict, backend: str, dtype: torch.dtype) -> bool:
    """Rule T; for the float32 specification, also 2e-5 of the largest value.

    Its gradients are autograd's, as the official ones are. One token with a tiny denominator dominates the error of
    both, with either sign: twice the other's error compares two draws of luck (measured: ratios from 0.06 to 7.7).
    """
    lenient = backend == "reference" and dtype == torch.float32
    return verdict.ok or (lenient and verdict.masks_agree and verdict.error <= 2e-5 * verdict.largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rule_t(backend: str, sample: Sample, dtype: torch.dtype) -> None:
    before = native_calls()
    verdicts = judge(sample.make(dtype), sample.head_dim, sample.eps, backend)
    assert all(accepted(verdict, backend, dtype) for verdict in verdicts.values()), {
        n: str(v) for n, v in verdicts.items()
    }
    assert native_calls() - before == (2 if backend == "cpu" else 0)


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [(torch.float32, 1.5, 1.5), (torch.float16, 2.0, 2.0), (torch.bfloat16, 0.7, 1.0)],
    ids=str,
)
def test_median_error_meets_the_target(dtype: torch.dtype, forward: float, backward: float) -> None:
    """T2: the median over samples of our error against the official formula's."""
    ratios: dict[str, list[float]] = {"out": [], "grad": []}
    for sample in SAMPLES:
        if sample.tokens > sample.head_dim:
            for name, verdict in judge(sample.make(dtype), sample.head_dim, sample.eps, "cpu").items():
                ratios["out" if name == "out" else "grad"].append(verdict.ratio)
    assert statistics.median(ratios["out"]) <= forward
    assert statistics.median(ratios["grad"]) <= backward


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "height", "width"), [(16, 14, 14), (32, 9, 33), (8, 64, 64), (5, 7, 11), (65, 5, 5)]
)
def test_integers_give_the_exact_state(head_dim: int, height: int, width: int, dtype: torch.dtype) -> None:
    """T5: sums below 2^24 are exact in float32, so every order of summation gives the same state."""
    qkv = integers(2, 2 * 3 * head_dim, height, width)
    _, state = ops.relu_linear_attention_fwd([qkv.to(dtype)], head_dim, 1e-15)
    _, k, v = qkv.reshape(2, 2, 3 * head_dim, -1).split(head_dim, dim=2)
    k = k.clamp(min=0)
    expected = torch.cat([v @ k.transpose(-1, -2), k.sum(-1).unsqueeze(2)], dim=2)
    assert int(expected.abs().max()) < 2**24
    assert torch.equal(state, expected.to(state.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_give_two_where_v_is_two(dtype: torch.dtype) -> None:
    """With v = 2 everywhere, num = 2 den in exact integers: out is 2 up to one ulp, or 0 where den is 0."""
    qkv = integers(2, 2 * 48, 13, 9)
    qkv[:, 32:48] = 2
    qkv[:, 80:] = 2
    out = relu_linear_attention(qkv.to(dtype), 16, backend="cpu")
    q, k, _ = qkv.reshape(2, 2, 48, -1).clamp(min=0).split(16, dim=2)
    den = (k.sum(-1, keepdim=True).transpose(-1, -2) @ q).expand(-1, -1, 16, -1).reshape(out.shape)
    expected = torch.where(den > 0, 2, 0).to(dtype)
    assert torch.equal(out == 0, den == 0)
    assert torch.allclose(out, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "height", "width"), [(16, 14, 14), (32, 7, 9), (8, 3, 11), (5, 9, 33), (40, 1, 70)]
)
def test_layouts_give_equal_bits(head_dim: int, height: int, width: int, dtype: torch.dtype) -> None:
    qkv = make_qkv(3, 2, head_dim, height, width, dtype=dtype)[0]
    expected_out, expected_grads = run([qkv], head_dim, 1e-15, "cpu")
    for layout in ("nchw", "channels_last", "sliced", "transposed", "permuted"):
        out, grads = run([as_layout(qkv, layout)], head_dim, 1e-15, "cpu")
        assert torch.equal(out, expected_out), layout
        assert torch.equal(grads[0], expected_grads[0]), layout
        is_channels_last = layout == "channels_last" and height * width > 1
        assert out.is_contiguous(memory_format=torch.channels_last) or not is_channels_last


def test_expanded_and_offset_inputs() -> None:
    """Stride 0 over the batch, and a pointer that is not aligned to the vector width: the same bits."""
    qkv = make_qkv(1, 2, 16, 9, 7)[0]
    expected, _ = run([qkv], 16, 1e-15, "cpu")
    out, grads = run([qkv.expand(3, -1, -1, -1)], 16, 1e-15, "cpu")
    assert torch.equal(out, expected.expand(3, -1, -1, -1))
    assert grads[0].shape == (3, *qkv.shape[1:])
    for offset in range(1, 8):
        buffer = torch.full((qkv.numel() + offset,), float("nan"))
        shifted = buffer[offset:].view(qkv.shape).copy_(qkv)
        assert torch.equal(run([shifted], 16, 1e-15, "cpu")[0], expected), offset


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("heads", "head_dim", "size"), [(1, 32, 96), (4, 16, 14), (1, 8, 301), (70, 8, 5)])
def test_thread_counts_give_equal_bits(heads: int, head_dim: int, size: int, layout: str, threads: None) -> None:
    qkv = make_qkv(2, heads, head_dim, size, size, scales=2, layout=layout)
    results = []
    for count in (1, 2, 8):
        torch.set_num_threads(count)
        out, grads = run(qkv, head_dim, 1e-15, "cpu")
        results.append([out, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_repeats_give_equal_bits() -> None:
    qkv = make_qkv(2, 3, 16, 33, 31, scales=2)
    first = run(qkv, 16, 1e-15, "cpu")
    for _ in range(50):
        out, grads = run(qkv, 16, 1e-15, "cpu")
        assert torch.equal(out, first[0])
        assert all(torch.equal(a, b) for a, b in zip(grads, first[1], strict=True))


@pytest.mark.parametrize("backend", EXECUTORS)
def test_images_heads_and_scales_are_independent(backend: str) -> None:
    """E28: what image, head or scale j holds leaves the bits of the others alone."""
    qkv = make_qkv(3, 2, 16, 9, 9, scales=2)
    out, grads = run(qkv, 16, 1e-15, backend)
    changed = [tensor.clone() for tensor in qkv]
    changed[0][1] = 1e3  # image 1 of scale 0
    changed[1][:, 48:] = float("nan")  # head 1 of scale 1
    out2, grads2 = run(changed, 16, 1e-15, backend)
    untouched = torch.ones(3, 64, 9, 9, dtype=torch.bool)
    untouched[1, :32] = False
    untouched[:, 48:] = False
    assert torch.equal(out[untouched], out2[untouched])
    assert torch.equal(grads[0][[0, 2]], grads2[0][[0, 2]])
    assert torch.equal(grads[1][:, :48], grads2[1][:, :48])


@pytest.mark.parametrize(("backend", "dtype"), executors([torch.float32, torch.bfloat16]), ids=str)
def test_laws(backend: str, dtype: torch.dtype) -> None:
    """T6: laws of the formula that hold without an oracle."""
    qkv = make_qkv(2, 2, 16, 8, 9, dtype=dtype)[0].to(device_of(backend))
    packed = qkv.reshape(2, 2, 48, 72)

    def attend(x: Tensor) -> Tensor:
        return relu_linear_attention(x.reshape(2, 96, 8, -1), 16, backend=backend).reshape(2, 2, 16, -1)

    out = attend(packed)
    slack = 4 * torch.finfo(dtype).eps * float(packed.abs().max())
    # Inside the hull of v and 0: a weighted mean, of weights that sum to one or to zero.
    v = packed[:, :, 32:]
    assert (out <= v.amax(-1, keepdim=True).clamp(min=0) + slack).all()
    assert (out >= v.amin(-1, keepdim=True).clamp(max=0) - slack).all()
    # Scaling q per token, or all k, by a power of two cancels: equal bits.
    scaled = packed.clone()
    scaled[:, :, :16] *= 2.0 ** torch.randint(-3, 4, (2, 2, 1, 72)).to(qkv)
    scaled[:, :, 16:32] *= 4
    assert torch.equal(attend(scaled), out)
    # Scaling v by a power of two scales the output exactly.
    scaled = packed.clone()
    scaled[:, :, 32:] *= -8
    assert torch.equal(attend(scaled), -8 * out)
    # Permuting the tokens permutes the output; duplicating all of them changes nothing but the order of sums.
    order = torch.randperm(72)
    assert torch.allclose(attend(packed[..., order]), out[..., order], atol=slack, rtol=0)
    assert torch.allclose(attend(packed.repeat(1, 1, 1, 2))[..., :72], out, atol=slack, rtol=0)
    # A constant v comes out unchanged.
    constant = packed.clone()
    constant[:, :, 32:] = 0.375
    assert torch.allclose(attend(constant), torch.full_like(out, 0.375), atol=slack, rtol=0)


def test_tensor_and_sequence_agree() -> None:
    first, second = make_qkv(2, 3, 8, 6, 5, scales=2)
    single = relu_linear_attention(first, 8)
    assert torch.equal(single, relu_linear_attention([first], 8))
    assert torch.equal(
        torch.cat([single, relu_linear_attention(second, 8)], 1), relu_linear_attention((first, second), 8)
    )


def test_scales_may_differ_in_strides() -> None:
    first, second = make_qkv(2, 3, 8, 6, 5, scales=2)
    expected, expected_grads = run([first, second], 8, 1e-15, "cpu")
    out, grads = run([first, as_layout(second, "channels_last")], 8, 1e-15, "cpu")
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    assert grads[1].is_contiguous(memory_format=torch.channels_last)


def test_a_million_tokens() -> None:
    qkv = make_qkv(1, 1, 2, 1024, 1024)
    out, grads = run(qkv, 2, 1e-15, "cpu")
    expected = reference.relu_linear_attention([t.double() for t in qkv], 2)
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(grads[0]).all()


def test_auto_is_the_native_backend() -> None:
    """`auto` must not quietly run the reference where the CPU kernels are built."""
    qkv = make_qkv(1, 2, 16, 8, 8)
    before = native_calls()
    out, grads = run(qkv, 16, 1e-15, "auto")
    assert native_calls() - before == 2
    named, named_grads = run(qkv, 16, 1e-15, "cpu")
    assert torch.equal(out, named)
    assert torch.equal(grads[0], named_grads[0])


def test_inputs_are_not_changed() -> None:
    qkv = make_qkv(2, 2, 16, 7, 9, scales=2)
    copies = [tensor.clone() for tensor in qkv]
    out, _ = run(qkv, 16, 1e-15, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(qkv, copies, strict=True))
    grad_out = grad_out_like(out)
    assert torch.equal(grad_out, grad_out_like(out))
