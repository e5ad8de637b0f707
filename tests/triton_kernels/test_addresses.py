"""Addresses: nothing outside of the tensors is touched, nothing is written twice, offsets have 64 bits.

Large offsets come from tensors whose elements lie 2^30 apart, in memory that is reserved and never filled: what the
system gives are the few pages that are touched.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from efficientvit_kernels.testing import make_qkv
from efficientvit_kernels.triton_kernels import lite_mla, multiscale_aggregate, pointwise, relu_linear_attention
from efficientvit_kernels.triton_kernels.launch import launch, recording
from efficientvit_kernels.triton_kernels.tile import kernel
from tests.ops.aggregate_samples import Sample

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="memory that is not there, and watched addresses"),
]
FAR = 2**30
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python names from 3.12 on
AXES = {"images": 0, "channels": 1, "rows": 2, "columns": 3}


def far_apart(shape: Sequence[int], axis: int, dtype: torch.dtype, step: int = FAR) -> Tensor:
    """A tensor whose elements lie `step` apart along one axis, and are packed along the others."""
    strides, packed = [0] * len(shape), 1
    for i in reversed(range(len(shape))):
        strides[i] = step if i == axis else packed
        packed *= 1 if i == axis else shape[i]
    if axis == 3 and len(shape) == 4:
        strides[2] = step * shape[3]  # whole rows, so that tokens lie in one row
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def spread(tensor: Tensor, axis: int, step: int = FAR) -> Tensor:
    return far_apart(tensor.shape, axis, tensor.dtype, step).copy_(tensor)


@contextmanager
def outputs_far_apart(axis: int, step: int = FAR) -> Iterator[None]:
    """The images that the launchers allocate are of this kind, too."""

    def empty_image(like: Tensor, channels: int) -> Tensor:
        image = far_apart((like.shape[0], channels, *like.shape[2:]), axis, like.dtype, step)
        return image.fill_(float("nan"))

    with ExitStack() as stack:
        for module in (relu_linear_attention, multiscale_aggregate, lite_mla, pointwise):
            stack.enter_context(patch.object(module, "empty_image", empty_image))
        yield


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for i, pair in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(*pair), i


# Batch, heads, head dim, H, W: three along the axis, so that the last lie beyond 2^31, and more than one head.
SHAPES = {"images": (3, 1, 1, 1, 2), "channels": (1, 2, 3, 1, 2), "rows": (1, 1, 1, 3, 2), "columns": (1, 1, 1, 1, 3)}


@pytest.mark.parametrize(
    ("head_dim", "axis"), [*((2, axis) for axis in AXES), *((66, axis) for axis in AXES if axis != "images")]
)
def test_attention(head_dim: int, axis: str) -> None:
    """66: several blocks of rows of the state, which change nothing of how images are addressed."""
    batch, heads, _, height, width = SHAPES[axis]
    qkv = make_qkv(batch, heads, head_dim, height, width, dtype=torch.float16)[0]
    grad_out = make_qkv(batch, heads, head_dim, height, width, dtype=torch.float16, seed=1)[0][:, : heads * head_dim]

    def results(qkv: Tensor, grad_out: Tensor) -> list[Tensor]:
        out, state = relu_linear_attention.relu_linear_attention_fwd([qkv], head_dim, 1e-15)
        (grad,) = relu_linear_attention.relu_linear_attention_bwd(grad_out, [qkv], state, head_dim, 1e-15, [0])
        return [out, state, grad]

    expected = results(qkv, grad_out)
    # Allocated images have their tokens in one row.
    with outputs_far_apart(3 if axis == "rows" else AXES[axis]):
        same(results(spread(qkv, AXES[axis]), spread(grad_out, AXES[axis])), expected)


def test_attention_of_columns_far_apart() -> None:
    """Whose rows lie beside each other, so that tokens do not lie in one row."""
    qkv = make_qkv(1, 1, 1, 2, 3, dtype=torch.float16)[0]
    far = spread(qkv.transpose(2, 3), 2).transpose(2, 3)
    expected = relu_linear_attention.relu_linear_attention_fwd([qkv], 1, 1e-15)
    same(relu_linear_attention.relu_linear_attention_fwd([far], 1, 1e-15), expected)


def test_gradient_of_more_channels_than_a_program_has() -> None:
    """The first channel of the second block lies beyond 2^31 already where channels are 2^27 apart."""
    arguments = Sample(1, 1, 6, 1, 2, (1,)).make(torch.float16)
    qkv, lists = arguments["qkv"], [arguments[name] for name in ("depthwise_weights", "pointwise_weights")]
    call = partial(multiscale_aggregate.multiscale_aggregate_bwd, needs_qkv=True, needs_weights=False)
    options = {"depthwise_biases": [], "head_dim": 6, "needs_biases": False}
    expected = call([qkv.flip(3)], qkv, *lists, **options)
    with outputs_far_apart(1, 2**27):
        same(call([qkv.flip(3)], spread(qkv, 1, 2**27), *lists, **options), expected)


@pytest.mark.parametrize(
    ("k", "axis"),
    [
        *((3, axis) for axis in AXES),
        (7, "channels"),
        pytest.param(7, "images", marks=pytest.mark.nightly),
        (9, "columns"),
    ],
)
def test_aggregation(k: int, axis: str) -> None:
    """Gradients in one launch, one by one, and no gradients of a window that is not unrolled: it would take long."""
    batch, _, dim, height, width = SHAPES[axis]
    arguments = Sample(batch, 1, dim, height, width, (k,), biases=True).make(torch.float16)
    parameters = [list(arguments[name]) for name in ("depthwise_weights", "pointwise_weights", "depthwise_biases")]
    qkv, addend = arguments["qkv"], arguments["qkv"].flip(1)

    def results(qkv: Tensor, addend: Tensor, lists: list[list[Tensor]], biases: list[Tensor]) -> list[Tensor]:
        out = multiscale_aggregate.multiscale_aggregate_fwd(qkv, *lists, biases, dim)
        grads = multiscale_aggregate.multiscale_aggregate_bwd(
            [addend], qkv, *lists, dim, True, k < 9, False, addend=addend
        )
        return [*out, *grads]

    expected = results(qkv, addend, parameters, arguments["pointwise_biases"])
    with outputs_far_apart(AXES[axis]):
        if axis == "channels":  # and those of the weights
            parameters = [[spread(tensor, 0) for tensor in tensors] for tensors in parameters]
            arguments["pointwise_biases"] = [spread(tensor, 0) for tensor in arguments["pointwise_biases"]]
        found = results(spread(qkv, AXES[axis]), spread(addend, AXES[axis]), parameters, arguments["pointwise_biases"])
        same(found, expected)
        if axis == "channels":
            parameters[1] = [spread(tensor, 1) for tensor in parameters[1]]
            same(results(qkv, addend, parameters, arguments["pointwise_biases"]), expected)


def fused_block(qkv: Tensor, aggregation: Any, head_dim: int) -> list[Tensor]:
    """States and output of the two fused kernels of lite_mla, for one scale."""
    configs = lite_mla._fused(qkv, aggregation[0], head_dim)
    assert configs is not None
    states = lite_mla._aggregated_states(qkv, aggregation, configs[0], head_dim)
    out = lite_mla.empty_image(qkv, 2 * qkv.shape[1] // 3)
    lite_mla._aggregate_and_apply(qkv, aggregation, configs[1], states, None, out, head_dim, 1e-15)
    return [states, out]


PARAMETERS = ("depthwise_weights", "pointwise_weights", "depthwise_biases", "pointwise_biases")


@pytest.mark.parametrize("axis", AXES)
def test_fused_block(axis: str) -> None:
    batch, heads, dim, height, width = SHAPES[axis]
    arguments = Sample(batch, heads, dim, height, width, (3,), biases=True).make(torch.float16)
    aggregation = [arguments[name] for name in PARAMETERS]
    expected = fused_block(arguments["qkv"], aggregation, dim)
    with outputs_far_apart(AXES[axis]):
        if axis == "channels":
            aggregation = [[spread(tensor, 0) for tensor in tensors] for tensors in aggregation]
        same(fused_block(spread(arguments["qkv"], AXES[axis]), aggregation, dim), expected)


def test_fused_block_with_weights_of_any_strides() -> None:
    arguments = Sample(1, 1, 4, 2, 3, (3,), biases=True).make(torch.float32)
    aggregation = [arguments[name] for name in PARAMETERS]

    def strided(tensor: Tensor, step: int) -> Tensor:
        return torch.stack([tensor] * step, dim=-1)[..., 0]

    steps = [[strided(tensor, 2 + i) for tensor in tensors] for i, tensors in enumerate(aggregation)]
    same(fused_block(arguments["qkv"], steps, 4), fused_block(arguments["qkv"], aggregation, 4))


def test_fused_block_in_tf32() -> None:
    """Every operand is rounded, or the watch would say so."""
    arguments = Sample(1, 1, 4, 2, 3, (3,), biases=True).make(torch.float32)
    call = partial(fused_block, arguments["qkv"], [arguments[name] for name in PARAMETERS], 4)
    expected = call()
    torch.set_float32_matmul_precision("high")
    try:
        found = call()
    finally:
        torch.set_float32_matmul_precision("highest")
    for tf32, ieee in zip(found, expected, strict=True):
        assert 1e-6 < (tf32 - ieee).abs().max() / ieee.abs().max() < 1e-2  # operands of 11 bits


def test_fused_block_beside_nan() -> None:
    """Another head leaves no trace, not even where lanes beyond the head dim meet zeros."""
    dim = 5
    arguments = Sample(1, 2, dim, 4, 5, (3,), biases=True).make(torch.float32)
    aggregation = [arguments[name] for name in PARAMETERS]
    states, out = fused_block(arguments["qkv"], aggregation, dim)
    for tensor in (arguments["qkv"][0], *(tensor for tensors in aggregation for tensor in tensors)):
        tensor[3 * dim :] = float("nan")
    found_states, found = fused_block(arguments["qkv"], aggregation, dim)
    for scale in (0, 1):  # two heads each
        assert torch.equal(found_states[:, 2 * scale], states[:, 2 * scale])
        mine = slice(2 * scale * dim, (2 * scale + 1) * dim)
        assert torch.equal(found[:, mine], out[:, mine])


@pytest.mark.parametrize("axis", AXES)
def test_product_with_epilogue(axis: str) -> None:
    x = make_qkv(3 if axis == "images" else 1, 1, 1, 3, 2, dtype=torch.float16)[0]
    weight, residual = torch.randn(3, 3, 1, 1, dtype=torch.float16), x.flip(1)

    def results(weight: Tensor, x: Tensor, residual: Tensor) -> list[Tensor]:
        return [pointwise.product_with_epilogue(weight, x, None, None, residual, like=x)]

    expected = results(weight, x, residual)
    flat = 3 if axis == "rows" else AXES[axis]
    with outputs_far_apart(flat):
        same(results(weight, spread(x, flat), spread(residual, AXES[axis])), expected)
        if axis in ("images", "channels"):
            same(results(spread(weight, AXES[axis]), x, residual), expected)


@pytest.mark.parametrize("what", ["x", "weight"])
def test_product_of_more_channels_than_a_step_has(what: str) -> None:
    """The first channel of the second step lies beyond 2^31 already where channels are 2^25 apart."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(1, 65, 1, 2, generator=generator), torch.randn(2, 65, 1, 1, generator=generator))
    tensors = {"weight": weight.half(), "x": x.half()}
    call = partial(pointwise.product_with_epilogue, scale=None, shift=None, residual=None, like=tensors["x"])
    expected = call(**tensors)
    same([call(**tensors | {what: spread(tensors[what], 1, 2**25)})], [expected])


