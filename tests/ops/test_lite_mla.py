"""lite_mla: rule T over shapes, kernels, epilogues, dtypes and layouts; exact cases; the bit promises."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import lite_mla, multiscale_aggregate, reference, relu_linear_attention
from efficientvit_kernels.testing import native_calls, official_lite_mla, rule_t, triton_launches
from tests.ops.block_common import assert_all_ok, assert_equal_bits, in_dtype, mapped, on_device, results, tensors_of
from tests.ops.common import BACKENDS, DTYPES, HALF, NATIVE, as_layout, device_of, executors
from tests.ops.lite_mla_samples import ALL, SAMPLES, Sample, dtypes_are_kept, exact, judge, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rule_t(backend: str, sample: Sample, dtype: torch.dtype) -> None:
    arguments = sample.make(dtype)
    before = native_calls()
    verdicts = judge(arguments, backend)
    assert native_calls() - before == (2 if backend == "cpu" else 0)
    assert_all_ok(verdicts)
    assert dtypes_are_kept(arguments, run(arguments, backend))


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    # bfloat16 forward: the roundings of qkv and of y are in the contract, the official formula's others are not.
    [(torch.float32, 1.5, 1.5), (torch.float16, 2.0, 2.0), (torch.bfloat16, 0.8, 1.0)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_median_error_meets_the_target(backend: str, dtype: torch.dtype, forward: float, backward: float) -> None:
    """T2: the median over samples of our error against the official formula's."""
    ratios: dict[str, list[float]] = {"out": [], "grad": []}
    for sample in SAMPLES:
        if sample.tokens > sample.head_dim:
            arguments = sample.make(dtype)
            ours, truth, base = run(arguments, backend), exact(arguments), results(official_lite_mla, arguments)
            for name, result in ours.items():
                ratio = rule_t(result, truth[name], base[name]).ratio
                ratios["out" if name == "out" else "grad"].append(ratio)
    assert statistics.median(ratios["out"]) <= forward
    assert statistics.median(ratios["grad"]) <= backward


