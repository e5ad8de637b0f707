"""multiscale_aggregate: rule T over shapes, kernel sizes, dtypes and layouts; integers; the bit promises."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import multiscale_aggregate, reference
from efficientvit_kernels.testing import native_calls, triton_launches
from tests.ops.aggregate_samples import SAMPLES, Sample, judge, run
from tests.ops.block_common import Arguments, assert_all_ok, assert_equal_bits, mapped, results, tensors_of
from tests.ops.common import BACKENDS, DTYPES, HALF, as_layout

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rule_t(backend: str, sample: Sample, dtype: torch.dtype) -> None:
    before = native_calls()
    verdicts = judge(sample.make(dtype), backend)
    assert native_calls() - before == (2 if backend == "cpu" else 0)
    assert_all_ok(verdicts)


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [(torch.float32, 1.5, 1.5), (torch.float16, 2.0, 2.0), (torch.bfloat16, 0.7, 1.0)],
    ids=str,
)
def test_median_error_meets_the_target(dtype: torch.dtype, forward: float, backward: float) -> None:
    """T2: the median over samples of our error against the official convolutions'."""
    ratios: dict[str, list[float]] = {"out": [], "grad": []}
    for sample in SAMPLES:
        if sample.batch and sample.kernels != (1,):
            for name, verdict in judge(sample.make(dtype), "cpu").items():
                ratios["out" if name.startswith("out") else "grad"].append(verdict.ratio)
    assert statistics.median(ratios["out"]) <= forward
    assert statistics.median(ratios["grad"]) <= backward


def integers(arguments: Arguments) -> Arguments:
    """Integers in [-3, 3] in place of every tensor's values."""
    generator = torch.Generator().manual_seed(3)

    def draw(_: str, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.randint(-3, 4, tensor.shape, generator=generator).to(tensor.dtype))

    return mapped(arguments, draw)