def test_planes_of_too_many_tokens_are_refused() -> None:
    """Tokens have indices of 32 bits."""
    for width, accepted in ((2**15 - 2**11, True), (2**15, False)):
        qkv = torch.empty(1, 3, 2**16, width, dtype=torch.float16, device="meta")
        with recording("sm_90") as launches:
            if accepted:
                relu_linear_attention.relu_linear_attention_fwd([qkv], 1, 1e-15)
            else:
                with pytest.raises(NotImplementedError, match=r"an image must have at most \d+ tokens, got 2147483648"):
                    relu_linear_attention.relu_linear_attention_fwd([qkv], 1, 1e-15)
        assert len(launches) == 2 * accepted


def test_windows_whose_taps_lie_too_far_apart_are_refused() -> None:
    """As rows of 2^30 elements, which are there twice in a window of three; offsets in a window have 32 bits."""
    qkv, pointwise = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in ((1, 3, 2, 2), (3, 1, 1, 1)))
    depthwise = torch.empty_strided((3, 1, 3, 3), (3, 3, 2**30, 1), dtype=torch.float16, device="meta")
    with recording("sm_90") as launches, pytest.raises(NotImplementedError, match="a window must lie in less than 2"):
        multiscale_aggregate.multiscale_aggregate_fwd(qkv, [depthwise], [pointwise], [], [], 1)
    assert launches == []


