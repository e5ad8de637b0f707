"""relu_linear_attention in Triton.

Forward: `kv_state_kernel` sums v k'^T and k' over the tokens of one split; `apply_kernel` adds the splits up in their
order and computes out. Backward: `grad_state_kernel` reads q and grad_out, writes grad_q and sums the gradient of the
state; `grad_kv_kernel` applies that to k and v. Every token vector moves once; no atomics, so two runs give the same
bits.

A state is [D + 1, D]: the rows of KV, then z. Programs hold BLOCK_R of its rows; with D above 64, several blocks of
rows make up a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._fakes import empty_image
from .attention_state import last_rows_sum, store_state_rows, sum_of_splits
from .configs import MAX_SUMMED_SPLITS, AttentionConfig, attention_config, tokens_per_split
from .launch import arch_of, block_of, launch, product_kind, product_precision, token_strides
from .tile import kernel, load, narrowed, operand, relu, remainder, rounded, stored_operand, token_offsets


@triton.jit
def _place(splits, heads, ROW_BLOCKS: tl.constexpr):
    """Which image, head, block of rows and split this program works on."""
    pid = tl.program_id(0)
    i_split = pid % splits
    i_r = (pid // splits) % ROW_BLOCKS
    i_bh = pid // splits // ROW_BLOCKS
    return (i_bh // heads).to(tl.int64), i_bh % heads, i_r, i_split


@kernel
def kv_state_kernel(
    qkv, states, width, tokens, split_tokens, splits, heads, groups, first_group,
    stride_b, stride_c, stride_h, stride_w,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ROW_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
    FLAT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """states[b, first_group + head, split] = the rows of sum v k'^T, and sum k', over the tokens of the split."""
    i_b, i_head, i_r, i_split = _place(splits, heads, ROW_BLOCKS)
    o_d, o_r = tl.arange(0, BLOCK_D), i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    p_head = qkv + i_b * stride_b + (i_head * 3 * D).to(tl.int64) * stride_c
    p_k = p_head + (D + o_d).to(tl.int64) * stride_c
    p_v = p_head + (2 * D + o_r).to(tl.int64) * stride_c
    kv, z = tl.zeros((BLOCK_R, BLOCK_D), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    start = i_split * split_tokens
    stop = tl.minimum(start + split_tokens, tokens)
    for n in range(start, stop, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        offsets = token_offsets(o_n, width, stride_h, stride_w, FLAT)[None, :]
        m_n = (o_n < stop)[None, :]
        k = relu(load(p_k[:, None] + offsets, (o_d < D)[:, None] & m_n))  # [D, N]
        v = load(p_v[:, None] + offsets, (o_r < D)[:, None] & m_n)  # [R, N]
        kv = tl.dot(stored_operand(v, PRECISION), tl.trans(stored_operand(k, PRECISION)), kv, input_precision=PRECISION)
        z += tl.sum(k.to(tl.float32), axis=1)
    p_state = states + ((i_b * groups + first_group + i_head) * splits + i_split) * (D + 1) * D
    store_state_rows(p_state, kv, z, o_r, o_d, D)


@kernel
def apply_kernel(
    qkv, states, state, out, eps, width, tokens, block_tokens, splits, blocks, heads, groups, first_group,
    stride_b, stride_c, stride_h, stride_w, stride_out_b, stride_out_c, stride_out_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ROW_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
    FLAT: tl.constexpr, STORE_STATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = KV q' / (z . q' + eps) for a block of tokens; the first one also stores the sum of the splits."""
    i_b, i_head, i_r, i_block = _place(blocks, heads, ROW_BLOCKS)
    o_block = tl.arange(0, BLOCK_R)
    o_r = i_r * BLOCK_R + o_block
    i_group = i_b * groups + first_group + i_head
    p_states = states + i_group * splits * (D + 1) * D
    kv = sum_of_splits(p_states, o_r, o_block, splits, D)  # all of it where it is one block
    z = last_rows_sum(p_states, o_block, splits, D)
    if STORE_STATE:
        if i_block == 0:
            store_state_rows(state + i_group * (D + 1) * D, kv, z, o_r, o_block, D)
            for c in range(BLOCK_R, D, BLOCK_R):
                others = sum_of_splits(p_states, o_r, c + o_block, splits, D)
                others_z = last_rows_sum(p_states, c + o_block, splits, D)
                store_state_rows(state + i_group * (D + 1) * D, others, others_z, o_r, c + o_block, D)
    kv = rounded(kv, PRECISION)
    p_q = qkv + i_b * stride_b + (i_head * 3 * D).to(tl.int64) * stride_c
    p_out = out + i_b * stride_out_b + ((first_group + i_head) * D + o_r).to(tl.int64) * stride_out_c
    start = i_block * block_tokens
    stop = tl.minimum(start + block_tokens, tokens)
    for n in range(start, stop, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        offsets = token_offsets(o_n, width, stride_h, stride_w, FLAT)
        m_n = o_n < stop
        num, den = tl.zeros((BLOCK_R, BLOCK_N), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
        for c in range(0, D, BLOCK_R):
            o_c = c + o_block
            if ROW_BLOCKS > 1:
                kv = rounded(sum_of_splits(p_states, o_r, o_c, splits, D), PRECISION)
                z = last_rows_sum(p_states, o_c, splits, D)
            p = p_q + (o_c.to(tl.int64) * stride_c)[:, None] + offsets[None, :]
            q = relu(load(p, (o_c < D)[:, None] & m_n[None, :]))
            den += tl.sum(q.to(tl.float32) * z[:, None], axis=0)
            num = tl.dot(kv, operand(q, PRECISION), num, input_precision=PRECISION)  # [R, N]
        p = p_out[:, None] + (o_n.to(tl.int64) * stride_out_n)[None, :]
        tl.store(p, narrowed(num / (den + eps)[None, :], out.dtype.element_ty), mask=(o_r < D)[:, None] & m_n[None, :])


@kernel
def grad_state_kernel(
    grad_out, qkv, state, grad_qkv, grad_states, eps, width, tokens, split_tokens, splits, heads, groups, first_group,
    stride_b, stride_c, stride_h, stride_w, stride_out_b, stride_out_c, stride_out_h, stride_out_w,
    stride_grad_b, stride_grad_c, stride_grad_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ROW_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
    FLAT: tl.constexpr, OUT_FLAT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With dnum = grad_out / den and dden = -(q' . KV^T dnum) / den: grad_q = (KV^T dnum + dden z) [q > 0], and the
    sums over the tokens of the split, dnum q'^T and dden q'.
    """
    i_b, i_head, i_r, i_split = _place(splits, heads, ROW_BLOCKS)
    o_d, o_block = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    o_r = i_r * BLOCK_R + o_block
    i_group = i_b * groups + first_group + i_head
    p_state = state + i_group * (D + 1) * D
    z = last_rows_sum(p_state, o_d, 1, D)
    TWO_PARTS: tl.constexpr = qkv.dtype.element_ty != tl.float32
    # The difference in grad_q cancels where a denominator is tiny: then an error of KV^T dnum cancels as it does
    # itself, but one of the quotient does not.
    WIDE: tl.constexpr = tl.float64 if PRECISION == "ieee" else tl.float32
    kv = sum_of_splits(p_state, o_block, o_d, 1, D)  # all of KV where it is one block
    high = rounded(kv, PRECISION)
    low = remainder(kv, high, PRECISION)
    p_q = qkv + i_b * stride_b + (i_head * 3 * D + o_d).to(tl.int64) * stride_c
    p_grad_q = grad_qkv + i_b * stride_grad_b + (i_head * 3 * D + o_d).to(tl.int64) * stride_grad_c
    p_out = grad_out + i_b * stride_out_b + ((first_group + i_head) * D).to(tl.int64) * stride_out_c
    grad_kv, grad_z = tl.zeros((BLOCK_R, BLOCK_D), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    start = i_split * split_tokens
    stop = tl.minimum(start + split_tokens, tokens)
    for n in range(start, stop, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = (o_n < stop)[None, :]
        m_d = (o_d < D)[:, None] & m_n
        q = relu(load(p_q[:, None] + token_offsets(o_n, width, stride_h, stride_w, FLAT)[None, :], m_d))
        q_wide = q.to(WIDE)
        if ROW_BLOCKS > 1:  # z would fill registers through the loop over the blocks
            z = last_rows_sum(p_state, o_d, 1, D)
        # Beyond the tokens den would be eps, which may be 0, and 0 / 0 spoil the sums.
        den = tl.where(m_n, (tl.sum(q_wide * z[:, None].to(WIDE), axis=0) + eps)[None, :], 1.0)
        out_offsets = token_offsets(o_n, width, stride_out_h, stride_out_w, OUT_FLAT)[None, :]
        p = p_out + o_r[:, None].to(tl.int64) * stride_out_c + out_offsets
        own_num = rounded(load(p, (o_r < D)[:, None] & m_n).to(tl.float32) / den.to(tl.float32), PRECISION)  # [R, N]
        grad_q = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
        for c in range(0, D, BLOCK_R):
            grad_num = own_num
            if ROW_BLOCKS > 1:
                o_c = c + o_block
                kv = sum_of_splits(p_state, o_c, o_d, 1, D)
                high = rounded(kv, PRECISION)
                low = remainder(kv, high, PRECISION)
                p = p_out + o_c[:, None].to(tl.int64) * stride_out_c + out_offsets
                grad_num = rounded(load(p, (o_c < D)[:, None] & m_n).to(tl.float32) / den.to(tl.float32), PRECISION)
            grad_q = tl.dot(tl.trans(high), grad_num, grad_q, input_precision=PRECISION)  # [D, N]
            if TWO_PARTS:
                grad_q = tl.dot(tl.trans(low), grad_num, grad_q, input_precision=PRECISION)
        grad_kv = tl.dot(own_num, tl.trans(operand(q, PRECISION)), grad_kv, input_precision=PRECISION)
        if ROW_BLOCKS > 1:
            z = last_rows_sum(p_state, o_d, 1, D)
            if D < BLOCK_D:  # as does q, beside the masks of what is padded
                p = p_q[:, None] + token_offsets(o_n, width, stride_h, stride_w, FLAT)[None, :]
                q_wide = relu(tl.load(p, mask=m_d, other=0.0, volatile=True).to(WIDE))
        grad_den = -tl.sum(q_wide * grad_q.to(WIDE), axis=0)[None, :] / den
        grad_z += tl.sum(q_wide.to(tl.float32) * grad_den.to(tl.float32), axis=1)
        difference = (grad_q.to(WIDE) + z[:, None].to(WIDE) * grad_den).to(tl.float32)
        grad_q = tl.where(q_wide <= 0, 0.0, difference)
        p = p_grad_q[:, None] + (o_n.to(tl.int64) * stride_grad_n)[None, :]
        tl.store(p, narrowed(grad_q, grad_qkv.dtype.element_ty), mask=(o_d + i_r * BLOCK_D < D)[:, None] & m_n)
    p_grads = grad_states + ((i_b * heads + i_head) * splits + i_split) * (D + 1) * D
    store_state_rows(p_grads, grad_kv, grad_z, o_r, o_d, D)


@kernel
def grad_kv_kernel(
    qkv, grad_states, grad_qkv, width, tokens, block_tokens, splits, blocks, heads,
    stride_b, stride_c, stride_h, stride_w, stride_grad_b, stride_grad_c, stride_grad_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ROW_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
    FLAT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_v = dKV k' and grad_k = (dKV^T v + dz) [k > 0] for a block of tokens and BLOCK_R channels of each."""
    i_b, i_head, i_r, i_block = _place(blocks, heads, ROW_BLOCKS)
    o_block = tl.arange(0, BLOCK_R)
    o_r = i_r * BLOCK_R + o_block
    p_grads = grad_states + (i_b * heads + i_head) * splits * (D + 1) * D
    TWO_PARTS: tl.constexpr = qkv.dtype.element_ty != tl.float32
    columns = sum_of_splits(p_grads, o_block, o_r, splits, D)  # all of dKV where it is one block
    high = rounded(columns, PRECISION)
    low = remainder(columns, high, PRECISION)
    rows = high
    grad_z = last_rows_sum(p_grads, o_r, splits, D)[:, None]
    p_head = qkv + i_b * stride_b + (i_head * 3 * D).to(tl.int64) * stride_c
    p_grad = grad_qkv + i_b * stride_grad_b + (i_head * 3 * D).to(tl.int64) * stride_grad_c
    start = i_block * block_tokens
    stop = tl.minimum(start + block_tokens, tokens)
    for n in range(start, stop, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = (o_n < stop)[None, :]
        m_r = (o_r < D)[:, None] & m_n
        offsets = token_offsets(o_n, width, stride_h, stride_w, FLAT)[None, :]
        k_rows = relu(load(p_head + (D + o_r).to(tl.int64)[:, None] * stride_c + offsets, m_r))  # [R, N]
        grad_k, grad_v = tl.zeros((BLOCK_R, BLOCK_N), tl.float32), tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for c in range(0, D, BLOCK_R):
            o_c = c + o_block
            m_c = (o_c < D)[:, None] & m_n
            k = k_rows
            if ROW_BLOCKS > 1:
                rows = rounded(sum_of_splits(p_grads, o_r, o_c, splits, D), PRECISION)  # [R, C]
                columns = sum_of_splits(p_grads, o_c, o_r, splits, D)  # [C, R]
                high = rounded(columns, PRECISION)
                low = remainder(columns, high, PRECISION)
                k = relu(load(p_head + (D + o_c).to(tl.int64)[:, None] * stride_c + offsets, m_c))
            v = operand(load(p_head + (2 * D + o_c).to(tl.int64)[:, None] * stride_c + offsets, m_c), PRECISION)
            grad_v = tl.dot(rows, operand(k, PRECISION), grad_v, input_precision=PRECISION)
            grad_k = tl.dot(tl.trans(high), v, grad_k, input_precision=PRECISION)
            if TWO_PARTS:
                grad_k = tl.dot(tl.trans(low), v, grad_k, input_precision=PRECISION)
        grad_k = tl.where(k_rows <= 0, 0.0, grad_k + grad_z)
        grad_offsets = (o_n.to(tl.int64) * stride_grad_n)[None, :]
        p = p_grad + (D + o_r).to(tl.int64)[:, None] * stride_grad_c + grad_offsets
        tl.store(p, narrowed(grad_k, grad_qkv.dtype.element_ty), mask=m_r)
        p = p_grad + (2 * D + o_r).to(tl.int64)[:, None] * stride_grad_c + grad_offsets
        tl.store(p, narrowed(grad_v, grad_qkv.dtype.element_ty), mask=m_r)


def relu_linear_attention_fwd(qkv: Sequence[Tensor], head_dim: int, eps: float) -> tuple[Tensor, Tensor]:
    """out [B, scales * heads * D, H, W] and the fp32 state [B, scales * heads, D + 1, D]."""
    first = qkv[0]
    heads = first.shape[1] // (3 * head_dim)
    groups = heads * len(qkv)
    out = empty_image(first, groups * head_dim)
    state = first.new_empty((first.shape[0], groups, head_dim + 1, head_dim), dtype=torch.float32)
    if state.numel() == 0 or out.numel() == 0:
        return out, state.zero_()
    states = kv_states(qkv, head_dim)
    store_state = states.shape[2] > 1
    apply(qkv, states, state if store_state else None, out, head_dim, eps)
    return out, state if store_state else states.squeeze(2)


def kv_states(qkv: Sequence[Tensor], head_dim: int) -> Tensor:
    """The states [B, scales * heads, splits, D + 1, D]; more than a reader should add up are summed here."""
    first = qkv[0]
    batch, channels, height, width = first.shape
    heads, tokens = channels // (3 * head_dim), height * width
    plan = _Plan("kv_state", first, head_dim)
    states = first.new_empty((batch, heads * len(qkv), plan.splits, head_dim + 1, head_dim), dtype=torch.float32)
    for i, tensor in enumerate(qkv):
        *strides, flat = token_strides(tensor)
        launch(
            kv_state_kernel,
            batch * heads * plan.row_blocks * plan.splits,
            *(tensor, states, width, tokens, plan.split_tokens, plan.splits, heads, heads * len(qkv), i * heads),
            *(tensor.stride(0), tensor.stride(1), *strides),
            FLAT=flat,
            **plan.meta,
        )
    return summed(states)


def summed(states: Tensor) -> Tensor:
    return states.sum(dim=2, keepdim=True) if states.shape[2] > MAX_SUMMED_SPLITS else states


def apply(qkv: Sequence[Tensor], states: Tensor, state: Tensor | None, out: Tensor, head_dim: int, eps: float) -> None:
    """Fills `out` from the states, and `state`, where given, with the sum of their splits."""
    first = qkv[0]
    batch, channels, height, width = first.shape
    heads, tokens = channels // (3 * head_dim), height * width
    plan = _Plan("apply", first, head_dim)
    for i, tensor in enumerate(qkv):
        *strides, flat = token_strides(tensor)
        launch(
            apply_kernel,
            batch * heads * plan.row_blocks * plan.splits,
            *(tensor, states, states if state is None else state, out, eps, width, tokens, plan.split_tokens),
            *(states.shape[2], plan.splits, heads, heads * len(qkv), i * heads),
            *(tensor.stride(0), tensor.stride(1), *strides, *flat_strides(out)),
            FLAT=flat,
            STORE_STATE=state is not None,
            **plan.meta,
        )


def relu_linear_attention_bwd(
    grad_out: Tensor, qkv: Sequence[Tensor], state: Tensor, head_dim: int, eps: float, scales: Sequence[int]
) -> list[Tensor]:
    """The gradients of qkv[i] for i in `scales`."""
    return [_grad_of_scale(grad_out, qkv[i], state, head_dim, eps, i) for i in scales]


def _grad_of_scale(grad_out: Tensor, qkv: Tensor, state: Tensor, head_dim: int, eps: float, scale: int) -> Tensor:
    batch, channels, height, width = qkv.shape
    heads, tokens = channels // (3 * head_dim), height * width
    grad_qkv = empty_image(qkv, channels)
    if grad_qkv.numel() == 0:
        return grad_qkv
    plan = _Plan("grad_state", qkv, head_dim)
    grad_states = qkv.new_empty((batch, heads, plan.splits, head_dim + 1, head_dim), dtype=torch.float32)
    *strides, flat = token_strides(qkv)
    *out_strides, out_flat = token_strides(grad_out)
    qkv_strides = (qkv.stride(0), qkv.stride(1), *strides)
    launch(
        grad_state_kernel,
        batch * heads * plan.row_blocks * plan.splits,
        *(grad_out, qkv, state.contiguous(), grad_qkv, grad_states, eps, width, tokens, plan.split_tokens),
        *(plan.splits, heads, state.shape[1], scale * heads),
        *(*qkv_strides, grad_out.stride(0), grad_out.stride(1), *out_strides, *flat_strides(grad_qkv)),
        FLAT=flat,
        OUT_FLAT=out_flat,
        **plan.meta,
    )
    grad_states = summed(grad_states)
    plan = _Plan("grad_kv", qkv, head_dim)
    launch(
        grad_kv_kernel,
        batch * heads * plan.row_blocks * plan.splits,
        *(qkv, grad_states, grad_qkv, width, tokens, plan.split_tokens, grad_states.shape[2], plan.splits, heads),
        *(*qkv_strides, *flat_strides(grad_qkv)),
        FLAT=flat,
        **plan.meta,
    )
    return grad_qkv


def flat_strides(image: Tensor) -> tuple[int, int, int]:
    """Of a tensor that was allocated here, whose tokens lie in one row: along B, C and the tokens."""
    _, stride_w, flat = token_strides(image)
    assert flat
    return image.stride(0), image.stride(1), stride_w


class _Plan:
    """How a kernel is laid out over one scale: blocks of rows and of tokens per head, constexprs, options."""

    def __init__(self, kernel: str, qkv: Tensor, head_dim: int) -> None:
        tokens = qkv.shape[2] * qkv.shape[3]
        kind, arch = product_kind(qkv.dtype), arch_of(qkv)
        config: AttentionConfig = attention_config(kernel, kind, block_of(head_dim), tokens, arch)
        self.split_tokens = tokens_per_split(tokens)
        self.splits = -(-tokens // self.split_tokens)
        self.row_blocks = -(-head_dim // config.block_r)
        self.meta: dict[str, Any] = {
            "D": head_dim,
            "BLOCK_D": block_of(head_dim),
            "BLOCK_R": config.block_r,
            "ROW_BLOCKS": self.row_blocks,
            "BLOCK_N": config.block_n,
            "PRECISION": product_precision(qkv.dtype),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        if config.max_registers is not None:
            self.meta["maxnreg"] = config.max_registers
