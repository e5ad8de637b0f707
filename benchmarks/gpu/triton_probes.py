"""Small Triton kernels that measure the machine, not this package. Imported where Triton is there."""

# mypy: ignore-errors
# Triton's decorators and its language have no types.

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

# Tiles of output rows and columns, depth, warps, stages.
MATMUL_CONFIGS = (
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 4, 4),
    (128, 256, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 64, 64, 4, 4),
)
FMA_BLOCK, FMA_STEPS = 4096, 2048


@triton.jit
def empty_kernel(p):
    pass


@triton.jit
def matmul_kernel(
    a,
    b,
    c,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MMA_SYNC: tl.constexpr,  # not read: it gives the two ways of compiling two entries in Triton's cache
):
    """c [M, N] = a [M, K] b [K, N], all contiguous; M, N, K multiples of the tiles."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    p_a = a + o_m[:, None] * K + o_k[None, :]
    p_b = b + o_k[:, None] * N + o_n[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        sums = tl.dot(tl.load(p_a), tl.load(p_b), sums)
        p_a += BLOCK_K
        p_b += BLOCK_K * N
    tl.store(c + o_m[:, None] * N + o_n[None, :], sums.to(c.dtype.element_ty))


@triton.jit
def fma_kernel(p, factor, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """STEPS fused multiply-adds in float32 on every element; BLOCK / threads independent chains per thread."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p + o)
    for _ in range(STEPS):
        x = x * factor + 1.0
    tl.store(p + o, x)


@triton.jit
def half2_kernel(p, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """The same on pairs of float16, with the instruction for pairs."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p + o)
    factor = x * 0.0 + 0.5
    for _ in range(STEPS):
        x = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $2;", "=r,r,r", [x, factor], dtype=tl.float16, is_pure=True, pack=2
        )
    tl.store(p + o, x)


@triton.jit
def out_of_bounds_kernel(p, BLOCK: tl.constexpr):
    """A planted fault: writes behind the end of p. A sanitizer that works reports it."""
    o = tl.arange(0, BLOCK)
    tl.store(p + BLOCK * 1024 + o, o.to(tl.float32))


def matmul(a, b, out, config, mma_sync):
    """One launch; returns the compiled kernel. With `mma_sync` it is compiled for the instruction of Ampere, which
    Triton chooses when the environment says DISABLE_MMA_V3=1; without, as Triton does by default."""
    rows, columns, depth, warps, stages = config
    (M, K), N = a.shape, b.shape[1]
    before = os.environ.get("DISABLE_MMA_V3")
    if mma_sync:
        os.environ["DISABLE_MMA_V3"] = "1"
    try:
        return matmul_kernel[(M // rows, N // columns)](
            a, b, out, M, N, K, rows, columns, depth, mma_sync, num_warps=warps, num_stages=stages
        )
    finally:
        if before is None:
            os.environ.pop("DISABLE_MMA_V3", None)
        else:
            os.environ["DISABLE_MMA_V3"] = before


def instructions(compiled) -> list[str]:
    """Which matrix instructions a compiled kernel holds: what was asked for is not always what comes."""
    ptx = compiled.asm["ptx"]
    return [name for name in ("wgmma.mma_async", "mma.sync", "tcgen05.mma") if name in ptx]


def fma(x):
    return fma_kernel[(x.numel() // FMA_BLOCK,)](x, 0.5, FMA_BLOCK, FMA_STEPS, num_warps=4)


def half2(x):
    return half2_kernel[(x.numel() // FMA_BLOCK,)](x, FMA_BLOCK, FMA_STEPS, num_warps=4)


def empty(x):
    return empty_kernel[(1,)](x)


def out_of_bounds():
    out_of_bounds_kernel[(1,)](torch.empty(256, device="cuda"), 256)
    torch.cuda.synchronize()
