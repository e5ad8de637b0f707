"""relu_linear_attention on random shapes, strides, dtypes and values: the CPU kernels against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efficientvit_kernels.testing import ulp
from tests.ops.common import DTYPES, LAYOUTS, as_layout, judge, run, uncancelled_gradients
from tests.ops.fuzzing import EXAMPLES, FUZZ

pytestmark = pytest.mark.usefixtures("one_thread")

head_dims = st.one_of(st.sampled_from([1, 4, 8, 16, 24, 32, 33]), st.integers(1, 70))
sides = st.one_of(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33]), st.integers(1, 40))
shapes = st.tuples(
    st.sampled_from([0, 1, 1, 2, 3, 5]),
    st.integers(1, 3),
    head_dims,
    st.one_of(sides, st.just(0)),
    sides,
    st.integers(1, 3),
)
values = st.sampled_from(
    [
        "normal",
        "integers",
        "no positive k",
        "one-hot",
        "constant",
        "mixed magnitudes",
        "repeated",
        "cancelling v",
        "zeros",
    ]
)
layouts = st.sampled_from(LAYOUTS)


def make_values(kind: str, shape: tuple[int, ...], head_dim: int, generator: torch.Generator) -> Tensor:
    """Float64 qkv [B, heads * 3 * head_dim, H, W] of one kind."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    heads = x.unflatten(1, (shape[1] // (3 * head_dim), 3 * head_dim))
    if kind == "integers":
        return x.mul_(1.5).round_().clamp_(-3, 3)
    if kind == "no positive k":
        heads[:, :, head_dim : 2 * head_dim].abs_().neg_()
    elif kind == "one-hot":
        return (x > 1.5).double()
    elif kind == "constant":
        x.fill_(0.75)
    elif kind == "mixed magnitudes":
        exponents = torch.rand(shape[:2], generator=generator, dtype=torch.float64)[..., None, None]
        x.mul_(10 ** (exponents * 6 - 3))
    elif kind == "repeated":
        x.copy_(x[:, :, :1, :1].expand(shape) if x.numel() else x)
    elif kind == "cancelling v":
        v = heads[:, :, 2 * head_dim :]
        v[..., ::2].abs_().mul_(1e3)
        v[..., 1::2].abs_().mul_(-1e3)
    elif kind == "zeros":
        x.zero_()
    return x


@FUZZ
@given(
    shape=shapes,
    kind=values,
    layout=layouts,
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([1e-15, 1e-6, 1e-5, 1e-3]),
    seed=st.integers(0, 2**31),
)
def test_finite_inputs(
    shape: tuple[int, ...], kind: str, layout: str, dtype: torch.dtype, eps: float, seed: int
) -> None:
    batch, heads, head_dim, height, width, scales = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = [
        as_layout(
            make_values(kind, (batch, heads * 3 * head_dim, height, width), head_dim, generator).to(dtype), layout
        )
        for _ in range(scales)
    ]
    if qkv[0].numel() == 0:
        out, grads = run(qkv, head_dim, eps, "cpu")
        assert out.shape == (batch, scales * heads * head_dim, height, width)
        assert all(grad.shape == tensor.shape for grad, tensor in zip(grads, qkv, strict=True))
        return
    # In float64 the truth itself, computed by torch in float64, has rounding errors of its own. Equal tokens make a sum
    # of equal terms, whose roundings all go the same way: up to half the 64 terms that a tile adds one after another.
    factor = 32 if kind == "repeated" else 8 if dtype == torch.float64 else 4
    rounding = factor * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    sizes = [float(qkv[0].double().abs().max()), *uncancelled_gradients(qkv, head_dim, eps)]
    for (name, verdict), size in zip(judge(qkv, head_dim, eps, "cpu").items(), sizes, strict=True):
        # Twice the official formula's error, which may be lucky; else what rounding makes of the largest term.
        assert verdict.masks_agree, (name, str(verdict))
        assert verdict.ok or verdict.error <= rounding * size + 2 * ulp(dtype, verdict.largest), (
            name,
            str(verdict),
            size,
        )


@FUZZ
@given(
    shape=shapes,
    layout=layouts,
    dtype=st.sampled_from(DTYPES),
    places=st.lists(
        st.tuples(st.integers(0, 2**31), st.sampled_from([float("nan"), float("inf"), -float("inf")])), max_size=3
    ),
    seed=st.integers(0, 2**31),
)
def test_special_values(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, places: list[tuple[int, float]], seed: int
) -> None:
    """T3: NaN and inf come out where the formula in float32 puts them, and nowhere else."""
    batch, heads, head_dim, height, width, _ = shape
    generator = torch.Generator().manual_seed(seed)
    x = make_values("normal", (batch, heads * 3 * head_dim, height, width), head_dim, generator).to(dtype)
    for place, value in places:
        if x.numel():
            x.view(-1)[place % x.numel()] = value
    qkv = as_layout(x, layout)
    out, grads = run([qkv], head_dim, 1e-15, "cpu")
    wide = torch.promote_types(dtype, torch.float32)
    expected, expected_grads = run([qkv.to(wide)], head_dim, 1e-15, "reference")
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(out), kind(expected))
    assert torch.equal(torch.isfinite(grads[0]), torch.isfinite(expected_grads[0].to(dtype)))


@pytest.mark.parametrize("threads", [1, 2, 5])
@settings(FUZZ, max_examples=max(20, EXAMPLES // 10))
@given(shape=shapes, layout=layouts, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_bits_depend_on_values_alone(
    threads: int, shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int
) -> None:
    """Any layout, any thread count: the bits of the contiguous input on one thread."""
    batch, heads, head_dim, height, width, _ = shape
    generator = torch.Generator().manual_seed(seed)
    x = make_values("normal", (batch, heads * 3 * head_dim, height, width), head_dim, generator).to(dtype)
    if layout == "expanded":
        x = x[:1].expand(x.shape).contiguous() if batch else x
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected, expected_grads = run([x], head_dim, 1e-15, "cpu")
        torch.set_num_threads(threads)
        out, grads = run([as_layout(x, layout)], head_dim, 1e-15, "cpu")
    finally:
        torch.set_num_threads(count)
    assert torch.equal(out, expected)
    assert torch.equal(grads[0], expected_grads[0])
