"""A product in Triton that folds the epilogue of lite_mla's projection in; the others are torch's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from ..ops._fakes import empty_image
from ..ops._products import product
from .launch import MAX_TOKENS, arch_of, launch, token_strides
from .tile import kernel, load, narrowed, stored_operand, token_offsets


@kernel
def pointwise_kernel(
    x, weight, scale, shift, residual, y, tokens, width, blocks_m, blocks_n,
    stride_b, stride_c, stride_n, stride_wo, stride_wi,
    stride_res_b, stride_res_c, stride_res_h, stride_res_w, stride_y_b, stride_y_c, stride_y_n,
    C: tl.constexpr, C_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RESIDUAL_FLAT: tl.constexpr,
):  # fmt: skip
    """y = scale * (W x) + shift + residual on BLOCK_M channels and BLOCK_N tokens; fp32 to the end, rounded once."""
    pid = tl.program_id(0)
    o_m = (pid % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)  # neighbours share their tokens
    o_n = (pid // blocks_m % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_b = (pid // blocks_m // blocks_n).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = (o_m < C_OUT)[:, None], (o_n < tokens)[None, :]
    p_weight = weight + (o_m.to(tl.int64) * stride_wo)[:, None] + (o_k.to(tl.int64) * stride_wi)[None, :]
    p_x = x + i_b * stride_b + (o_k.to(tl.int64) * stride_c)[:, None] + (o_n.to(tl.int64) * stride_n)[None, :]
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, C, BLOCK_K):
        m_k = o_k < C - k
        w = load(p_weight, m_m & m_k[None, :])
        tile = load(p_x, m_k[:, None] & m_n)
        acc = tl.dot(stored_operand(w, "tf32"), stored_operand(tile, "tf32"), acc, input_precision="tf32")
        p_weight += step * stride_wi
        p_x += step * stride_c
    if HAS_SCALE:
        acc *= tl.load(scale + o_m, mask=o_m < C_OUT, other=0.0)[:, None]
    if HAS_SHIFT:
        acc += tl.load(shift + o_m, mask=o_m < C_OUT, other=0.0)[:, None]
    if HAS_RESIDUAL:
        offsets = token_offsets(o_n, width, stride_res_h, stride_res_w, RESIDUAL_FLAT)[None, :]
        p = residual + i_b * stride_res_b + (o_m.to(tl.int64) * stride_res_c)[:, None] + offsets
        acc += load(p, m_m & m_n).to(tl.float32)
    p = y + i_b * stride_y_b + (o_m.to(tl.int64) * stride_y_c)[:, None] + (o_n.to(tl.int64) * stride_y_n)[None, :]
    tl.store(p, narrowed(acc, y.dtype.element_ty), mask=m_m & m_n)


@dataclass(frozen=True)
class ProductConfig:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Predicted: enough programs for the multiprocessors first, then the larger tile. AMD has 64 KB of shared memory.
_FEW = ProductConfig(32, 64, 64, 4, 3)
_SOME = ProductConfig(64, 64, 64, 4, 3)
_MANY = ProductConfig(128, 128, 64, 8, 3)
_AMD = ProductConfig(64, 64, 64, 8, 2)


def product_config(c_out: int, tokens: int, arch: str) -> ProductConfig:
    """For a product of c_out channels and so many tokens in all images."""
    if arch.startswith("gfx"):
        return _AMD
    if -(-c_out // 128) * -(-tokens // 128) >= 128:
        return _MANY
    return _SOME if -(-c_out // 64) * -(-tokens // 64) >= 64 else _FEW


def product_with_epilogue(
    weight: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, like: Tensor
) -> Tensor:
    """scale * (W x) + shift + residual in the format of `like`; x as the kernels allocate it, the vectors in fp32.

    16 bits: one Triton launch, rounded once. fp32: cuBLAS, whose IEEE products no Triton kernel reaches, and torch.
    """
    if x.dtype == torch.float32:
        y = product(weight, x)
        if scale is not None:
            y = y.mul_(scale.view(1, -1, 1, 1))
        if shift is not None:
            y = y.add_(shift.view(1, -1, 1, 1))
        return y if residual is None else y.add_(residual)
    batch, channels, height, width = x.shape
    c_out, tokens = weight.shape[0], height * width
    y = empty_image(like, c_out)
    extra = y if residual is None else residual
    strides, res_strides, y_strides = _strides(x), _strides(extra), _strides(y)
    images = ((x, strides), (extra, res_strides), (y, y_strides))
    if batch * tokens <= MAX_TOKENS and all(_images_join(*image) for image in images):
        batch, tokens, width = 1, batch * tokens, batch * tokens
    config = product_config(c_out, batch * tokens, arch_of(x))
    blocks_m, blocks_n = -(-c_out // config.block_m), -(-tokens // config.block_n)
    launch(
        pointwise_kernel,
        blocks_m * blocks_n * batch,
        *(x, weight, y if scale is None else scale, y if shift is None else shift, extra, y, tokens, width),
        *(blocks_m, blocks_n, *strides[:2], strides[3], weight.stride(0), weight.stride(1)),
        *(*res_strides[:4], *y_strides[:2], y_strides[3]),
        C=channels,
        C_OUT=c_out,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        RESIDUAL_FLAT=res_strides[4],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


def _strides(image: Tensor) -> tuple[int, int, int, int, bool]:
    """Along B, C, H, W, and whether the tokens of a plane lie in one row, stride_w apart."""
    return (image.stride(0), image.stride(1), *token_strides(image))


def _images_join(image: Tensor, strides: tuple[int, int, int, int, bool]) -> bool:
    """Whether the tokens of all images lie in one row."""
    stride_b, _, _, stride_w, flat = strides
    return flat and (image.shape[0] == 1 or stride_b == image.shape[2] * image.shape[3] * stride_w)
