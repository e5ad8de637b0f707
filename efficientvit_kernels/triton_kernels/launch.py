"""What all launchers share: one place that launches, dtype and stride facts, the precision of matrix products.

Inside `recording()` nothing runs: launches are collected with their arguments, so that the very variants that a shape
would launch can be compiled for any architecture without a GPU (`resources.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

MAX_GRID = 2**31 - 1
# Tokens have indices of 32 bits, and the last split may end a 32nd beyond them.
MAX_TOKENS = 2**31 - 2**27


@dataclass(frozen=True)
class Launch:
    """One kernel launch: positional arguments as given, `meta` the constexprs and compiler options."""

    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    meta: dict[str, Any]


_launches = 0
_recorded: list[Launch] | None = None
_recorded_arch = ""


def launches() -> int:
    """Triton launches so far in this process: proof that kernels ran, and how many a call takes."""
    return _launches


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Collects launches instead of launching, as they would be on `arch`, e.g. "sm_90"; for meta tensors."""
    global _recorded, _recorded_arch
    _recorded, _recorded_arch = [], arch
    try:
        yield _recorded
    finally:
        _recorded = None


def launch(kernel: Any, grid: int, *arguments: Any, num_warps: int, num_stages: int, **constexprs: Any) -> None:
    """Runs `kernel` on a one-dimensional grid, on the current stream of the current device. A warp: 32 threads."""
    global _launches
    if grid == 0:
        return
    if grid > MAX_GRID:
        raise NotImplementedError(f"triton: grid must be at most {MAX_GRID} programs, got {grid}: use smaller batches")
    # Its default changes between versions; with it the products and sums of an output are fused multiply-adds.
    meta = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **constexprs}
    if _on_amd():
        meta["num_warps"] = max(1, num_warps // 2)  # of 64 threads
        meta.pop("maxnreg", None)  # of NVIDIA's compiler alone
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, meta))
        return
    kernel[(grid,)](*arguments, **meta)
    _launches += 1


def _on_amd() -> bool:
    return torch.version.hip is not None if _recorded is None else _recorded_arch.startswith("gfx")


def arch_of(tensor: Tensor) -> str:
    """ "sm_90", "gfx942", ...: the row of the configuration table; "sm_80" in the interpreter."""
    if _recorded is not None:
        return _recorded_arch
    if tensor.device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(tensor.device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return f"sm_{major}{minor}"


def product_precision(dtype: torch.dtype) -> str:
    """How fp32 operands enter a matrix product: IEEE for fp32 storage unless torch's own flag allows TF32.

    A 16-bit value is exact in TF32, so for 16-bit storage only computed operands are rounded, to 11 bits.
    """
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def product_kind(dtype: torch.dtype) -> str:
    """ "half" for 16-bit storage, otherwise the precision of the products: a column of the configuration tables."""
    return product_precision(dtype) if dtype == torch.float32 else "half"


def block_of(size: int) -> int:
    """The power of two that holds `size`; at least 16, the least side of a matrix product."""
    return max(16, int(triton.next_power_of_2(size)))


def token_strides(image: Tensor) -> tuple[int, int, bool]:
    """Strides along H and W of [B, C, H, W], and whether all tokens of a plane lie in one row of stride_w."""
    _, _, height, width = image.shape
    if height * width > MAX_TOKENS:
        raise NotImplementedError(f"triton: an image must have at most {MAX_TOKENS} tokens, got {height * width}")
    stride_h, stride_w = image.stride(2), image.stride(3)
    if width == 1:
        return 0, stride_h, True
    return stride_h, stride_w, height == 1 or stride_h == width * stride_w


def tap_strides(weight: Tensor) -> tuple[int, int, int]:
    """Strides of a depthwise weight [C, 1, k, k] along C and the window, in which offsets have 32 bits."""
    along_window = (weight.shape[2] - 1) * weight.stride(2) + (weight.shape[3] - 1) * weight.stride(3)
    if along_window >= 2**31:
        raise NotImplementedError(f"triton: a window must lie in less than 2^31 elements, got {along_window + 1}")
    return weight.stride(0), weight.stride(2), weight.stride(3)