def test_images_of_too_many_tokens_do_not_join() -> None:
    x = torch.empty(2**15, 16, 2**8, 2**8, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
    weight = torch.empty(16, 16, 1, 1, dtype=torch.float16, device="meta")
    for images, batch in ((2**14, 1), (2**15, 2**15)):
        with recording("sm_90") as launches:
            pointwise.product_with_epilogue(weight, x[:images], None, None, None, like=x[:images])
        (found,) = launches
        tokens = images * 2**16 // batch
        assert found.grid == batch * -(-tokens // found.meta["BLOCK_N"])
        assert found.arguments[found.kernel.arg_names.index("tokens")] == tokens


@kernel
def faulty_kernel(x, y, SIZE: tl.constexpr, FAULT: tl.constexpr):
    o = tl.arange(0, SIZE)
    if FAULT == "read":
        tl.store(y + o, tl.load(x + o), mask=o < SIZE - 1)
    if FAULT == "gap":
        tl.store(y + 2 * o + 1, tl.load(x + o, mask=o < 0, other=0.0))
    if FAULT == "write":
        tl.store(y + 2 * o, tl.load(x + o, mask=o < SIZE - 1, other=0.0))
    if FAULT == "mask":
        tl.store(y + 2 * o, tl.zeros((SIZE,), tl.float32), mask=(o < 1) & (tl.program_id(0) == 0))
    if FAULT == "twice":
        tl.store(y + 2 * o, tl.zeros((SIZE,), tl.float32), mask=o < 1)
    if FAULT in ("tf32", "ieee"):
        a = tl.zeros((SIZE, SIZE), tl.float32) + 0.1
        b = tl.dot(a, a, input_precision=FAULT)
        tl.store(y + 2 * o, tl.sum(b, axis=0), mask=o < 1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("read", "a read of what is no element"),
        ("gap", "a write of what is no element"),
        ("write", "a write of what is no element"),
        ("mask", "the mask of a write must be of truth values, got int32"),
        ("twice", "an element is written twice"),
        ("tf32", "a product must be in ieee, got tf32"),
        ("ieee", ""),
    ],
)
def test_faults_are_found(fault: str, message: str) -> None:
    x, y = torch.zeros(15), torch.zeros(30)[::2]
    programs = 2 if fault == "twice" else 1
    if not message:
        launch(faulty_kernel, programs, x, y, SIZE=16, FAULT=fault, num_warps=1, num_stages=1)
        return
    with pytest.raises(Exception, match=message):
        launch(faulty_kernel, programs, x, y, SIZE=16, FAULT=fault, num_warps=1, num_stages=1)


def test_operands_that_are_not_rounded_are_found() -> None:
    x, y = torch.zeros(15, dtype=torch.bfloat16), torch.zeros(30)[::2]
    with pytest.raises(Exception, match="an operand of a product in TF32 is not rounded"):
        launch(faulty_kernel, 1, x, y, SIZE=16, FAULT="tf32", num_warps=1, num_stages=1)
