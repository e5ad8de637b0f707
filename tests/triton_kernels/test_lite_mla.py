"""The Triton kernels of lite_mla: rule T, launches, edge cases, the product with its epilogue.

In the interpreter where there is no GPU, so the samples are small and few; the others run nightly.
"""

from __future__ import annotations

import statistics
from typing import Any
from unittest.mock import patch

import pytest
import torch

from efficientvit_kernels import lite_mla, reference
from efficientvit_kernels.testing import official_lite_mla, rule_t, triton_launches
from efficientvit_kernels.triton_kernels import lite_mla_configs
from efficientvit_kernels.triton_kernels.lite_mla import lite_mla_fwd
from efficientvit_kernels.triton_kernels.pointwise import product_with_epilogue
from tests.ops.block_common import Arguments, assert_all_ok, assert_equal_bits, in_dtype, mapped, results
from tests.ops.common import HALF, as_layout, device_of
from tests.ops.lite_mla_samples import ALL, SAMPLES, Sample, dtypes_are_kept, exact, judge, run, state_and_tolerance
from tests.ops.rounding import prescribed

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, *HALF]

FUSED = [
    Sample(1, 16, 1, 16, 7, 7, extras="scale shift"),
    Sample(2, 12, 1, 8, 5, 18, (3,), ALL, "channels_last"),
    Sample(1, 10, 2, 5, 6, 5, (3, 5), "biases", "sliced"),
    Sample(1, 20, 1, 31, 5, 4, (3,), "shift residual", out_channels=70),
]
APART = [  # no aggregation; head dims that the fused kernels do not hold
    Sample(2, 12, 2, 8, 6, 5, (), "scale residual"),
    Sample(1, 8, 1, 72, 4, 5, (3,), "scale shift"),
]
SMALL = [s for s in SAMPLES if s.batch * s.heads <= 8 and s.tokens <= 200 and max(s.kernels, default=0) <= 7]


def forward(arguments: Arguments, **changes: Any) -> torch.Tensor:
    device = device_of("triton")
    placed = mapped(arguments, lambda _, tensor: tensor.to(device))
    return lite_mla(**placed | {"backend": "triton"} | changes).cpu()


def cases() -> list[Any]:
    """Every sample in one dtype, and the smallest in all of them; the rest nightly."""
    found = []
    for i, sample in enumerate([*FUSED, *APART]):
        for dtype in DTYPES:
            now = i == 0 or dtype == DTYPES[i % 3]
            found.append(pytest.param(sample, dtype, marks=[] if now else [pytest.mark.nightly]))
    return found


@pytest.mark.parametrize(("sample", "dtype"), cases(), ids=str)
def test_rule_t(sample: Sample, dtype: torch.dtype) -> None:
    arguments = sample.make(dtype)
    assert_all_ok(judge(arguments, "triton"))
    assert dtypes_are_kept(arguments, run(arguments, "triton", recompute=True))


# One or two tiles side by side, one scale or two, both kinds of storage; IDENTITY is the first scale's.
FORWARD = [(FUSED[0], torch.float32), (FUSED[1], torch.float16), (FUSED[2], torch.float32), (FUSED[2], torch.bfloat16)]