INTEGER_SAMPLES = [
    Sample(2, 2, 16, 14, 14, kernels=(5, 3), biases=True),
    Sample(1, 2, 32, 9, 33, kernels=(7,)),
    Sample(2, 1, 8, 31, 17, kernels=(1, 9), layout="channels_last", biases=True),
    Sample(2, 2, 5, 7, 11, kernels=(3, 5, 7), layout="transposed"),
    Sample(3, 1, 24, 2, 3, kernels=(5,), layout="sliced", biases=True),
    Sample(1, 1, 1, 1, 700, kernels=(5,)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", INTEGER_SAMPLES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_are_exact(backend: str, sample: Sample, dtype: torch.dtype) -> None:
    """T5: sums below 2^24 are exact in float32, so every order of summation gives the same bits, rounded once."""
    arguments = integers(sample.make(dtype))
    exact = reference.multiscale_aggregate(**mapped(arguments, lambda _, tensor: tensor.double()))
    for ours, expected in zip(multiscale_aggregate(**arguments, backend=backend), exact, strict=True):
        assert expected.abs().max() < 2**24
        assert torch.equal(ours, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sample", INTEGER_SAMPLES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_integers_are_exact(backend: str, sample: Sample, dtype: torch.dtype) -> None:
    arguments = integers(sample.make(dtype))
    ours, exact = (
        integer_gradients(arguments, wide, lambda b=b, **kwargs: multiscale_aggregate(**kwargs, backend=b))
        for wide, b in ((dtype, backend), (torch.float64, "reference"))
    )
    for name, expected in exact.items():
        assert expected.abs().max() < 2**24, name
        assert torch.equal(ours[name].double(), expected), name


def integer_gradients(arguments: Arguments, dtype: torch.dtype, function: object) -> Arguments:
    leaves = mapped(arguments, lambda _, tensor: tensor.detach().to(dtype).requires_grad_())
    outs = function(**leaves)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(4)
    grad_outs = [torch.randint(-3, 4, out.shape, generator=generator).to(dtype) for out in outs]
    found = tensors_of(leaves)
    return dict(zip(found, torch.autograd.grad(outs, list(found.values()), grad_outs), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sample",
    [
        Sample(3, 2, 16, 14, 14, biases=True),
        Sample(2, 1, 32, 7, 9, kernels=(3, 5)),
        Sample(2, 3, 8, 3, 11, kernels=(7,)),
        Sample(2, 1, 5, 9, 33, kernels=(1, 9), biases=True),
        Sample(2, 1, 40, 1, 70),
    ],
    ids=str,
)
def test_layouts_give_equal_bits(sample: Sample, dtype: torch.dtype) -> None:
    """Of qkv and of the weights."""
    arguments = sample.make(dtype)
    expected = run(arguments, "cpu")
    for layout in ("channels_last", "transposed", "permuted", "sliced", "offset"):
        assert_equal_bits(run(arguments | {"qkv": as_layout(arguments["qkv"], layout)}, "cpu"), expected)
        weights = {
            name: [as_layout(weight, layout) for weight in arguments[name]]
            for name in ("depthwise_weights", "pointwise_weights")
        }
        assert_equal_bits(run(arguments | weights, "cpu"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(9, 7), (1, 1), (1, 5)])
def test_memory_formats(size: tuple[int, int], backend: str) -> None:
    """E21: the outputs and the gradient of qkv have qkv's format, whatever grad_out's is."""
    for layout in ("nchw", "channels_last", "transposed", "sliced"):
        arguments = Sample(2, 2, 8, *size, kernels=(3, 5)).make(torch.float32)
        qkv = as_layout(arguments["qkv"], layout).requires_grad_()
        outs = multiscale_aggregate(**arguments | {"qkv": qkv}, backend=backend)
        wanted = torch.channels_last if layout == "channels_last" and size != (1, 1) else torch.contiguous_format
        assert all(out.is_contiguous(memory_format=wanted) for out in outs)
        (grad,) = torch.autograd.grad(sum(out.sum() for out in outs), qkv)
        if backend == "cpu":  # the reference's is autograd's
            assert grad.is_contiguous(memory_format=wanted)


def test_expanded_batch() -> None:
    """Stride 0 over the batch: the bits of the single image, in every image."""
    arguments = Sample(1, 2, 16, 9, 7, kernels=(3, 5)).make(torch.float32)
    single = multiscale_aggregate(**arguments, backend="cpu")
    arguments["qkv"] = arguments["qkv"].expand(3, -1, -1, -1)
    for out, expected in zip(multiscale_aggregate(**arguments, backend="cpu"), single, strict=True):
        assert torch.equal(out, expected.expand(3, -1, -1, -1))


@pytest.mark.parametrize(
    "sample",
    [
        Sample(2, 4, 16, 14, 14, kernels=(3, 5), biases=True),
        Sample(1, 1, 32, 96, 96),
        Sample(5, 1, 8, 33, 65, kernels=(7,), layout="channels_last", biases=True),
        Sample(1, 1, 4, 1, 3000, kernels=(5,), biases=True),
        Sample(33, 2, 8, 5, 5, kernels=(3,)),
    ],
    ids=str,
)
def test_thread_counts_and_repeats_give_equal_bits(sample: Sample, threads: None) -> None:
    arguments = sample.make(torch.float32)
    torch.set_num_threads(1)
    expected = run(arguments, "cpu")
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        for _ in range(5):
            assert_equal_bits(run(arguments, "cpu"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_images_are_independent(backend: str, dtype: torch.dtype) -> None:
    """E28: what image j holds leaves the bits of the others alone."""
    arguments = Sample(3, 2, 16, 9, 9, kernels=(3, 5), biases=True).make(dtype)
    before = run(arguments, backend)
    changed = arguments["qkv"].clone()
    changed[1] = float("nan")
    after = run(arguments | {"qkv": changed}, backend)
    for name in ("out[0]", "out[1]", "grad_qkv"):
        assert torch.equal(before[name][[0, 2]], after[name][[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_and_scales_are_independent(backend: str) -> None:
    """A scale does not change with the others, nor a group of D channels with those outside it."""
    arguments = Sample(2, 2, 8, 7, 9, kernels=(3, 5)).make(torch.float32)
    together = multiscale_aggregate(**arguments, backend=backend)
    for s in range(2):
        alone = {name: arguments[name][s : s + 1] for name in ("depthwise_weights", "pointwise_weights")}
        assert torch.equal(multiscale_aggregate(**arguments | alone, backend=backend)[0], together[s])
    changed = arguments["qkv"].clone()
    changed[:, 8:16] *= 2  # k of head 0
    for out, expected in zip(
        multiscale_aggregate(**arguments | {"qkv": changed}, backend=backend), together, strict=True
    ):
        assert torch.equal(out[:, 8:16], 2 * expected[:, 8:16])
        assert torch.equal(out[:, :8], expected[:, :8])
        assert torch.equal(out[:, 16:], expected[:, 16:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_image_and_kernel(backend: str) -> None:
    """T6: H and W swapped in the image and in the kernels swaps them in the result."""
    arguments = Sample(2, 2, 8, 7, 12, kernels=(3, 5), biases=True).make(torch.float64)
    swapped = arguments | {
        "qkv": arguments["qkv"].mT.contiguous(),
        "depthwise_weights": [weight.mT.contiguous() for weight in arguments["depthwise_weights"]],
    }
    outs = multiscale_aggregate(**swapped, backend=backend)
    for out, expected in zip(outs, multiscale_aggregate(**arguments, backend=backend), strict=True):
        assert torch.allclose(out.mT, expected, rtol=1e-12, atol=1e-13)


def test_auto_is_the_native_backend() -> None:
    arguments = Sample(1, 2, 16, 8, 8).make(torch.float32)
    before = native_calls()
    found = run(arguments, "auto")
    assert native_calls() - before == 2
    assert_equal_bits(found, run(arguments, "cpu"))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_no_scales(backend: str) -> None:
    before = native_calls()
    assert multiscale_aggregate(torch.zeros(1, 48, 4, 4), [], [], head_dim=16, backend=backend) == []
    assert (
        multiscale_aggregate(torch.zeros(1, 48, 4, 4), (), (), head_dim=16, depthwise_biases=[], pointwise_biases=[])
        == []
    )
    assert native_calls() == before


def test_inputs_are_not_changed() -> None:
    arguments = Sample(2, 2, 16, 7, 9, kernels=(3, 5), biases=True).make(torch.float32)
    copies = mapped(arguments, lambda _, tensor: tensor.clone())
    run(arguments, "cpu")
    assert_equal_bits(tensors_of(arguments), tensors_of(copies))


def test_tuples_are_accepted() -> None:
    arguments = Sample(1, 1, 8, 5, 5, kernels=(3, 5), biases=True).make(torch.float32)
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    for out, expected in zip(multiscale_aggregate(**tuples), multiscale_aggregate(**arguments), strict=True):
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_tensors_take_the_kernels(dtype: torch.dtype) -> None:
    """Named by nobody; float64, which the kernels do not serve, takes the reference."""
    arguments = Sample(2, 2, 16, 9, 7, kernels=(3, 5), biases=True).make(dtype)
    before = triton_launches()
    outs = multiscale_aggregate(**mapped(arguments, lambda _, tensor: tensor.cuda()))
    assert (triton_launches() > before) == (dtype != torch.float64)
    exact = reference.multiscale_aggregate(**mapped(arguments, lambda _, tensor: tensor.double()))
    for out, expected in zip(outs, exact, strict=True):
        assert out.is_cuda
        assert (out.cpu().double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_reference_results_do_not_depend_on_autocast() -> None:
    """E7: the specification keeps its float32 under autocast, forward and backward."""
    arguments = Sample(1, 2, 8, 6, 5, kernels=(3,), biases=True).make(torch.float32)
    expected = results(reference.multiscale_aggregate, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal_bits(results(reference.multiscale_aggregate, arguments), expected)
