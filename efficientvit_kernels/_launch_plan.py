"""What the CUDA kernels would launch for a LiteMLA: a pure function, which needs no GPU and no CUDA library."""

from __future__ import annotations

from typing import Any

from .ops._cuda_lite_mla import WIDEST_PROJECTION

# Of an H100 or H200.
MULTIPROCESSORS, SHARED_BYTES = 132, 227 * 1024
Launch = dict[str, Any]


def launch_plan(
    batch: int,
    channels: int,
    height: int,
    width: int,
    *,
    head_dim: int = 16,
    kernel_size: int = 5,
    fp32: bool = False,
    multiprocessors: int = MULTIPROCESSORS,
    max_shared_bytes: int = SHARED_BYTES,
) -> dict[str, list[Launch]]:
    """The kernels of "inference", of the "forward" of training, and of the "backward" between its products, in order.

    Args:
        batch, channels, height, width: of the input and the output; heads = channels / head_dim, one scale.
        head_dim: 8, 16, 32 or 64. kernel_size: 3, 5 or 7.
        fp32: float32 storage instead of 16 bits.
        multiprocessors, max_shared_bytes: of the GPU, the latter per block.

    Returns:
        Per launch its name, and for kernels of this package grid, threads, shared memory in bytes and what is tiled;
        "torch" launches are cuBLAS's, and plan themselves.

    Raises:
        ImportError: the introspection module was not built. ValueError: a size that the kernels do not serve.
    """
    from . import _C  # type: ignore[attr-defined, unused-ignore]

    heads = channels // head_dim
    if heads * head_dim != channels:
        raise ValueError(f"launch_plan: channels must be a multiple of head_dim, got {channels} and {head_dim}")
    gpu = (multiprocessors, max_shared_bytes)
    image = (batch, heads, height, width, head_dim, kernel_size)
    attention = _C.cuda_relu_linear_attention_plan(2 * batch * heads, height * width, head_dim, fp32, multiprocessors)
    aggregation = _C.cuda_multiscale_aggregate_plan(*image, fp32, max_shared_bytes)
    fused = _C.cuda_lite_mla_plan(*image, channels, *gpu)
    two = _C.cuda_two_launches_plan(batch, channels, *image[1:], channels, max_shared_bytes)
    sums = [{"launch": "sum_splits_kernel"}] * attention["sums_splits"]
    forward_apart = [
        {"launch": "aggregate_kernel"} | aggregation["forward"],
        {"launch": "kv_state_kernel"} | attention["kv_state"],
        *sums,
        {"launch": "apply_kernel"} | attention["apply"],
    ]
    backward = [
        *forward_apart,
        {"launch": "grad_state_kernel"} | attention["grad_state"],
        *sums,
        {"launch": "grad_kv_kernel"} | attention["grad_kv"],
        {"launch": "aggregate_gradients_kernel"} | aggregation["gradients"],
        {"launch": "sum_gradients_kernel"},
    ]
    between = (
        _summed("aggregate_kv_state_kernel", "aggregate_apply_kernel", fused) if fused["fused"] and not fp32 else []
    )
    narrow = between and channels <= WIDEST_PROJECTION
    projection = [{"launch": "projection_kernel"} | fused["projection"]] if narrow else []
    forward = [
        {"launch": "torch: product for qkv"},
        *(between or forward_apart),
        *(projection or [{"launch": "torch: projection"}, {"launch": "epilogue_kernel"}]),
    ]
    preferred = two["preferred"] and not fp32
    inference = _summed("lite_mla_state_kernel", "lite_mla_apply_kernel", two) if preferred else forward
    return {"inference": inference, "forward": forward, "backward": backward}


def _summed(state: str, apply: str, plan: dict[str, Any]) -> list[Launch]:
    """A kernel that sums states up, and one that applies them."""
    between = [{"launch": "sum_splits_kernel"}] * plan["sums_splits"]
    return [{"launch": state} | plan["state"], *between, {"launch": apply} | plan["apply"]]


def text_of(plan: dict[str, list[Launch]]) -> str:
    lines = []
    for part, launches in plan.items():
        lines.append(f"{part}:")
        for launch in launches:
            rest = ", ".join(f"{name} {value}" for name, value in launch.items() if name != "launch")
            lines.append(f"  {launch['launch']:<28} {rest}".rstrip())
    return "\n".join(lines)
