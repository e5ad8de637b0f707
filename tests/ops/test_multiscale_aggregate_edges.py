"""multiscale_aggregate at the edges: NaN and inf, large magnitudes, empty inputs, memory around the input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import multiscale_aggregate
from tests.ops.aggregate_samples import Sample, run
from tests.ops.block_common import as_leaves, in_dtype, on_device, tensors_of
from tests.ops.common import BACKENDS, DTYPES, EXECUTORS, HALF, NATIVE, as_layout, device_of, executors

pytestmark = pytest.mark.usefixtures("one_thread")

inf, nan = float("inf"), float("nan")


def neighbourhood(size: tuple[int, int], y: int, x: int, kernel: int) -> Tensor:
    """The pixels that a kernel carries (y, x) to: [H, W], bool."""
    rows = (torch.arange(size[0]) - y).abs() <= kernel // 2
    columns = (torch.arange(size[1]) - x).abs() <= kernel // 2
    return rows[:, None] & columns[None, :]


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize(
    ("kernel", "size", "place"), [(5, (9, 20), (4, 9)), (3, (7, 5), (0, 4)), (7, (3, 40), (2, 33))]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values_reach_their_neighbourhood(
    backend: str, dtype: torch.dtype, kernel: int, size: tuple[int, int], place: tuple[int, int], value: float
) -> None:
    """T3: a NaN or inf pixel reaches the k x k pixels around it in the channels of its group, and nothing else."""
    arguments = Sample(2, 2, 4, *size, kernels=(kernel,), biases=True).make(dtype)
    arguments["qkv"][1, 14, place[0], place[1]] = value  # in the group of channels 12 ... 15
    found = run(arguments, backend)
    reached = torch.zeros(2, 24, *size, dtype=torch.bool)
    reached[1, 12:16] = neighbourhood(size, *place, kernel)
    assert torch.equal(~torch.isfinite(found["out[0]"]), reached)
    wide = run(in_dtype(arguments, torch.promote_types(dtype, torch.float32)), "reference")["out[0]"]
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(found["out[0]"]), kind(wide))
    # The gradient of qkv does not depend on qkv; those of the weights see the pixel where they use it.
    assert torch.isfinite(found["grad_qkv"]).all()
    used = torch.zeros(24, 1, kernel, kernel, dtype=torch.bool)
    used[14] = neighbourhood(size, *place, kernel).any() & tap_is_used(size, place, kernel)
    assert torch.equal(~torch.isfinite(found["grad_depthwise_weights[0]"]), used)
    columns = torch.zeros(24, 4, 1, 1, dtype=torch.bool)
    columns[12:16, 2] = True
    assert torch.equal(~torch.isfinite(found["grad_pointwise_weights[0]"]), columns)
    assert torch.isfinite(found["grad_depthwise_biases[0]"]).all()
    assert torch.isfinite(found["grad_pointwise_biases[0]"]).all()


def tap_is_used(size: tuple[int, int], place: tuple[int, int], kernel: int) -> Tensor:
    """Which taps [k, k] carry the pixel to a pixel inside the image."""
    offsets = torch.arange(kernel) - kernel // 2
    rows, columns = place[0] - offsets, place[1] - offsets
    return ((rows >= 0) & (rows < size[0]))[:, None] & ((columns >= 0) & (columns < size[1]))[None, :]


@pytest.mark.parametrize("width", range(1, 36))
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_nan_in_every_lane(layout: str, width: int) -> None:
    """A NaN in the first or last pixel of rows of every length: no lane of a vector and no tail swallows it."""
    for kernel in (3, 5):
        arguments = Sample(1, 1, 3, 2, width, kernels=(kernel,)).make(torch.float32)
        clean = arguments["qkv"]
        for channel in range(9):
            for x in {0, width - 1}:
                poisoned = clean.clone()
                poisoned[0, channel, 1, x] = nan
                out = multiscale_aggregate(**arguments | {"qkv": as_layout(poisoned, layout)}, backend="cpu")[0]
                reached = torch.zeros(1, 9, 2, width, dtype=torch.bool)
                first = channel // 3 * 3
                reached[0, first : first + 3] = neighbourhood((2, width), 1, x, kernel)
                assert torch.equal(torch.isnan(out), reached)


@pytest.mark.parametrize(("backend", "dtype"), executors(DTYPES), ids=str)
def test_nan_in_a_weight(backend: str, dtype: torch.dtype) -> None:
    """A NaN in the middle tap reaches every pixel of its group; one in a pointwise weight, its channel."""
    arguments = Sample(2, 2, 8, 5, 6, kernels=(3,)).make(dtype)
    arguments["depthwise_weights"][0][5, 0, 1, 1] = nan
    arguments["pointwise_weights"][0][17, 2] = nan
    (out,) = multiscale_aggregate(**on_device(arguments, backend), backend=backend)
    reached = torch.zeros(48, dtype=torch.bool)
    reached[:8] = True
    reached[17] = True
    assert torch.equal(torch.isnan(out).cpu(), reached[None, :, None, None].expand(out.shape))


@pytest.mark.parametrize("backend", NATIVE)
def test_nan_in_grad_out(backend: str) -> None:
    """It reaches the k x k pixels around it in its group and image, and the weights of its group."""
    sample = Sample(2, 2, 8, 7, 9, kernels=(3,), biases=True)
    arguments = as_leaves(on_device(sample.make(torch.float32), backend))
    (out,) = multiscale_aggregate(**arguments, backend=backend)
    grad_out = torch.ones_like(out)
    grad_out[1, 9, 3, 4] = nan
    named = tensors_of(arguments)
    found = torch.autograd.grad(out, list(named.values()), grad_out)
    grads = {name: grad.cpu() for name, grad in zip(named, found, strict=True)}
    reached = torch.zeros(2, 48, 7, 9, dtype=torch.bool)
    reached[1, 8:16] = neighbourhood((7, 9), 3, 4, 3)
    assert torch.equal(torch.isnan(grads["qkv"]), reached)
    group = torch.zeros(48, dtype=torch.bool)
    group[8:16] = True
    row = torch.zeros(48, dtype=torch.bool)
    row[9] = True
    expected = {"depthwise_weights[0]": group, "depthwise_biases[0]": group}
    for name, channels in (expected | {"pointwise_weights[0]": row, "pointwise_biases[0]": row}).items():
        assert torch.equal(torch.isnan(grads[name]).view(48, -1).any(1), channels), name


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_e4_e5_large_magnitudes(backend: str, dtype: torch.dtype) -> None:
    """Between the two convolutions nothing is stored: what would overflow float16 there cancels or shrinks again."""
    arguments = Sample(2, 2, 8, 9, 8, kernels=(5,)).make(dtype)
    arguments["qkv"].fill_(3e4)
    arguments["depthwise_weights"][0].fill_(1.0)
    arguments["pointwise_weights"][0].fill_(2**-8)
    (out,) = multiscale_aggregate(**on_device(arguments, backend), backend=backend)
    assert torch.isfinite(out).all()
    inside = out[:, :, 2:-2, 2:-2].cpu().float()
    assert torch.allclose(inside, arguments["qkv"][0, 0, 0, 0].float() * 25 * 8 / 256, rtol=8e-3)
    found = run(arguments, backend)
    assert all(torch.isfinite(found[name]).all() for name in ("out[0]", "grad_qkv"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_overflow_is_kept_as_inf(backend: str) -> None:
    """Not clamped: inf is what a float16 convolution gives there."""
    arguments = Sample(1, 1, 2, 6, 6, kernels=(3,)).make(torch.float16)
    for tensor in (arguments["qkv"], *arguments["depthwise_weights"], *arguments["pointwise_weights"]):
        tensor.fill_(300.0)
    arguments["pointwise_weights"][0][1] = -300.0
    (out,) = multiscale_aggregate(**arguments, backend=backend)
    assert (out[:, 0] == inf).all()
    assert (out[:, 1] == -inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_e27_flush_denormal(backend: str) -> None:
    """Values below the smallest normal number: finite, and the caller's mode is still on afterwards."""
    arguments = Sample(1, 1, 8, 5, 5, kernels=(3,)).make(torch.float32)
    arguments["qkv"].mul_(1e-38)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        found = run(arguments, backend)
        flushing = torch.tensor(1e-39) * 0.5 == 0
    finally:
        torch.set_flush_denormal(False)
    assert flushing
    assert all(torch.isfinite(result).all() for result in found.values())


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0), (0, 0, 0)])
@pytest.mark.parametrize(("backend", "dtype"), executors(DTYPES), ids=str)
def test_e15_e16_empty_inputs(backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Empty outputs, and gradients of the weights that are exactly zero."""
    batch, height, width = shape
    for layout in ("nchw", "channels_last"):
        sample = Sample(batch, 2, 8, height, width, kernels=(3, 5), layout=layout, biases=True)
        found = run(sample.make(dtype), backend)
        for name in ("out[0]", "out[1]", "grad_qkv"):
            assert found[name].shape == (batch, 48, height, width)
        for name, result in found.items():
            assert result.dtype == dtype
            assert not result.any(), name
            assert not torch.isnan(result).any(), name


@pytest.mark.parametrize("backend", EXECUTORS)
def test_no_channels(backend: str) -> None:
    device = device_of(backend)
    weights = [torch.zeros(0, 1, 3, 3, device=device)], [torch.zeros(0, 8, 1, 1, device=device)]
    (out,) = multiscale_aggregate(torch.zeros(2, 0, 4, 4, device=device), *weights, head_dim=8, backend=backend)
    assert out.shape == (2, 0, 4, 4)


def test_values_next_to_the_input_do_not_matter() -> None:
    """Inputs inside a buffer full of NaN: the padding is zero, whatever lies beyond the edge in memory."""
    for dim, height, width, kernel in ((16, 5, 3, 5), (8, 1, 17, 3), (5, 3, 7, 7), (32, 2, 9, 5), (4, 8, 32, 9)):
        arguments = Sample(2, 2, dim, height, width, kernels=(kernel,), biases=True).make(torch.float32)
        expected = run(arguments, "cpu")
        guarded = torch.full((2, 6 * dim + 2, height + 2, width + 2), nan)
        view = guarded[:, 1:-1, 1:-1, 1:-1].copy_(arguments["qkv"])
        assert not view.is_contiguous()
        found = run(arguments | {"qkv": view}, "cpu")
        for name, result in expected.items():
            assert torch.equal(found[name], result), name
        assert torch.isnan(guarded).sum() == guarded.numel() - view.numel()


def test_misaligned_pointers() -> None:
    """An address that is no multiple of the vector width: the same bits."""
    arguments = Sample(1, 2, 8, 9, 7, kernels=(5,), biases=True).make(torch.float32)
    expected = run(arguments, "cpu")
    for offset in range(1, 8):
        shifted = {
            name: [at_offset(tensor, offset) for tensor in value] if isinstance(value, list) else value
            for name, value in arguments.items()
        }
        found = run(shifted | {"qkv": at_offset(arguments["qkv"], offset)}, "cpu")
        assert all(torch.equal(found[name], result) for name, result in expected.items()), offset


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    buffer = torch.full((tensor.numel() + offset,), nan)
    return buffer[offset:].view(tensor.shape).copy_(tensor)