@pytest.mark.parametrize(("sample", "dtype"), FORWARD, ids=str)
def test_forward(sample: Sample, dtype: torch.dtype) -> None:
    """The forward alone, with programs that take several tiles, the last of them fewer; and what it saves."""
    arguments = sample.make(dtype)
    with patch.object(lite_mla_configs, "PROGRAMS", 3):
        found = forward(arguments)
        bases = [official_lite_mla(**arguments), *(prescribed(arguments, seed)["out"] for seed in range(2))]
        truth = reference.lite_mla(**in_dtype(arguments, torch.float64))
        verdict = rule_t(found, truth, max(bases, key=lambda base: float((base.double() - truth).abs().max())))
        assert verdict.ok, verdict
        names = ("qkv_weight", "depthwise_weights", "pointwise_weights", "proj_weight", "qkv_bias")
        names += ("depthwise_biases", "pointwise_biases")
        device = device_of("triton")
        placed = mapped(arguments, lambda _, tensor: tensor.to(device))
        placed |= {name: placed.get(name, []) for name in names[5:]}
        inputs = [placed.get(name) for name in ("x", *names)]
        epilogue = [placed.get(name) for name in ("proj_scale", "proj_shift", "residual")]
        y, qkv, state = lite_mla_fwd(*inputs, *epilogue, sample.head_dim, sample.eps, True)
    assert torch.equal(y.cpu(), found)
    assert torch.allclose(state.cpu().double(), *state_and_tolerance(qkv.cpu(), arguments, dtype))


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SMALL, ids=str)
def test_rule_t_of_all_small_samples(sample: Sample, dtype: torch.dtype) -> None:
    assert_all_ok(judge(sample.make(dtype), "triton"))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("dtype", "target"), [(torch.float32, 1.5), (torch.float16, 2.0), (torch.bfloat16, 0.8)], ids=str
)
def test_median_error_of_the_forward_meets_the_target(dtype: torch.dtype, target: float) -> None:
    """T2, as for the CPU kernels."""
    ratios = []
    for sample in SMALL[::5]:
        if sample.tokens > sample.head_dim:
            arguments = sample.make(dtype)
            truth = exact(arguments)["out"]
            base = official_lite_mla(**arguments)
            ratios.append(rule_t(forward(arguments), truth, base).ratio)
    assert len(ratios) >= 5
    assert statistics.median(ratios) <= target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launches(dtype: torch.dtype) -> None:
    """Two products and two kernels; in fp32 the projection is torch's, in 16 bits the fourth launch is ours."""
    before = triton_launches()
    forward(FUSED[0].make(dtype))
    assert triton_launches() - before == (2 if dtype == torch.float32 else 3)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recompute_and_layouts(dtype: torch.dtype, layout: str) -> None:
    arguments = Sample(2, 6, 1, 4, 2, 3, (3,), "scale", layout).make(dtype)
    found = run(arguments, "triton")
    assert_equal_bits(run(arguments, "triton", recompute=True), found)
    for other_layout in ("transposed", "offset"):
        other = forward(arguments | {"x": as_layout(arguments["x"], other_layout)})
        tolerance = 8 * torch.finfo(dtype).eps * float(found["out"].abs().max())  # torch's products may differ
        assert torch.allclose(other, found["out"], rtol=0, atol=tolerance)
    assert forward(arguments).is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def test_images_are_independent() -> None:
    """E28, E14: a NaN image leaves the others alone."""
    arguments = Sample(3, 12, 1, 8, 5, 6, (3,), ALL).make(torch.float32)
    expected = forward(arguments)
    arguments["x"][1, 3, 2, 2] = float("nan")
    found = forward(arguments)
    assert torch.isnan(found[1]).all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_e4_large_magnitudes_in_float16() -> None:
    """x of 3e4: finite wherever the stored qkv and the result are."""
    arguments = FUSED[0].make(torch.float16)
    arguments["x"].mul_(1e4).clamp_(-3e4, 3e4)
    truth = exact(in_dtype(arguments, torch.float32))["out"].half()
    found = forward(arguments)
    assert torch.equal(torch.isfinite(found), torch.isfinite(truth))
    assert torch.allclose(found.double(), truth.double(), rtol=1e-2, atol=1e-2 * float(truth.abs().max()))


def test_a_batch_of_none() -> None:
    arguments = Sample(2, 12, 1, 8, 5, 6, (3,), ALL).make(torch.float32)
    arguments |= {name: arguments[name][:0] for name in ("x", "residual")}
    found = run(arguments, "triton")
    assert found["out"].shape == (0, 12, 5, 6)
    assert all(not grad.any() for name, grad in found.items() if name.startswith("grad_"))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("channels", "out_channels", "layout"), [(70, 33, "nchw"), (16, 130, "channels_last")])
