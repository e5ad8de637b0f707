"""The Triton kernels of multiscale_aggregate: rule T, exact integers, NaN and inf, runs of tiles, what is computed.

In the interpreter where there is no GPU, hence few and small samples.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import multiscale_aggregate, reference
from efficientvit_kernels.testing import triton_launches
from efficientvit_kernels.triton_kernels import aggregation_configs
from efficientvit_kernels.triton_kernels.multiscale_aggregate import (
    multiscale_aggregate_bwd,
    multiscale_aggregate_fwd,
)
from tests.ops.aggregate_samples import Sample, exact, judge, run
from tests.ops.block_common import Arguments, assert_all_ok, assert_equal_bits, in_dtype, mapped
from tests.ops.common import HALF, as_layout, device_of

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, *HALF]
inf, nan = float("inf"), float("nan")
FUSED = [  # gradients in one launch
    Sample(1, 1, 16, 7, 7, (3,)),  # bands of lanes
    Sample(1, 1, 5, 3, 5, (5,), "channels_last", biases=True),
    Sample(2, 1, 8, 2, 3, (1, 3), "sliced"),
    Sample(1, 1, 1, 2, 18, (3,), "transposed"),  # two tiles side by side
    Sample(1, 1, 4, 14, 9, (1,), "permuted"),  # seven rows per lane
    Sample(1, 1, 4, 33, 9, (1,), "expanded"),  # eight, the last of which reach beyond the image
]
SPLIT = [  # gradients one by one: a large kernel, or wide heads
    Sample(1, 1, 2, 5, 1, (9,), "transposed"),  # tall enough for the first and last row of the window
    Sample(1, 1, 3, 2, 3, (7,), "channels_last", biases=True),
    Sample(1, 1, 33, 2, 3, (3,)),
    Sample(1, 1, 72, 2, 3, (3,), biases=True),  # several blocks of channels
]


def check(sample: Sample, dtype: torch.dtype) -> None:
    assert_all_ok(judge(sample.make(dtype), "triton"))


@pytest.mark.parametrize(
    ("sample", "dtype"), [(sample, DTYPES[i % 3]) for i, sample in enumerate([*FUSED, *SPLIT])], ids=str
)
def test_rule_t(sample: Sample, dtype: torch.dtype) -> None:
    before = triton_launches()
    check(sample, dtype)
    if sample in FUSED:
        assert triton_launches() - before == 3 * len(sample.kernels)


MORE = [
    *(Sample(1, 1, 32, 14, 14, layout=layout) for layout in ("nchw", "channels_last")),
    *(Sample(2, 2, 8, 11, 13, (k,), biases=True) for k in (1, 3, 5, 7)),
    *(Sample(1, 1, d, 5, 6, (3, 5), biases=d % 2 == 1) for d in (1, 8, 16, 33, 40, 64, 96)),
    Sample(1, 1, 300, 2, 3, (3,)),
]


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", [*FUSED, *SPLIT, *MORE], ids=str)
def test_rule_t_of_more_samples(sample: Sample, dtype: torch.dtype) -> None:
    check(sample, dtype)


def integers(sample: Sample, dtype: torch.dtype) -> Arguments:
    generator = torch.Generator().manual_seed(0)
    return mapped(
        sample.make(dtype), lambda _, tensor: torch.randint(-3, 4, tensor.shape, generator=generator).to(dtype)
    )


@pytest.mark.parametrize(
    ("sample", "dtype"),
    [
        (Sample(1, 1, 8, 3, 4, (5,), biases=True), torch.bfloat16),
        (Sample(2, 1, 4, 2, 3, (3,)), torch.float16),
        (Sample(1, 1, 33, 2, 2, (3,)), torch.float32),
    ],
    ids=str,
)
def test_integers_are_exact(sample: Sample, dtype: torch.dtype) -> None:
    """T5: all sums stay below 2^24, and what is stored in between below 2^8: the exact result, rounded once."""
    arguments = integers(sample, dtype)
    arguments = mapped(arguments, lambda name, t: t.clamp(-1, 1) if "pointwise_weights" in name else t)
    grad_out = torch.randint(-3, 4, arguments["qkv"].shape).to(dtype)
    lists = [arguments.get(name) or [] for name in ("depthwise_weights", "pointwise_weights", "depthwise_biases")]
    found = multiscale_aggregate_bwd([grad_out], arguments["qkv"], *lists, sample.head_dim, True, True, sample.biases)
    out = multiscale_aggregate(**arguments, backend="triton")[0]
    wide = in_dtype(arguments, torch.float64)
    leaves = mapped(wide, lambda _, tensor: tensor.requires_grad_())
    expected = reference.multiscale_aggregate(**leaves)[0]
    assert torch.equal(out, expected.to(dtype))
    names = ("qkv", "depthwise_weights", "pointwise_weights", "depthwise_biases", "pointwise_biases")
    wanted = [leaves[name] if name == "qkv" else leaves[name][0] for name in names if name in leaves]
    truth = torch.autograd.grad(expected, wanted, grad_out.double())
    assert len(found) == len(truth)
    for result, grad in zip(found, truth, strict=True):
        assert torch.equal(result, grad.to(dtype))


def kinds(results: Arguments) -> dict[str, tuple[Tensor, ...]]:
    return {name: (t.isnan(), t.isposinf(), t.isneginf()) for name, t in results.items()}


def assert_same_kinds(found: Arguments, expected: Arguments) -> None:
    for name, masks in kinds(found).items():
        for mask, other in zip(masks, kinds(expected)[name], strict=True):
            assert torch.equal(mask, other), name


@pytest.mark.parametrize(
    ("value", "dtype", "sample", "place"),
    [
        (nan, torch.float32, Sample(1, 1, 2, 5, 9, (3,), biases=True), (4, 1)),  # rows of a lane beyond the image
        (nan, torch.float32, Sample(1, 1, 2, 6, 3, (3,)), (5, 2)),  # whole lanes beyond the image, below and beside it
        (inf, torch.float16, Sample(1, 1, 2, 2, 17, (3,)), (1, 15)),
        (-inf, torch.bfloat16, Sample(1, 1, 2, 2, 3, (7,)), (0, 2)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from the interpreter's products
def test_special_values_reach_what_they_touch(
    value: float, dtype: torch.dtype, sample: Sample, place: tuple[int, int]
) -> None:
    """T3: a pixel reaches the k x k pixels around it in its group, the taps that use it, its column of P's gradient."""
    arguments = sample.make(dtype)
    arguments["qkv"][0, 3, place[0], place[1]] = value
    found = run(arguments, "triton")
    assert_same_kinds(found, run(in_dtype(arguments, torch.float32), "reference"))
    assert not torch.isfinite(found["out[0]"]).all()
    assert torch.isfinite(found["grad_qkv"]).all()


