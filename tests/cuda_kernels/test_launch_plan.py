"""The launch plan of the CUDA kernels: a pure function, asked through the introspection module."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import pytest
import torch

from benchmarks.gpu.tune import InLaunches
from efficientvit_kernels import FusedLiteMLA, lite_mla
from efficientvit_kernels._launch_plan import launch_plan
from efficientvit_kernels.ops._backends import CUDA_HEAD_DIMS, CUDA_KERNEL_SIZES
from tests.cuda_emulator.ops import emulated_ops
from tests.ops.lite_mla_samples import Sample as LiteMLASample

native = pytest.importorskip("efficientvit_kernels._C", reason="the introspection module was not built")

KERNELS = ("kv_state", "apply", "grad_state", "grad_kv")
TOKENS = (1, 49, 63, 64, 65, 196, 256, 257, 1024, 2048, 2049, 8192, 16384, 2**20)


def plan(tokens: int, head_dim: int, heads: int = 16, fp32: bool = False, multiprocessors: int = 132) -> dict[str, Any]:
    found: dict[str, Any] = native.cuda_relu_linear_attention_plan(heads, tokens, head_dim, fp32, multiprocessors)
    return found


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("head_dim", CUDA_HEAD_DIMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_token_has_a_block(tokens: int, head_dim: int, fp32: bool) -> None:
    for heads in (1, 16, 3000):
        found = plan(tokens, head_dim, heads, fp32)
        for kernel in KERNELS:
            blocks, rest = divmod(found[kernel]["grid"], heads)
            assert rest == 0
            assert (blocks - 1) * found[kernel]["block_tokens"] < tokens <= blocks * found[kernel]["block_tokens"]
            assert found[kernel]["threads"] in (32, 64, 128)
            # Rows of a state are shared by up to four warps at D = 64; a block of 32-bit storage is always whole.
            assert found[kernel]["threads"] == 128 or (head_dim < 64 and not fp32)
            # What the smallest multiprocessors (compute capability 8.6, 8.9, 12.0) give one block.
            assert 0 < found[kernel]["shared_bytes"] + found[kernel]["stage_bytes"] <= 99 * 1024


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_sums_depend_on_the_image_alone(tokens: int, fp32: bool) -> None:
    """The bits of a sum must not depend on the batch, on other heads or on the GPU."""
    one = plan(tokens, 32, 1, fp32)
    for heads, multiprocessors in ((16, 132), (5000, 20)):
        other = plan(tokens, 32, heads, fp32, multiprocessors)
        for kernel in ("kv_state", "grad_state"):
            assert {**one[kernel], "grid": 0} == {**other[kernel], "grid": 0}
        assert one["splits"] == other["splits"] <= 32
        assert one["sums_splits"] == other["sums_splits"] == (one["splits"] > 8)


def test_large_batches_load_a_state_for_more_tokens() -> None:
    """At batch 1 every tile has a block of its own; a batch of 64 fills the GPU with fewer, larger ones."""
    small, large = plan(4096, 32, 16)["apply"], plan(4096, 32, 16 * 64)["apply"]
    assert small["block_tokens"] == 256
    assert large["block_tokens"] > small["block_tokens"]
    assert large["grid"] >= 4 * 132


def test_bad_arguments_are_told() -> None:
    for arguments in ((0, 1, 8), (1, 0, 8), (1, 1, 12)):
        with pytest.raises(ValueError, match="must be positive, head_dim 8, 16, 32 or 64"):
            native.cuda_relu_linear_attention_plan(*arguments, False, 132)


IMAGES = ((1, 1), (7, 7), (14, 14), (16, 16), (32, 64), (1, 700), (700, 1), (33, 47), (128, 128))
SMALLEST_SHARED = 99 * 1024  # what compute capability 8.6, 8.9 and 12.0 give one block
LARGEST_SHARED = 227 * 1024


@pytest.mark.parametrize("size", CUDA_KERNEL_SIZES)
@pytest.mark.parametrize("head_dim", CUDA_HEAD_DIMS)
def test_every_pixel_has_a_tile(head_dim: int, size: int) -> None:
    for height, width in IMAGES:
        for shared in (SMALLEST_SHARED, LARGEST_SHARED):
            plans = [
                native.cuda_multiscale_aggregate_plan(3, 2, height, width, head_dim, size, fp32, shared)[kernel]
                for fp32 in (False, True)
                for kernel in ("forward", "gradients")
            ]
            block = native.cuda_lite_mla_plan(3, 2, height, width, head_dim, size, 128, 132, shared)
            assert block["fused"] == (head_dim <= 32)
            plans += [block[kernel] for kernel in ("state", "apply") if block["fused"]]
            for plan in plans:
                down, across = -(-height // plan["rows"]), -(-width // plan["cols"])
                assert plan["tiles"] == down * across
                assert plan["threads"] in (32, 64, 128)
                assert plan["shared_bytes"] <= shared


@pytest.mark.parametrize("shared", [SMALLEST_SHARED, LARGEST_SHARED])
def test_two_launches_cover_the_image(shared: int) -> None:
    served = 0
    for (height, width), size in itertools.product(IMAGES, CUDA_KERNEL_SIZES):
        for channels, heads, dim in ((64, 4, 16), (128, 8, 16), (128, 4, 32), (32, 1, 32), (16, 1, 8), (64, 8, 8)):
            plan = native.cuda_two_launches_plan(3, channels, heads, height, width, dim, size, 128, shared)
            served += plan["served"]
            for name in ("state", "apply") if plan["served"] else ():
                down, across = -(-height // plan[name]["rows"]), -(-width // plan[name]["cols"])
                assert plan[name]["tiles"] == down * across
                assert plan[name]["shared_bytes"] <= shared
            if plan["served"]:
                assert heads * plan["apply"]["rows"] * plan["apply"]["cols"] <= 64 * plan["apply"]["threads"] // 32
                assert plan["apply"]["grid"] == 3 * plan["apply"]["tiles"]
    assert served >= 70
    for odd in ((256, 8, 32), (64, 16, 8), (24, 1, 8), (64, 1, 64)):
        channels, heads, dim = odd
        assert not native.cuda_two_launches_plan(1, channels, heads, 14, 14, dim, 5, 64, LARGEST_SHARED)["served"]


@pytest.mark.parametrize("head_dim", CUDA_HEAD_DIMS)
def test_runs_share_the_tiles_of_all_images(head_dim: int) -> None:
    for batch in (1, 2, 31, 32, 33, 1000):
        plan = native.cuda_multiscale_aggregate_plan(batch, 2, 33, 47, head_dim, 5, False, LARGEST_SHARED)["gradients"]
        tasks = batch * plan["tiles"]
        assert plan["runs"] <= min(32, tasks)
        assert plan["runs"] >= min(tasks, 16)
        assert plan["grid"] == plan["runs"] * 6 * head_dim // 8


def test_a_projection_of_few_tokens_takes_smaller_tiles() -> None:
    def plan(batch: int) -> dict[str, Any]:
        found: dict[str, Any] = native.cuda_lite_mla_plan(batch, 8, 14, 14, 16, 5, 128, 132, LARGEST_SHARED)
        return found["projection"]  # type: ignore[no-any-return]

    assert plan(1) == {"grid": 2 * 7, "threads": 128, "tokens": 32, "shared_bytes": 3 * 96 * 40 * 2}
    assert plan(64)["tokens"] == 64
    assert plan(64)["grid"] == 2 * 64 * 196 // 64


def test_bad_images_are_told() -> None:
    for arguments in ((0, 1, 1, 1, 8, 5), (1, 1, 0, 1, 8, 5), (1, 1, 1, 1, 12, 5), (1, 1, 1, 1, 8, 9)):
        with pytest.raises(ValueError, match="kernel_size 3, 5 or 7"):
            native.cuda_multiscale_aggregate_plan(*arguments, False, LARGEST_SHARED)
        with pytest.raises(ValueError, match="kernel_size 3, 5 or 7"):
            native.cuda_lite_mla_plan(*arguments, 128, 132, LARGEST_SHARED)


def test_launches_of_a_block() -> None:
    """Two launches with few channels, four where all is fused; more splits and wide products take their own."""

    def names(*arguments: int, part: str = "inference", **options: Any) -> list[str]:
        return [launch["launch"] for launch in launch_plan(*arguments, **options)[part]]

    two = ["lite_mla_state_kernel", "lite_mla_apply_kernel"]
    assert names(1, 64, 14, 14) == names(100, 64, 14, 14) == two
    assert names(1, 64, 200, 200) == [two[0], "sum_splits_kernel", two[1]]
    fused = ["torch: product for qkv", "aggregate_kv_state_kernel", "aggregate_apply_kernel"]
    assert names(1, 64, 14, 14, part="forward") == [*fused, "projection_kernel"]
    assert names(1, 64, 14, 14, max_shared_bytes=64 * 1024) == [*fused, "projection_kernel"]
    assert names(1, 512, 7, 7, head_dim=32) == [*fused, "torch: projection", "epilogue_kernel"]
    assert names(1, 128, 200, 200)[2] == "sum_splits_kernel"
    apart = ["aggregate_kernel", "kv_state_kernel", "apply_kernel", "torch: projection", "epilogue_kernel"]
    assert names(1, 128, 14, 14, head_dim=64)[1:] == names(1, 128, 14, 14, fp32=True)[1:] == apart
    backward = launch_plan(2, 128, 14, 14)["backward"]
    assert [launch["launch"] for launch in backward[-2:]] == ["aggregate_gradients_kernel", "sum_gradients_kernel"]
    assert all(launch["shared_bytes"] >= 0 and launch["grid"] > 0 for launch in backward[:-1])
    with pytest.raises(ValueError, match="channels must be a multiple of head_dim, got 100 and 16"):
        launch_plan(1, 100, 14, 14)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the emulator's launches")
@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "sample",
    [
        LiteMLASample(1, 32, 2, 16, 7, 9, extras="scale"),
        LiteMLASample(1, 8, 1, 8, 100, 90, extras="shift"),
        LiteMLASample(1, 16, 2, 8, 100, 90, extras="shift"),
    ],
    ids=str,
)
def test_as_many_launches_as_planned(backend: str, sample: LiteMLASample, dtype: torch.dtype) -> None:
    count = emulated_ops().emulated_launches
    count.restype = ctypes.c_int64
    arguments = sample.make(dtype)
    x = arguments["x"].requires_grad_()
    plan = launch_plan(*x.shape, head_dim=sample.head_dim, fp32=dtype == torch.float32, multiprocessors=132)
    planned = {part: sum("torch" not in launch["launch"] for launch in launches) for part, launches in plan.items()}
    before = count()
    with torch.no_grad():
        lite_mla(**arguments, backend=backend)
    assert count() - before == planned["inference"]
    before = count()
    y = lite_mla(**arguments, backend=backend)
    assert count() - before == planned["forward"]
    before = count()
    torch.autograd.grad(y.sum(), x)
    assert count() - before == planned["backward"] - 1  # without gradients of weights nothing adds them up


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the emulator's launches")
@pytest.mark.parametrize("backend", ["cuda"])
def test_launches_can_be_chosen_for_a_comparison(backend: str) -> None:
    """What `make gpu` times side by side, whatever the plan prefers."""
    count = emulated_ops().emulated_launches
    count.restype = ctypes.c_int64
    module = FusedLiteMLA(64, 64, heads=4, dim=16, backend=backend).half().eval()
    x = torch.randn(1, 64, 7, 9).half()
    results = {}
    for two, launches in ((True, 2), (False, 3)):
        before = count()
        with torch.no_grad():
            results[two] = InLaunches(module, two)(x)
        assert count() - before == launches  # the product for qkv is torch's
    assert torch.allclose(results[True], results[False], rtol=0.01, atol=0.01)
    wide = FusedLiteMLA(256, 256, heads=8, dim=32, backend=backend).half().eval()
    with torch.no_grad(), pytest.raises(NotImplementedError, match="do not serve this layer"):
        InLaunches(wide, True)(torch.randn(1, 256, 3, 3).half())