def test_product_with_epilogue(channels: int, out_channels: int, layout: str, dtype: torch.dtype) -> None:
    """scale * (W x) + shift + residual with every part there or not, the residual in any layout."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device_of("triton"))

    x, weight = as_layout(normal(2, channels, 5, 7), layout), normal(out_channels, channels, 1, 1)
    scale, shift = (normal(out_channels, dtype=torch.float32) for _ in range(2))
    for residual_layout in (None, "nchw", "channels_last", "transposed"):
        residual = None if residual_layout is None else as_layout(normal(2, out_channels, 5, 7), residual_layout)
        used = (scale, None, residual) if residual_layout == "nchw" else (None, shift, residual)
        used = (scale, shift, residual) if residual_layout == "transposed" else used
        found = product_with_epilogue(weight, x, *used, like=x)
        expected = torch.nn.functional.conv2d(x.double(), weight.double())
        for part, combine in zip(used, (torch.mul, torch.add, torch.add), strict=True):
            if part is not None:
                expected = combine(expected, part.double().view(1, -1, 1, 1) if part.dim() == 1 else part.double())
        assert found.stride() == torch.empty_like(expected.to(dtype), memory_format=torch.preserve_format).stride()
        error = (found.double() - expected).abs().max()
        assert error <= 0.51 * torch.finfo(dtype).eps * expected.abs().max() + 1e-5  # one rounding


def test_no_rounding_of_a_product_turns_a_nan_into_a_number() -> None:
    """All bits of this NaN are set: rounding up to bfloat16 would carry into its sign."""
    weight, x = (torch.ones(2, 2, 1, size, dtype=torch.bfloat16, device=device_of("triton")) for size in (1, 3))
    shift = torch.ones(2)
    shift.view(torch.int32)[0] = 0x7FFFFFFF
    y = product_with_epilogue(weight, x, None, shift.to(x.device), None, like=x)
    assert y[:, 0].isnan().all()
    assert (y[:, 1] == 3).all()


def test_tiles_and_splits() -> None:
    assert [lite_mla_configs.tiles_per_split(tiles) for tiles in (1, 4, 5, 32, 33, 128, 129, 4096)] == [
        *(1, 1, 2, 8, 4, 4, 5, 128)
    ]
    assert lite_mla_configs.tiles_per_program(8, 16) == 1
    assert lite_mla_configs.tiles_per_program(128, 64) == 4


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("kind", ["half", "ieee", "tf32"])
def test_the_official_layers_are_fused(kind: str, k: int) -> None:
    for block_d in (16, 32):
        for kernel in ("state", "apply"):
            for width in (1, 8, 9, 64):
                config = lite_mla_configs.block_config(kernel, kind, block_d, k, width)
                assert config is not None
                assert config.bands * config.cols == lite_mla_configs.LANES
                tiles, tiles_w = config.tiles(33, width)
                assert tiles_w * config.cols >= width
                assert tiles // tiles_w * config.rows * config.bands >= 33
    assert lite_mla_configs.block_config("state", kind, 64, k, 9) is None


def test_second_differentiation_raises() -> None:
    arguments = FUSED[0].make(torch.float32)
    x = arguments["x"].to(device_of("triton")).requires_grad_()
    placed = mapped(arguments, lambda _, tensor: tensor.to(x.device))
    y = lite_mla(**placed | {"x": x, "backend": "triton"})
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="derivative must be of first order"):
        torch.autograd.grad(grad.sum(), x)


def test_official_results_agree_on_one_sample() -> None:
    """The judgement above is not only against ourselves: the official formula in float32."""
    arguments = FUSED[0].make(torch.float32)
    found, expected = run(arguments, "triton"), results(official_lite_mla, arguments)
    for name, result in found.items():
        assert torch.allclose(result, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max())), name
