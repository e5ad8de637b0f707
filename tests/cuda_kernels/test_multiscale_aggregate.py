"""The CUDA kernels of multiscale_aggregate: rule T, exact integers, determinism, layouts, thread orders.

In the emulator where there is no GPU. Edge cases and laws are in tests/ops.
"""

from __future__ import annotations

import statistics

import pytest
import torch

from efficientvit_kernels import multiscale_aggregate, reference
from efficientvit_kernels.ops import _cuda_lite_mla
from efficientvit_kernels.ops._backends import CUDA_HEAD_DIMS, CUDA_KERNEL_SIZES, registered
from tests.cuda_emulator.ops import cuda_calls
from tests.ops.aggregate_samples import SAMPLES, Sample, judge, run
from tests.ops.block_common import assert_all_ok, assert_equal_bits, mapped, on_device
from tests.ops.common import HALF, as_layout
from tests.ops.test_multiscale_aggregate import integer_gradients, integers

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("backend", ["cuda"])]
DTYPES = [torch.float32, *HALF]


def served(sample: Sample) -> bool:
    small = sample.batch * sample.heads * sample.head_dim * sample.height * sample.width * len(sample.kernels) <= 40000
    return sample.head_dim in CUDA_HEAD_DIMS and set(sample.kernels) <= set(CUDA_KERNEL_SIZES) and small


SMALL = [sample for sample in SAMPLES if served(sample)]
WIDE = [
    *(Sample(2, 1, d, 9, 10, kernels=(k,), biases=d == k + 3) for d in CUDA_HEAD_DIMS for k in CUDA_KERNEL_SIZES),
    Sample(2, 1, 16, 20, 40, kernels=(5,)),  # rows aligned to 16 bytes, several tiles in both directions
    Sample(1, 1, 16, 35, 18, kernels=(7, 3), layout="channels_last", biases=True),
    Sample(1, 1, 64, 17, 24, kernels=(5,), layout="channels_last"),
    Sample(2, 1, 64, 8, 8, kernels=(3,), biases=True),
    Sample(9, 1, 8, 33, 17, kernels=(3,)),  # more tiles than runs
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", [*SMALL, *WIDE], ids=str)
def test_rule_t(backend: str, sample: Sample, dtype: torch.dtype) -> None:
    before = cuda_calls()
    assert_all_ok(judge(sample.make(dtype), backend))
    assert cuda_calls() - before == 2


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [(torch.float32, 1.5, 1.5), (torch.float16, 2.0, 2.0), (torch.bfloat16, 0.7, 1.0)],
    ids=str,
)
def test_median_error_meets_the_target(backend: str, dtype: torch.dtype, forward: float, backward: float) -> None:
    """T2: the median over samples of our error against the official convolutions'."""
    ratios: dict[str, list[float]] = {"out": [], "grad": []}
    for sample in [*SMALL, *WIDE]:
        if sample.batch:
            for name, verdict in judge(sample.make(dtype), backend).items():
                ratios["out" if name.startswith("out") else "grad"].append(verdict.ratio)
    assert len(ratios["out"]) > 20
    assert statistics.median(ratios["out"]) <= forward
    assert statistics.median(ratios["grad"]) <= backward


