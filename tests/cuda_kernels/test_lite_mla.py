"""The CUDA kernels of lite_mla: rule T, launches, the fused kernels' states, determinism, thread orders, the epilogue.

In the emulator where there is no GPU. Edge cases and laws are in tests/ops.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from efficientvit_kernels import lite_mla, reference
from efficientvit_kernels.ops import _cuda_lite_mla
from efficientvit_kernels.ops._backends import registered
from efficientvit_kernels.testing import official_lite_mla, rule_t
from tests.cuda_emulator.ops import cuda_calls
from tests.ops.block_common import assert_all_ok, assert_equal_bits, in_dtype, on_device
from tests.ops.common import HALF, as_layout, device_of
from tests.ops.lite_mla_samples import ALL, SAMPLES, Sample, dtypes_are_kept, exact, judge, run, state_and_tolerance

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("backend", ["cuda"])]
DTYPES = [torch.float32, *HALF]

FUSED = [  # in 16 bits
    Sample(1, 16, 1, 16, 7, 7, extras="scale shift"),
    Sample(2, 12, 1, 8, 5, 24, (3,), ALL, "channels_last"),
    Sample(1, 10, 2, 32, 18, 17, (3, 5), "biases", "sliced"),
    Sample(2, 20, 1, 32, 16, 24, (7,), "shift residual", out_channels=70),
    Sample(1, 8, 1, 8, 80, 130, (5,), ""),  # more splits than a reader adds up
]
APART = [
    Sample(2, 12, 2, 8, 6, 5, (), "scale residual"),
    Sample(1, 8, 1, 64, 4, 5, (3,), "scale shift"),
]


def served(sample: Sample) -> bool:
    small = sample.batch * sample.heads * sample.head_dim * sample.tokens <= 8000
    return sample.head_dim in (8, 16, 32, 64) and set(sample.kernels) <= {3, 5, 7} and small


SMALL = [sample for sample in SAMPLES if served(sample)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", [*FUSED, *APART], ids=str)
def test_rule_t(backend: str, sample: Sample, dtype: torch.dtype) -> None:
    arguments = sample.make(dtype)
    before = cuda_calls()
    assert_all_ok(judge(arguments, backend))
    assert cuda_calls() > before
    assert dtypes_are_kept(arguments, run(arguments, backend, recompute=True))


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SMALL, ids=str)
def test_rule_t_of_all_small_samples(backend: str, sample: Sample, dtype: torch.dtype) -> None:
    assert_all_ok(judge(sample.make(dtype), backend))


@pytest.mark.parametrize(
    ("dtype", "target"), [(torch.float32, 1.5), (torch.float16, 2.0), (torch.bfloat16, 0.8)], ids=str
)
def test_median_error_of_the_forward_meets_the_target(backend: str, dtype: torch.dtype, target: float) -> None:
    """T2, as for the CPU kernels."""
    ratios = []
    for sample in [*FUSED[:4], *SMALL[::3]]:
        if sample.tokens > sample.head_dim and sample.batch:
            arguments = sample.make(dtype)
            placed = on_device(arguments, backend)
            found = lite_mla(**placed, backend=backend).cpu()
            ratios.append(rule_t(found, exact(arguments)["out"], official_lite_mla(**arguments)).ratio)
    assert len(ratios) >= 5
    assert statistics.median(ratios) <= target


FEW_CHANNELS = [  # of what two launches serve
    Sample(1, 16, 1, 16, 7, 7, extras="scale shift", out_channels=16),
    Sample(2, 32, 4, 8, 9, 14, (3,), ALL, "channels_last", out_channels=48),
    Sample(2, 48, 2, 32, 18, 16, (5,), "biases residual", "sliced", out_channels=64),
    Sample(1, 128, 8, 16, 14, 14, (5,), ALL, out_channels=128),
    Sample(1, 64, 3, 8, 20, 33, (7,), "shift", "offset", out_channels=32),
    Sample(1, 16, 1, 8, 136, 130, (5,), "", out_channels=16),  # more splits than a reader adds up, several tiles each
]


def two_launches(arguments: dict[str, Any], backend: str, always: bool) -> list[torch.Tensor]:
    placed = on_device(arguments, backend)
    names = ("x", "qkv_weight", "depthwise_weights", "pointwise_weights", "proj_weight", "qkv_bias")
    names += ("depthwise_biases", "pointwise_biases", "proj_scale", "proj_shift", "residual", "head_dim", "eps")
    given = [placed.get(name, [] if name.endswith("biases") else None) for name in names]
    return _cuda_lite_mla.two_launches(*given, always=always)


def in_two_launches(arguments: dict[str, Any], backend: str) -> torch.Tensor:
    (y,) = two_launches(arguments, backend, always=True)
    return y.cpu()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sample", FEW_CHANNELS, ids=str)
def test_two_launches(backend: str, sample: Sample, dtype: torch.dtype) -> None:
    arguments = sample.make(dtype)
    truth = reference.lite_mla(**in_dtype(arguments, torch.float64))
    verdict = rule_t(in_two_launches(arguments, backend), truth, official_lite_mla(**arguments))
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sample", FEW_CHANNELS[1:4], ids=str)
def test_layouts_and_orders_of_two_launches_give_equal_bits(
    backend: str, sample: Sample, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of its own, so all of it, whatever the layout; the image of a batch alone, too."""
    arguments = sample.make(dtype)
    expected = in_two_launches(arguments, backend)
    for layout in ("nchw", "channels_last", "transposed", "sliced", "offset"):
        placed = {name: as_layout(arguments[name], layout) for name in ("x", "residual") if name in arguments}
        assert torch.equal(in_two_launches(arguments | placed, backend), expected), layout
    alone = {name: arguments[name][-1:] for name in ("x", "residual") if name in arguments}
    assert torch.equal(in_two_launches(arguments | alone, backend), expected[-1:])
    if not torch.cuda.is_available():
        for order in ("reverse", "random"):
            monkeypatch.setenv("EVK_EMULATOR_ORDER", order)
            assert torch.equal(in_two_launches(arguments, backend), expected), order


