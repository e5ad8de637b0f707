"""multiscale_aggregate on random shapes, kernels, strides, dtypes and values: the CPU kernels against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efficientvit_kernels import reference
from efficientvit_kernels.testing import rule_t, ulp
from tests.ops.aggregate_samples import Sample, exact, judge, run
from tests.ops.block_common import Arguments, in_dtype, mapped, results
from tests.ops.common import DTYPES, LAYOUTS
from tests.ops.fuzzing import EXAMPLES, FUZZ

pytestmark = pytest.mark.usefixtures("one_thread")


sides = st.one_of(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17]), st.integers(1, 20))
samples = st.builds(
    Sample,
    batch=st.sampled_from([0, 1, 1, 2, 3]),
    heads=st.integers(1, 2),
    head_dim=st.one_of(st.sampled_from([1, 4, 8, 16, 24, 32, 33]), st.integers(1, 20)),
    height=st.one_of(sides, st.just(0)),
    width=st.one_of(sides, st.sampled_from([0, 31, 32, 33, 64, 65])),
    kernels=st.lists(st.sampled_from([1, 3, 5, 7, 9]), min_size=1, max_size=2).map(tuple),
    layout=st.sampled_from(LAYOUTS),
    biases=st.booleans(),
)
values = st.sampled_from(["normal", "integers", "constant", "mixed magnitudes", "cancelling", "sparse", "zeros"])


def change_values(kind: str, arguments: Arguments, seed: int) -> None:
    """Fills the tensors, which may be views with gaps in memory, with values of one kind."""
    generator = torch.Generator().manual_seed(seed)

    def change(_: str, tensor: Tensor) -> Tensor:
        x = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if kind == "integers":
            x = x.mul(1.5).round().clamp(-3, 3)
        elif kind == "constant":
            x = torch.full_like(x, 0.75)
        elif kind == "mixed magnitudes":
            exponents = torch.rand(x.shape[:2], generator=generator, dtype=torch.float64)
            x = x * (10 ** (exponents * 4 - 2)).reshape(*x.shape[:2], *[1] * (x.dim() - 2))
        elif kind == "cancelling":
            x = torch.where(torch.arange(x.shape[-1]) % 2 == 0, x.abs(), -x.abs()) * 30
        elif kind == "sparse":
            x = torch.where(x > 1.2, x, 0)
        elif kind == "zeros":
            x = torch.zeros_like(x)
        # An expanded batch has one image in memory.
        writable = tensor[:1] if tensor.dim() == 4 and tensor.stride(0) == 0 else tensor
        return writable.copy_(x[: writable.shape[0]])

    if kind != "normal" and arguments["qkv"].shape[0]:
        mapped(arguments, change)


@FUZZ
@given(sample=samples, kind=values, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_finite_inputs(sample: Sample, kind: str, dtype: torch.dtype, seed: int) -> None:
    arguments = sample.make(dtype, seed)
    change_values(kind, arguments, seed)
    if arguments["qkv"].numel() == 0:
        found = run(arguments, "cpu")
        assert not any(result.any() or torch.isnan(result).any() for result in found.values())
        return
    ours, truth = run(arguments, "cpu"), exact(arguments)
    rounding = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    sizes = largest_terms(arguments)
    doubtful = []
    for name, result in ours.items():
        verdict = rule_t(result, truth[name], truth[name])
        assert verdict.masks_agree, (name, str(verdict))
        # What rounding makes of the sum if nothing cancels; where that is not enough, the official convolutions decide.
        # They come second because every new shape costs them 100 ms and more.
        if not verdict.error <= 4 * rounding * sizes[name] + 2 * ulp(dtype, verdict.largest):
            doubtful.append(name)
    if doubtful:
        verdicts = judge(arguments, "cpu")
        assert all(verdicts[name].ok for name in doubtful), {name: str(verdicts[name]) for name in doubtful}


def largest_terms(arguments: Arguments) -> dict[str, float]:
    """Per result, its largest value if nothing cancelled: the formula with the absolute value of everything."""
    positive = mapped(in_dtype(arguments, torch.float64), lambda _, tensor: tensor.abs())
    found = results(
        lambda **kwargs: [_Absolute.apply(out) for out in reference.multiscale_aggregate(**kwargs)], positive
    )
    return {name: float(result.max()) for name, result in found.items()}


def _absolute_aggregate(**kwargs: Any) -> list[Tensor]:
    return [_Absolute.apply(out) for out in reference.multiscale_aggregate(**kwargs)]


class _Absolute(torch.autograd.Function):
    """The identity, with the absolute value of its gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.abs()


@FUZZ
@given(
    sample=samples,
    dtype=st.sampled_from(DTYPES),
    places=st.lists(
        st.tuples(st.integers(0, 2**31), st.sampled_from([float("nan"), float("inf"), -float("inf")])), max_size=3
    ),
    seed=st.integers(0, 2**31),
)
def test_special_values(sample: Sample, dtype: torch.dtype, places: list[tuple[int, float]], seed: int) -> None:
    """T3: NaN and inf pixels come out where the formula in float32 puts them, and nowhere else."""
    arguments = sample.make(dtype, seed)
    for place, value in places:
        if arguments["qkv"].numel():
            index = torch.unravel_index(torch.tensor(place % arguments["qkv"].numel()), arguments["qkv"].shape)
            arguments["qkv"][(index[0] * (sample.layout != "expanded"), *index[1:])] = value
    found = run(arguments, "cpu")
    expected = run(in_dtype(arguments, torch.promote_types(dtype, torch.float32)), "reference")
    for name, result in found.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            if name.startswith("out"):
                assert torch.equal(kind(result), kind(expected[name].to(dtype))), name
        assert torch.equal(torch.isfinite(result), torch.isfinite(expected[name].to(dtype))), name


@settings(FUZZ, max_examples=max(20, EXAMPLES // 5))
@given(sample=samples, dtype=st.sampled_from(DTYPES), threads=st.sampled_from([2, 5]), seed=st.integers(0, 2**31))
def test_bits_depend_on_values_alone(sample: Sample, dtype: torch.dtype, threads: int, seed: int) -> None:
    """Any layout, any thread count: the bits of the contiguous input on one thread."""
    arguments = sample.make(dtype, seed)
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(arguments | {"qkv": arguments["qkv"].contiguous()}, "cpu")
        torch.set_num_threads(threads)
        found = run(arguments, "cpu")
    finally:
        torch.set_num_threads(count)
    assert all(torch.equal(found[name], result) for name, result in expected.items())