INTEGERS = [
    Sample(2, 2, 16, 14, 14, kernels=(5, 3), biases=True),
    Sample(1, 2, 32, 9, 33, kernels=(7,)),
    Sample(1, 1, 64, 9, 16, kernels=(3,), layout="channels_last", biases=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", INTEGERS, ids=str)
def test_integers_are_exact(backend: str, sample: Sample, dtype: torch.dtype) -> None:
    """T5: sums below 2^24 are exact in float32, and those that enter the matrix units are below 2^11."""
    arguments = integers(sample.make(dtype))
    exact = reference.multiscale_aggregate(**mapped(arguments, lambda _, tensor: tensor.double()))
    placed = on_device(arguments, backend)
    for ours, expected in zip(multiscale_aggregate(**placed, backend=backend), exact, strict=True):
        assert expected.abs().max() < 2**24
        assert torch.equal(ours.cpu(), expected.to(dtype))


@pytest.mark.parametrize("sample", INTEGERS, ids=str)
def test_gradients_of_integers_are_exact(backend: str, sample: Sample) -> None:
    arguments = on_device(integers(sample.make(torch.float32)), backend)
    ours, exact = (
        integer_gradients(arguments, dtype, lambda b=name, **kwargs: multiscale_aggregate(**kwargs, backend=b))
        for dtype, name in ((torch.float32, backend), (torch.float64, "reference"))
    )
    for name, expected in exact.items():
        assert expected.abs().max() < 2**24, name
        assert torch.equal(ours[name].double(), expected), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", CUDA_HEAD_DIMS)
def test_layouts_and_repeats_give_equal_bits(backend: str, head_dim: int, dtype: torch.dtype) -> None:
    arguments = Sample(2, 1, head_dim, 6, 16, kernels=(3, 5), biases=True).make(dtype)
    expected = run(arguments, backend)
    for layout in ("nchw", "channels_last", "transposed", "sliced", "offset"):
        assert_equal_bits(run(arguments | {"qkv": as_layout(arguments["qkv"], layout)}, backend), expected)
    weights = {
        name: [as_layout(weight, "transposed") for weight in arguments[name]]
        for name in ("depthwise_weights", "pointwise_weights")
    }
    assert_equal_bits(run(arguments | weights, backend), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU orders its threads itself")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_orders_of_threads_and_blocks_give_equal_bits(
    backend: str, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = Sample(2, 1, head_dim, 18, 17, kernels=(5,), biases=True).make(dtype)
    expected = run(arguments, backend)
    for order in ("reverse", "random"):
        monkeypatch.setenv("EVK_EMULATOR_ORDER", order)
        assert_equal_bits(run(arguments, backend), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_is_needed(backend: str, dtype: torch.dtype) -> None:
    """Every part of the backward alone has the bits that it has with the others."""
    arguments = Sample(2, 1, 16, 7, 9, kernels=(3, 5), biases=True).make(dtype)
    placed = on_device(arguments, backend)
    generator = torch.Generator().manual_seed(1)
    shape = arguments["qkv"].shape
    grads = [torch.randn(shape, generator=generator).to(placed["qkv"]) for _ in range(2)]
    names = ("qkv", "depthwise_weights", "pointwise_weights", "depthwise_biases", "head_dim")
    call = registered("multiscale_aggregate", "bwd", backend)
    everything = call(grads, *(placed[name] for name in names), True, True, True)
    qkv = call(grads, *(placed[name] for name in names), True, False, False)
    weights = call(grads, *(placed[name] for name in names), False, True, False)
    biases = call(grads, *(placed[name] for name in names), False, False, True)
    assert len(everything) == 9
    for ours, expected in zip([*qkv, *weights, *biases], everything, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_are_independent(backend: str, dtype: torch.dtype) -> None:
    """E28, and NaN beyond the end of an image: what image j holds leaves the bits of the others alone."""
    arguments = Sample(3, 2, 16, 9, 9, kernels=(3, 5), biases=True).make(dtype)
    before = run(arguments, backend)
    changed = arguments["qkv"].clone()
    changed[1] = float("nan")
    after = run(arguments | {"qkv": changed}, backend)
    for name in ("out[0]", "out[1]", "grad_qkv"):
        assert torch.equal(before[name][[0, 2]], after[name][[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_one_pixel_reaches_its_neighbourhood_alone(backend: str, dtype: torch.dtype, value: float, layout: str) -> None:
    """T3: forward, and the gradients of the taps, whose pixels beyond the image are none."""
    arguments = Sample(1, 1, 16, 7, 11, kernels=(5,)).make(dtype)
    arguments["qkv"][0, 3, 0, 10] = value
    arguments["qkv"] = as_layout(arguments["qkv"], layout)
    ours, expected = run(arguments, backend), run(arguments, "reference")
    for name in ("out[0]", "grad_depthwise_weights[0]", "grad_qkv"):
        assert torch.equal(ours[name].isnan(), expected[name].isnan()), name
        assert torch.equal(ours[name].isinf(), expected[name].isinf()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "offset"])
@pytest.mark.parametrize(
    "sample", [Sample(2, 1, 16, 9, 24, kernels=(5,)), Sample(2, 1, 8, 7, 9, kernels=(3, 7))], ids=str
)
def test_gradient_added_to_what_is_there(backend: str, sample: Sample, layout: str, dtype: torch.dtype) -> None:
    """Rounded once: with float32 sums that are known, the bits are those of their rounded sum."""
    arguments = integers(sample.make(dtype))
    placed = on_device(arguments, backend)
    generator = torch.Generator().manual_seed(1)
    shape = arguments["qkv"].shape
    grads = [torch.randint(-2, 3, shape, generator=generator).to(placed["qkv"]) for _ in sample.kernels]
    held = torch.randn(shape, generator=generator).to(dtype)
    names = ("qkv", "depthwise_weights", "pointwise_weights")
    rest = ([], sample.head_dim)

    def in_float(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        return value.float() if isinstance(value, torch.Tensor) else [tensor.float() for tensor in value]

    whole = [in_float(grads), *(in_float(placed[name]) for name in names)]
    grad_qkv = registered("multiscale_aggregate", "bwd", backend)(*whole, *rest, True, False, False)[0]
    found = as_layout(held.clone(), layout).to(placed["qkv"].device)
    ops = _cuda_lite_mla._native_ops()
    weights = ops.multiscale_aggregate_bwd_add(grads, *(placed[name] for name in names), *rest, True, False, found)
    assert torch.equal(found.cpu(), (grad_qkv.cpu() + held.float()).to(dtype))
    expected = registered("multiscale_aggregate", "bwd", backend)(
        grads, *(placed[name] for name in names), *rest, False, True, False
    )
    for ours, theirs in zip(weights, expected, strict=True):
        assert torch.equal(ours, theirs)