def test_what_two_launches_do_not_serve(backend: str) -> None:
    """float32, two scales, wide blocks; and more channels than pay, unless they are asked for."""
    half = torch.float16
    for sample, dtype in (
        (FEW_CHANNELS[0], torch.float32),
        (Sample(1, 16, 1, 16, 7, 7, (3, 5), out_channels=16), half),
        (Sample(1, 144, 1, 16, 7, 7, out_channels=16), half),
        (Sample(1, 16, 9, 16, 7, 7, out_channels=16), half),
        (Sample(1, 16, 1, 16, 7, 7, out_channels=144), half),
        (Sample(1, 16, 1, 64, 7, 7, out_channels=16), half),
        (Sample(1, 24, 1, 16, 7, 7, out_channels=16), half),
    ):
        with pytest.raises(ValueError, match="not enough values to unpack"):
            in_two_launches(sample.make(dtype), backend)
    for heads, preferred in ((4, True), (5, False)):
        arguments = Sample(1, 16, heads, 16, 7, 9, out_channels=16).make(half)
        assert len(two_launches(arguments, backend, always=False)) == preferred


def attend(arguments: dict[str, Any], qkv: torch.Tensor, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """The launches between the products."""
    names = ("depthwise_weights", "pointwise_weights", "depthwise_biases", "pointwise_biases")
    lists = [[tensor.to(qkv) for tensor in arguments.get(name) or []] for name in names]
    out, state = registered("aggregate_attention", "fwd", "cuda")(qkv, *lists, sample.head_dim, sample.eps, False)
    return out, state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", FUSED, ids=str)
def test_states(backend: str, sample: Sample, dtype: torch.dtype) -> None:
    """KV and z of every scale, the head's own among them."""
    arguments = sample.make(dtype)
    qkv = torch.randn(sample.batch, 3 * sample.heads * sample.head_dim, sample.height, sample.width).to(dtype)
    _, state = attend(arguments, qkv.to(device_of(backend)), sample)
    assert torch.allclose(state.cpu().double(), *state_and_tolerance(qkv, arguments, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sample", [Sample(2, 8, 1, 16, 6, 16, (5,), "biases"), Sample(1, 8, 2, 32, 18, 17, (3, 5), "")], ids=str
)
def test_layouts_and_orders_give_equal_bits(
    backend: str, sample: Sample, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the products; these are torch's, whose bits may depend on the layout."""
    arguments = sample.make(dtype)
    qkv = torch.randn(sample.batch, 3 * sample.heads * sample.head_dim, sample.height, sample.width).to(dtype)
    expected = attend(arguments, qkv.to(device_of(backend)), sample)
    for layout in ("channels_last", "transposed", "sliced", "offset"):
        found = attend(arguments, as_layout(qkv, layout).to(device_of(backend)), sample)
        assert_equal_bits(dict(enumerate(found)), dict(enumerate(expected)))
    if not torch.cuda.is_available():
        for order in ("reverse", "random"):
            monkeypatch.setenv("EVK_EMULATOR_ORDER", order)
            assert_equal_bits(dict(enumerate(attend(arguments, qkv, sample))), dict(enumerate(expected)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (2, 3, 5, 7), (1, 16, 1, 1), (3, 24, 2, 2)])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
def test_epilogue(backend: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """scale * y + shift + residual in place, rounded once; every vector and the residual may be missing."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(shape, generator=generator).to(dtype)
    scale, shift = (torch.randn(shape[1], generator=generator) for _ in range(2))
    residual = as_layout(torch.randn(shape, generator=generator).to(dtype), layout)
    device = device_of(backend)
    for format in (torch.contiguous_format, torch.channels_last):
        for given in range(8):
            extras = [tensor if given >> i & 1 else None for i, tensor in enumerate((scale, shift, residual))]
            y = plain.clone(memory_format=format).to(device)
            moved = [None if tensor is None else tensor.to(device) for tensor in extras]
            _cuda_lite_mla._native_ops().projection_epilogue(y, *moved)
            expected = plain.double()
            for i, sign in enumerate(("*", "+", "+")):
                if (extra := extras[i]) is not None:
                    extra = extra.double() if i == 2 else extra.double().view(1, -1, 1, 1)
                    expected = expected * extra if sign == "*" else expected + extra
            tolerance = 2 * torch.finfo(dtype).eps
            assert torch.allclose(y.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("batch", "channels", "out_channels", "size"),
    [(1, 32, 64, (8, 8)), (2, 40, 70, (5, 7)), (3, 264, 24, (2, 6)), (1, 8, 130, (1, 1)), (2, 96, 16, (9, 72))],
)
def test_projection(
    backend: str, batch: int, channels: int, out_channels: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Every format of y and of the residual; sums in float32, rounded once."""
    generator = torch.Generator().manual_seed(0)
    device = device_of(backend)
    x = torch.randn((batch, channels, *size), generator=generator).to(dtype)
    weight = (torch.randn((out_channels, channels), generator=generator) / channels**0.5).to(dtype)
    residual = torch.randn((batch, out_channels, *size), generator=generator).to(dtype)
    scale, shift = (torch.randn(out_channels, generator=generator) for _ in range(2))
    product = torch.einsum("oc,bchw->bohw", weight.double(), x.double())
    inputs = [weight.to(device), x.to(device).contiguous(memory_format=torch.channels_last)]
    for layout in ("nchw", "channels_last", "sliced"):
        y = as_layout(torch.zeros_like(residual), layout).to(device)
        for given in (0, 7):
            extras = [scale, shift, as_layout(residual, layout)] if given else [None] * 3
            moved = [None if tensor is None else tensor.to(device) for tensor in extras]
            _cuda_lite_mla._native_ops().projection(*inputs, *moved, y)
            expected = product
            if given:
                columns = [vector.double().view(1, -1, 1, 1) for vector in (scale, shift)]
                expected = columns[0] * product + columns[1] + residual.double()
            bound = torch.finfo(dtype).eps * (expected.abs() + 1e-4)
            assert ((y.cpu().double() - expected).abs() <= bound).all(), layout