@pytest.mark.parametrize("k", [3, 7])
def test_nan_in_grad_out(k: int) -> None:
    """It reaches the k x k pixels around it in its group, the weights of its group and its row of P's gradient."""
    arguments = Sample(1, 1, 2, 3, 7, (k,), biases=True).make(torch.float32)
    parameters = [arguments[name] for name in ("depthwise_weights", "pointwise_weights", "depthwise_biases")]
    grad_out = torch.ones_like(arguments["qkv"])
    grad_out[0, 3, 1, 5] = nan
    names = ("qkv", "depthwise", "pointwise", "depthwise_bias", "pointwise_bias")
    found = multiscale_aggregate_bwd([grad_out], arguments["qkv"], *parameters, 2, True, True, True)
    grads = dict(zip(names, found, strict=True))
    reached = torch.zeros(1, 6, 3, 7, dtype=torch.bool)
    reached[0, 2:4, :, 5 - k // 2 :] = True
    assert torch.equal(grads["qkv"].isnan(), reached)
    for name, channels in (
        ("depthwise", (2, 3)),
        ("depthwise_bias", (2, 3)),
        ("pointwise", (3,)),
        ("pointwise_bias", (3,)),
    ):
        assert [c for c in range(6) if grads[name][c].isnan().any()] == list(channels), name


@pytest.mark.parametrize("k", [3, 7])
def test_tf32(k: int) -> None:
    """Every operand is rounded, or the watch would say so."""
    arguments = Sample(1, 1, 4, 2, 3, (k,), biases=True).make(torch.float32)
    expected = run(arguments, "triton")
    torch.set_float32_matmul_precision("high")
    try:
        found = run(arguments, "triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    for name in ("out[0]", "grad_qkv", "grad_pointwise_weights[0]"):
        error = (found[name] - expected[name]).abs().max() / expected[name].abs().max()
        assert 1e-6 < error < 1e-2, name  # operands of 11 bits


@pytest.mark.parametrize(("dim", "k"), [(5, 3), (2, 7), (33, 3)])
def test_neighbours_full_of_nan(dim: int, k: int) -> None:
    """Other groups leave no trace, not even where lanes beyond the head dim meet zeros."""
    arguments = Sample(1, 1, dim, 1, 2, (k,), biases=True).make(torch.float16)
    names = ("depthwise_weights", "pointwise_weights", "depthwise_biases", "pointwise_biases")
    mine = slice(dim, 2 * dim)  # the second of three groups

    def alone(tensor: Tensor, axis: int) -> Tensor:
        index = (slice(None), mine)[: axis + 1] if axis else mine
        result = torch.full_like(tensor, nan)
        result[index] = tensor[index]
        return result

    def results(qkv: Tensor, grad_out: Tensor, lists: list[list[Tensor]]) -> list[Tensor]:
        (out,) = multiscale_aggregate_fwd(qkv, *lists, dim)
        grad, *weights = multiscale_aggregate_bwd([grad_out], qkv, *lists[:3], dim, True, True, True)
        return [out[:, mine], grad[:, mine], *(weight[mine] for weight in weights)]

    qkv, lists = arguments["qkv"], [arguments[name] for name in names]
    expected = results(qkv, qkv.flip(3), lists)
    parameters = [[alone(tensor, 0) for tensor in tensors] for tensors in lists]
    found = results(alone(qkv, 1), alone(qkv.flip(3), 1), parameters)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_layouts_and_repeats_give_equal_bits() -> None:
    """Two runs are bit-equal. So are layouts in the interpreter; a GPU may order the terms of a product by layout."""
    arguments = Sample(1, 1, 4, 2, 5, (3,)).make(torch.bfloat16)
    expected = run(arguments, "triton")
    layouts = ("nchw", "channels_last", "sliced") if device_of("triton") == "cpu" else ("nchw",)
    for layout in layouts:
        found = run(arguments | {"qkv": as_layout(arguments["qkv"], layout)}, "triton")
        assert_equal_bits(found, expected)
        assert layout != "channels_last" or found["out[0]"].is_contiguous(memory_format=torch.channels_last)


def test_weights_of_any_strides() -> None:
    """Parameters that are slices and transposes of NaN-filled memory, no two kinds with the same steps."""

    def strided(name: str, tensor: Tensor) -> Tensor:
        if name == "qkv":
            return tensor
        step = 2 if "pointwise" in name else 3
        big = torch.full([step * size + 1 for size in reversed(tensor.shape)], nan)
        view = big[tuple(slice(1, None, step) for _ in tensor.shape)].permute(*reversed(range(tensor.dim())))
        return view.copy_(tensor)

    arguments = Sample(1, 1, 4, 2, 3, (3,), biases=True).make(torch.float32)
    assert_equal_bits(run(mapped(arguments, strided), "triton"), run(arguments, "triton"))


RUNS = [
    (6, Sample(3, 1, 2, 2, 3, (3,))),
    (1, Sample(2, 1, 2, 1, 34, (1,))),
    (1, Sample(2, 1, 2, 2, 3, (7,))),
    (2, Sample(3, 1, 2, 1, 2, (9,))),
]


@pytest.mark.parametrize(("programs", "sample"), RUNS, ids=str)
def test_programs_that_take_several_tiles_and_images(
    programs: int, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise only large images have them: the sums over a run of tiles, the last run shorter."""
    monkeypatch.setattr(aggregation_configs, "SUMMING_PROGRAMS", programs)
    check(sample, torch.float32)


def backward(sample: Sample, needs: tuple[bool, bool, bool], addend: Tensor | None = None) -> list[Tensor]:
    arguments = sample.make(torch.float32)
    lists = [arguments[name] for name in ("depthwise_weights", "pointwise_weights", "depthwise_biases")]
    grad_outs = [arguments["qkv"].flip(0) + s for s in range(len(sample.kernels))]
    return multiscale_aggregate_bwd(grad_outs, arguments["qkv"], *lists, sample.head_dim, *needs, addend)


@pytest.mark.parametrize("k", [1, 7])
def test_only_what_is_needed(k: int) -> None:
    """Each subset of the gradients has the bits that it has among all of them."""
    sample = Sample(1, 1, 2, 1, 2, (k,), biases=True)
    everything = backward(sample, (True, True, True))
    parts = {"qkv": everything[:1], "weights": everything[1:3], "biases": everything[3:]}
    assert len(everything) == 5
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        expected = [grad for part, needed in zip(parts.values(), needs, strict=True) if needed for grad in part]
        found = backward(sample, needs)
        assert len(found) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("kernels", [(), (3,), (3, 1)], ids=str)
def test_addend(kernels: tuple[int, ...]) -> None:
    """A gradient from elsewhere, in any layout, added before grad_qkv is rounded."""
    sample = Sample(1, 1, 2, 2, 3, kernels, biases=True)
    addend = torch.randint(-8, 9, (1, 6, 3, 2)).float().transpose(2, 3)
    plain, found = backward(sample, (True, False, False)), backward(sample, (True, False, False), addend)
    assert torch.allclose(found[0], plain[0] + addend, rtol=1e-6, atol=1e-5)
    assert not torch.equal(found[0], plain[0])


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
def test_empty_inputs(shape: tuple[int, int, int]) -> None:
    """No launch; gradients of the weights are exactly zero."""
    batch, height, width = shape
    before = triton_launches()
    arguments = Sample(batch, 1, 4, height, width, (3, 5), biases=True).make(torch.float16)
    for name, result in run(arguments, "triton").items():
        assert result.shape == ((batch, 12, height, width) if "out" in name or "qkv" in name else result.shape)
        assert not result.any(), name
    assert triton_launches() == before


def test_large_magnitudes() -> None:
    """E4: nothing is stored in 16 bits between the two convolutions, where 3e4 * 9 would overflow."""
    arguments = Sample(1, 1, 4, 3, 3, (3,)).make(torch.float16)
    for name, value in (("qkv", 3e4), ("depthwise_weights", 1.0), ("pointwise_weights", 2**-7)):
        for tensor in arguments[name] if isinstance(arguments[name], list) else [arguments[name]]:
            tensor.fill_(value)
    found = run(arguments, "triton")
    assert torch.equal(found["out[0]"], exact(arguments)["out[0]"].half())
    assert torch.isfinite(found["grad_qkv"]).all()
