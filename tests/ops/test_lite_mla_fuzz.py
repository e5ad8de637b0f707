"""lite_mla on random shapes, kernels, strides, dtypes, epilogues and values: the CPU kernels against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientvit_kernels.testing import rule_t
from tests.ops.block_common import Arguments, in_dtype
from tests.ops.common import DTYPES, LAYOUTS
from tests.ops.fuzzing import EXAMPLES, FUZZ
from tests.ops.lite_mla_samples import Sample, exact, largest_error, run
from tests.ops.rounding import prescribed

pytestmark = pytest.mark.usefixtures("one_thread")

sides = st.one_of(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17]), st.integers(1, 20))
samples = st.builds(
    Sample,
    batch=st.sampled_from([0, 1, 1, 2, 3]),
    in_channels=st.one_of(st.sampled_from([1, 8, 16, 32, 33]), st.integers(1, 40)),
    heads=st.integers(1, 2),
    head_dim=st.one_of(st.sampled_from([1, 4, 8, 16, 24, 32, 33]), st.integers(1, 20)),
    height=sides,
    width=st.one_of(sides, st.sampled_from([31, 32, 33, 64, 65])),
    kernels=st.lists(st.sampled_from([1, 3, 5, 7, 9]), max_size=2).map(tuple),
    extras=st.sets(st.sampled_from(["biases", "scale", "shift", "residual"])).map(
        lambda chosen: " ".join(sorted(chosen))
    ),
    layout=st.sampled_from(LAYOUTS),
    out_channels=st.one_of(st.none(), st.integers(1, 40)),
    eps=st.sampled_from([1e-15, 1e-6, 1e-5, 1e-3]),
)
values = st.sampled_from(
    ["normal", "integers", "repeated", "mixed magnitudes", "sparse", "zeros", "no positive q or k"]
)


def change_values(kind: str, arguments: Arguments, generator: torch.Generator) -> None:
    """Fills x, which may be a view with gaps in memory, with values of another kind."""
    x = arguments["x"]
    x = x[:1] if x.stride(0) == 0 else x  # an expanded batch has one image in memory
    if kind == "integers":
        x.copy_(x.double().mul(1.5).round().clamp(-3, 3))
    elif kind == "repeated":
        x.copy_(x[:, :, :1, :1].expand(x.shape).clone())
    elif kind == "mixed magnitudes":
        exponents = torch.rand(x.shape[:2], generator=generator, dtype=torch.float64)[..., None, None]
        x.copy_(x.double() * 10 ** (exponents * 4 - 2))
    elif kind == "sparse":
        x.copy_(torch.where(x > 1.2, x, 0))
    elif kind == "zeros":
        x.zero_()
    elif kind == "no positive q or k":
        x.abs_()
        arguments["qkv_weight"].abs_().neg_()


@FUZZ
@given(
    sample=samples,
    kind=values,
    dtype=st.sampled_from(DTYPES),
    recompute=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_finite_inputs(sample: Sample, kind: str, dtype: torch.dtype, recompute: bool, seed: int) -> None:
    arguments = sample.make(dtype, seed)
    if sample.batch:
        change_values(kind, arguments, torch.Generator().manual_seed(seed))
    ours, truth = run(arguments, "cpu", recompute), exact(arguments)
    # Ours may err as the exact formula with the prescribed roundings does in a few draws, see tests.ops.rounding. Equal
    # tokens make sums of equal terms, whose roundings all go the same way, and gradients that cancel.
    factor = 1 if kind in ("normal", "mixed magnitudes") else 8
    draws: list[Arguments] = []
    for seeds in (range(2), range(2, 12)):
        draws += [prescribed(arguments, draw) for draw in seeds]
        failed = {}
        for name, result in ours.items():
            verdict = rule_t(result, truth[name], truth[name])
            base = max(largest_error(draw[name], truth[name]) for draw in draws)
            budget = factor * (4 * base + verdict.budget)
            if not (verdict.masks_agree and verdict.error <= budget):
                failed[name] = f"{verdict}, largest error of {len(draws)} draws {base:.3g}"
        if not failed:
            break
    assert not failed, failed


@FUZZ
@given(
    sample=samples,
    dtype=st.sampled_from(DTYPES),
    places=st.lists(st.tuples(st.integers(0, 2**31), st.sampled_from([math.nan, math.inf, -math.inf])), max_size=2),
    seed=st.integers(0, 2**31),
)
def test_special_values(sample: Sample, dtype: torch.dtype, places: list[tuple[int, float]], seed: int) -> None:
    """T3: a pixel that is NaN or inf makes non-finite what the formula in float32 makes so, and nothing else.

    The eps keeps finite gradients in float16's range.
    """
    arguments = replace(sample, eps=1e-2).make(dtype, seed)
    x = arguments["x"]
    for place, value in places:
        if x.numel():
            index = torch.unravel_index(torch.tensor(place % x.numel()), x.shape)
            x[(index[0] * (sample.layout != "expanded"), *index[1:])] = value
    found = run(arguments, "cpu")
    wide = in_dtype(arguments, torch.promote_types(dtype, torch.float32))
    # A tap that lies outside the image for every pixel multiplies a NaN gradient by a padded zero in some of torch's
    # convolutions and not in others: where two of them differ, either will do.
    expected = run(wide, "reference")
    other = run(in_dtype(wide | {"x": x.contiguous()}, torch.float64), "reference")
    for name, result in found.items():
        finite = torch.isfinite(result)
        first, second = (torch.isfinite(reference[name].to(result.dtype)) for reference in (expected, other))
        assert torch.equal(finite, torch.where(first == second, first, finite)), name
    assert torch.equal(torch.isnan(found["out"]), torch.isnan(expected["out"]))


@settings(FUZZ, max_examples=max(20, EXAMPLES // 5))
@given(sample=samples, dtype=st.sampled_from(DTYPES), threads=st.sampled_from([2, 5]), seed=st.integers(0, 2**31))
def test_bits_depend_on_values_alone(sample: Sample, dtype: torch.dtype, threads: int, seed: int) -> None:
    """Any layout, any thread count, qkv saved or computed again: the bits of the contiguous input on one thread."""
    arguments = sample.make(dtype, seed)
    contiguous = {name: arguments[name].contiguous() for name in ("x", "residual") if name in arguments}
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(arguments | contiguous, "cpu")
        torch.set_num_threads(threads)
        found = run(arguments, "cpu", recompute=seed % 2 == 0)
    finally:
        torch.set_num_threads(count)
    different = [name for name, result in expected.items() if not torch.equal(found[name], result)]
    assert not different, different