SHAPES = [
    Sample(3, 32, 2, 16, 14, 14, (3, 5), ALL),
    Sample(2, 24, 1, 32, 7, 9, (5,), "scale shift residual", out_channels=40),
    Sample(2, 17, 3, 8, 3, 11, (7,), "biases"),
    Sample(2, 9, 1, 5, 9, 33, (1, 9), ALL, out_channels=7),
    Sample(2, 40, 1, 40, 1, 70, (), "shift"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SHAPES, ids=str)
def test_recompute_gives_equal_bits(sample: Sample, dtype: torch.dtype) -> None:
    """qkv and the state, computed again in the backward, are those of the forward."""
    arguments = sample.make(dtype)
    assert_equal_bits(run(arguments, "cpu", recompute=True), run(arguments, "cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SHAPES, ids=str)
def test_layouts_give_equal_bits(sample: Sample, dtype: torch.dtype) -> None:
    """Of x, the residual and the weights; those of the vectors too."""
    arguments = sample.make(dtype)
    expected = run(arguments, "cpu")
    for layout in ("channels_last", "transposed", "permuted", "sliced", "offset"):
        assert_equal_bits(run(arguments | {"x": as_layout(arguments["x"], layout)}, "cpu"), expected)
        if "residual" in arguments:
            other = as_layout(arguments["residual"], layout)
            assert_equal_bits(run(arguments | {"residual": other}, "cpu"), expected)
        assert_equal_bits(run(mapped(arguments, partial(weight_as, layout)), "cpu"), expected)


def weight_as(layout: str, name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() == 4 and name not in ("x", "residual"):
        return as_layout(tensor, layout)
    return torch.stack([tensor, tensor], dim=1)[:, 0] if tensor.dim() == 1 else tensor


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("size", [(9, 7), (1, 1), (1, 5)])
def test_memory_formats(size: tuple[int, int], backend: str) -> None:
    """E21: y and the gradient of x have x's format, whatever the residual's and grad_y's are."""
    for layout in ("nchw", "channels_last", "transposed", "sliced"):
        arguments = on_device(Sample(2, 16, 2, 8, *size, extras="residual").make(torch.float32), backend)
        x = as_layout(arguments["x"], layout).requires_grad_()
        y = lite_mla(**arguments | {"x": x}, backend=backend)
        wanted = torch.channels_last if layout == "channels_last" and size != (1, 1) else torch.contiguous_format
        assert y.is_contiguous(memory_format=wanted)
        if backend != "reference":  # whose gradient is autograd's
            assert torch.autograd.grad(y.sum(), x)[0].is_contiguous(memory_format=wanted)


@pytest.mark.parametrize(
    "sample",
    [
        Sample(2, 64, 4, 16, 14, 14, (3, 5), ALL),
        Sample(1, 32, 1, 32, 64, 64, (5,), "scale shift"),
        Sample(5, 8, 1, 8, 33, 65, (7,), ALL, layout="channels_last"),
        Sample(1, 4, 1, 4, 1, 3000, (5,), ALL),
        Sample(33, 16, 2, 8, 5, 5, (3,)),
        Sample(1, 300, 2, 8, 7, 7, (5,), "residual"),
    ],
    ids=str,
)
def test_thread_counts_and_repeats_give_equal_bits(sample: Sample, threads: None) -> None:
    arguments = sample.make(torch.float32)
    torch.set_num_threads(1)
    expected = run(arguments, "cpu")
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        for _ in range(3):
            assert_equal_bits(run(arguments, "cpu"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_e14_e28_images_are_independent(backend: str, dtype: torch.dtype) -> None:
    """What image j holds leaves the bits of the others alone; a NaN pixel reaches the whole of its image."""
    arguments = Sample(3, 16, 2, 8, 9, 9, (3, 5), ALL).make(dtype)
    before = run(arguments, backend)
    changed = arguments["x"].clone()
    changed[1, 3, 4, 4] = float("nan")
    after = run(arguments | {"x": changed}, backend)
    for name in ("out", "grad_x", "grad_residual"):
        assert torch.equal(before[name][[0, 2]], after[name][[0, 2]])
    assert torch.isnan(after["out"][1]).all()


@pytest.mark.parametrize(("backend", "dtype"), executors(DTYPES, NATIVE), ids=str)
def test_integers(backend: str, dtype: torch.dtype) -> None:
    """T5 through the block: v is 2 at every pixel, so the attention gives 2 (or 0), and y is an exact integer."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    qkv_weight = integers(24, 16, 1, 1)
    qkv_weight[16:] = 0
    qkv_bias = torch.zeros(24, dtype=dtype)
    qkv_bias[16:] = 2
    x, proj_weight = integers(2, 16, 7, 9), integers(12, 8, 1, 1)
    shift, residual = integers(12).to(torch.promote_types(dtype, torch.float32)), integers(2, 12, 7, 9)
    inputs = [tensor.to(device_of(backend)) for tensor in (x, qkv_weight, proj_weight, qkv_bias, shift, residual)]
    y = lite_mla(
        *(*inputs[:2], [], [], inputs[2]),
        head_dim=8,
        qkv_bias=inputs[3],
        proj_shift=inputs[4],
        residual=inputs[5],
        backend=backend,
    ).cpu()
    qkv = torch.einsum("oc,bchw->bohw", qkv_weight[:, :, 0, 0].double(), x.double())
    q, k = qkv[:, :8].clamp(min=0), qkv[:, 8:16].clamp(min=0)
    positive = torch.einsum("bchw,bc->bhw", q, k.sum((2, 3)))[:, None] > 0
    attended = 2 * positive.double().expand(-1, 8, -1, -1)
    expected = torch.einsum("oc,bchw->bohw", proj_weight[:, :, 0, 0].double(), attended)
    expected = expected + shift.double().view(1, -1, 1, 1) + residual.double()
    # The quotient num / den is 2 up to one unit in the last place, and 24 of them are summed.
    assert torch.allclose(y.double(), expected, rtol=0, atol=200 * torch.finfo(shift.dtype).eps)


@pytest.mark.parametrize(("backend", "dtype"), executors(DTYPES, NATIVE), ids=str)
def test_e1_zero_denominators(backend: str, dtype: torch.dtype) -> None:
    """T4: no positive q: y is the epilogue of exact 0, and no gradient reaches qkv."""
    arguments = Sample(2, 16, 2, 8, 5, 6, (3,), "biases scale shift residual").make(dtype)
    for name in (
        "qkv_bias",
        "depthwise_biases",
        "pointwise_biases",
        "depthwise_weights",
        "pointwise_weights",
        "qkv_weight",
    ):
        for tensor in [arguments[name]] if isinstance(arguments[name], Tensor) else arguments[name]:
            tensor.abs_().neg_()
    arguments["x"].abs_()
    arguments["depthwise_weights"][0].abs_()  # of a negative qkv: negative, and so is the pointwise one of its result
    arguments["pointwise_weights"][0].abs_()
    found = run(arguments, backend)
    shift = arguments["proj_shift"].view(1, -1, 1, 1)
    assert torch.equal(found["out"], (shift + arguments["residual"].to(shift.dtype)).to(dtype))
    for name in ("grad_x", "grad_qkv_weight", "grad_depthwise_weights[0]", "grad_proj_weight", "grad_proj_scale"):
        assert not found[name].any(), name
        assert not torch.isnan(found[name]).any(), name


@pytest.mark.parametrize(("backend", "dtype"), executors(DTYPES, NATIVE), ids=str)
def test_scale_of_zero(backend: str, dtype: torch.dtype) -> None:
    """A norm whose weight starts at zero: y is the residual, and the scale still gets its gradient."""
    arguments = Sample(2, 16, 2, 8, 7, 6, (5,), "scale residual").make(dtype)
    arguments["proj_scale"].zero_()
    found, truth = run(arguments, backend), exact(arguments)
    assert torch.equal(found["out"], arguments["residual"])
    for name in ("grad_x", "grad_qkv_weight", "grad_proj_weight"):
        assert not found[name].any(), name
    error = (found["grad_proj_scale"].double() - truth["grad_proj_scale"]).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * truth["grad_proj_scale"].abs().max() * 8
    assert truth["grad_proj_scale"].abs().max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_block_is_its_ops_in_sequence(backend: str) -> None:
    arguments = Sample(2, 24, 2, 8, 9, 7, (3, 5), "biases").make(torch.float64)
    qkv = torch.nn.functional.conv2d(arguments["x"], arguments["qkv_weight"], arguments["qkv_bias"])
    names = ("depthwise_weights", "pointwise_weights", "depthwise_biases", "pointwise_biases", "head_dim")
    aggregated = multiscale_aggregate(qkv, **{name: arguments[name] for name in names}, backend=backend)
    out = relu_linear_attention([qkv, *aggregated], 8, backend=backend)
    y = torch.nn.functional.conv2d(out, arguments["proj_weight"])
    assert torch.allclose(lite_mla(**arguments, backend=backend), y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_vectors_in_half_precision(backend: str, dtype: torch.dtype) -> None:
    """proj_scale and proj_shift of x's dtype are converted, and their gradients come back in it."""
    arguments = Sample(2, 16, 2, 8, 6, 5, (3,), "scale shift").make(dtype)
    short = arguments | {name: arguments[name].to(dtype) for name in ("proj_scale", "proj_shift")}
    wide = arguments | {name: short[name].float() for name in ("proj_scale", "proj_shift")}
    found, expected = run(short, backend), run(wide, backend)
    for name, result in found.items():
        assert torch.equal(result, expected[name].to(dtype)), name
    assert found["grad_proj_scale"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_e5_large_inputs(backend: str, dtype: torch.dtype) -> None:
    """At 3e4 finite where the official block is: only stored tensors may overflow, and qkv and y do not here."""
    arguments = Sample(2, 16, 2, 8, 16, 16, (5,), "scale shift").make(dtype)
    arguments["x"] = (arguments["x"].double() / arguments["x"].abs().max() * 3e4).to(dtype)
    assert torch.isfinite(official_lite_mla(**arguments)).all()
    found = run(arguments, backend)
    assert all(torch.isfinite(result).all() for name, result in found.items() if "weight" not in name)


@pytest.mark.parametrize("backend", BACKENDS)  # on GPUs the attention's result is stored
def test_e5_between_qkv_and_y_nothing_is_stored(backend: str) -> None:
    """Aggregated values beyond float16's range cancel in the quotient: the official block overflows there."""
    arguments = Sample(2, 16, 2, 8, 8, 8, (5,), "scale").make(torch.float16)
    arguments["x"] *= 1e3
    arguments["proj_scale"] *= 1e-3
    arguments["pointwise_weights"][0] *= 300
    assert not torch.isfinite(official_lite_mla(**arguments)).all()
    y = lite_mla(**arguments, backend=backend)
    truth = reference.lite_mla(**in_dtype(arguments, torch.float64))
    assert torch.isfinite(y).all()
    assert (y.double() - truth).abs().max() <= 4e-3 * truth.abs().max()


@pytest.mark.parametrize(("backend", "dtype"), executors(DTYPES, NATIVE), ids=str)
def test_e15_batch_of_zero(backend: str, dtype: torch.dtype) -> None:
    for layout in ("nchw", "channels_last"):
        arguments = Sample(0, 16, 2, 8, 5, 6, (3, 5), ALL, layout, out_channels=12).make(dtype)
        found = run(arguments, backend)
        assert found["out"].shape == (0, 12, 5, 6)
        assert dtypes_are_kept(arguments, found)
        for name, result in found.items():
            assert not result.any(), name
            assert not torch.isnan(result).any(), name


def test_values_next_to_the_input_do_not_matter() -> None:
    """x and the residual inside buffers full of NaN."""
    arguments = Sample(2, 12, 1, 8, 5, 7, (5,), ALL).make(torch.float32)
    expected = run(arguments, "cpu")
    views = {}
    for name in ("x", "residual"):
        guarded = torch.full((2, 14, 7, 9), float("nan"))
        views[name] = guarded[:, 1:-1, 1:-1, 1:-1].copy_(arguments[name])
    assert_equal_bits(run(arguments | views, "cpu"), expected)


def test_auto_is_the_native_backend() -> None:
    arguments = Sample(1, 16, 2, 8, 8, 8).make(torch.float32)
    before = native_calls()
    found = run(arguments, "auto")
    assert native_calls() - before == 2
    assert_equal_bits(found, run(arguments, "cpu"))
    before = native_calls()
    lite_mla(**arguments)
    assert native_calls() - before == 1


def test_inputs_are_not_changed() -> None:
    arguments = Sample(2, 16, 2, 8, 7, 9, (3, 5), ALL).make(torch.float32)
    copies = mapped(arguments, lambda _, tensor: tensor.clone())
    run(arguments, "cpu")
    run(arguments, "cpu", recompute=True)
    assert_equal_bits(tensors_of(arguments), tensors_of(copies))


def test_reference_results_do_not_depend_on_autocast() -> None:
    """E7: the specification keeps its float32 under autocast."""
    arguments = Sample(1, 16, 2, 8, 6, 5, (3,), ALL).make(torch.float32)
    expected = results(reference.lite_mla, arguments)

    def under_autocast(**kwargs: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return reference.lite_mla(**kwargs)

    assert_equal_bits(results(under_autocast, arguments), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_tensors_take_the_kernels(dtype: torch.dtype) -> None:
    """Named by nobody; float64, which the kernels do not serve, takes the reference."""
    arguments = Sample(2, 32, 2, 16, 9, 7, (3, 5), ALL).make(dtype)
    before = triton_launches()
    y = lite_mla(**mapped(arguments, lambda _, tensor: tensor.cuda()))
    assert (triton_launches() > before) == (dtype != torch.float64)
    assert y.is_cuda
    truth = exact(arguments)["out"]
    assert (y.cpu().double() - truth).abs().max() <= 32 * torch.finfo(dtype).eps * truth.abs().max()
