"""The two fused kernels of lite_mla's forward: aggregation with the sum of the state, aggregation with its application.

Between them and the two products of the block, nothing but qkv, the states and the attention's result reaches memory:
no aggregated map, no concatenation. For head dims up to 32.
"""

from __future__ import annotations

import triton.language as tl

from .aggregation import aggregate_rows, load_pixels, tile_of
from .attention_state import last_rows_sum, store_state_rows, sum_of_splits
from .tile import kernel, narrowed, operand, relu, rounded, stored_operand


@kernel
def aggregate_kv_state_kernel(
    qkv, depthwise, pointwise, depthwise_bias, pointwise_bias, states,
    height, width, tiles, tiles_w, split_tiles, splits, heads, groups, first_group,
    stride_b, stride_c, stride_h, stride_w, stride_dc, stride_dh, stride_dw, stride_po, stride_pi, stride_db, stride_pb,
    D: tl.constexpr, BLOCK_D: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, BANDS: tl.constexpr, COLS: tl.constexpr,
    HAS_BIAS: tl.constexpr, IDENTITY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """states[b, first_group + head, split] = sum v_s k_s'^T and sum k_s' over the tiles of the split, with k_s, v_s the
    aggregated k and v, never stored; IDENTITY: states[b, head, split] likewise, of k and v themselves.
    """
    pid = tl.program_id(0)
    i_split, i_bh = pid % splits, pid // splits
    i_b, i_head = (i_bh // heads).to(tl.int64), i_bh % heads
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    first_k, first_v = (i_head * 3 * D + D).to(tl.int64), (i_head * 3 * D + 2 * D).to(tl.int64)
    p_image = qkv + i_b * stride_b
    kv, z = tl.zeros((BLOCK_D, BLOCK_D), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    kv_0, z_0 = kv, z
    start = i_split * split_tiles
    for i_tile in range(start, tl.minimum(start + split_tiles, tiles)):
        rows, cols = tile_of(i_tile, tiles_w, ROWS, BANDS, COLS)
        k_rows = aggregate_rows(
            p_image + first_k * stride_c, stride_c, stride_h, stride_w, rows, cols, height, width,
            depthwise + first_k * stride_dc, stride_dc, stride_dh, stride_dw,
            pointwise + first_k * stride_po, stride_po, stride_pi,
            depthwise_bias + first_k * stride_db, stride_db, pointwise_bias + first_k * stride_pb, stride_pb, o_d, m_d,
            D, BLOCK_D, K, ROWS, HAS_BIAS, HAS_BIAS, PRECISION,
        )  # fmt: skip
        v_rows = aggregate_rows(
            p_image + first_v * stride_c, stride_c, stride_h, stride_w, rows, cols, height, width,
            depthwise + first_v * stride_dc, stride_dc, stride_dh, stride_dw,
            pointwise + first_v * stride_po, stride_po, stride_pi,
            depthwise_bias + first_v * stride_db, stride_db, pointwise_bias + first_v * stride_pb, stride_pb, o_d, m_d,
            D, BLOCK_D, K, ROWS, HAS_BIAS, HAS_BIAS, PRECISION,
        )  # fmt: skip
        for r in tl.static_range(ROWS):
            m_n = (cols < width) & (rows + r < height)
            # Lanes beyond the image hold what the window brings in, and the bias.
            k = tl.where(m_n[None, :], relu(k_rows[r]), 0.0)  # [D, T]
            v = tl.where(m_n[None, :], v_rows[r], 0.0)
            kv = tl.dot(rounded(v, PRECISION), tl.trans(rounded(k, PRECISION)), kv, input_precision=PRECISION)
            z += tl.sum(k, axis=1)
        if IDENTITY:
            p_k, p_v = p_image + first_k * stride_c, p_image + first_v * stride_c
            for r in range(ROWS):  # a loop that is not unrolled: these loads need not all be in flight
                o_h = rows + r
                m_0 = (cols < width) & (o_h < height)
                k_0 = relu(load_pixels(p_k, stride_c, stride_h, stride_w, o_d, m_d, o_h, cols, m_0))
                v_0 = load_pixels(p_v, stride_c, stride_h, stride_w, o_d, m_d, o_h, cols, m_0)
                k_operand = tl.trans(stored_operand(k_0, PRECISION))
                kv_0 = tl.dot(stored_operand(v_0, PRECISION), k_operand, kv_0, input_precision=PRECISION)
                z_0 += tl.sum(k_0.to(tl.float32), axis=1)
    if IDENTITY:
        store_state_rows(states + ((i_b * groups + i_head) * splits + i_split) * (D + 1) * D, kv_0, z_0, o_d, o_d, D)
    i_state = (i_b * groups + first_group + i_head) * splits + i_split
    store_state_rows(states + i_state * (D + 1) * D, kv, z, o_d, o_d, D)


@kernel
def aggregate_apply_kernel(
    qkv, depthwise, pointwise, depthwise_bias, pointwise_bias, states, state, out, eps,
    height, width, tiles, tiles_w, block_tiles, blocks, splits, heads, groups, first_group,
    stride_b, stride_c, stride_h, stride_w, stride_dc, stride_dh, stride_dw, stride_po, stride_pi, stride_db, stride_pb,
    stride_out_b, stride_out_c, stride_out_h, stride_out_w,
    D: tl.constexpr, BLOCK_D: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, BANDS: tl.constexpr, COLS: tl.constexpr,
    HAS_BIAS: tl.constexpr, IDENTITY: tl.constexpr, STORE_STATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out of group first_group + head = KV q_s' / (z . q_s' + eps) with the aggregated q_s, never stored; IDENTITY: out
    of group head from q itself, too. The first program of a head also stores the sum of its splits.
    """
    pid = tl.program_id(0)
    i_block, i_bh = pid % blocks, pid // blocks
    i_b, i_head = (i_bh // heads).to(tl.int64), i_bh % heads
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_0, i_s = i_b * groups + i_head, i_b * groups + first_group + i_head
    kv = sum_of_splits(states + i_s * splits * (D + 1) * D, o_d, o_d, splits, D)
    z = last_rows_sum(states + i_s * splits * (D + 1) * D, o_d, splits, D)
    kv_0, z_0 = kv, z
    if IDENTITY:
        kv_0 = sum_of_splits(states + i_0 * splits * (D + 1) * D, o_d, o_d, splits, D)
        z_0 = last_rows_sum(states + i_0 * splits * (D + 1) * D, o_d, splits, D)
    if STORE_STATE:
        if i_block == 0:
            store_state_rows(state + i_s * (D + 1) * D, kv, z, o_d, o_d, D)
            if IDENTITY:
                store_state_rows(state + i_0 * (D + 1) * D, kv_0, z_0, o_d, o_d, D)
    kv, kv_0 = rounded(kv, PRECISION), rounded(kv_0, PRECISION)
    first_q = (i_head * 3 * D).to(tl.int64)
    p_q = qkv + i_b * stride_b + first_q * stride_c
    p_out_0 = out + i_b * stride_out_b + ((i_head * D + o_d).to(tl.int64) * stride_out_c)[:, None]
    p_out = out + i_b * stride_out_b + (((first_group + i_head) * D + o_d).to(tl.int64) * stride_out_c)[:, None]
    start = i_block * block_tiles
    for i_tile in range(start, tl.minimum(start + block_tiles, tiles)):
        rows, cols = tile_of(i_tile, tiles_w, ROWS, BANDS, COLS)
        q_rows = aggregate_rows(
            p_q, stride_c, stride_h, stride_w, rows, cols, height, width,
            depthwise + first_q * stride_dc, stride_dc, stride_dh, stride_dw,
            pointwise + first_q * stride_po, stride_po, stride_pi,
            depthwise_bias + first_q * stride_db, stride_db, pointwise_bias + first_q * stride_pb, stride_pb, o_d, m_d,
            D, BLOCK_D, K, ROWS, HAS_BIAS, HAS_BIAS, PRECISION,
        )  # fmt: skip
        for r in tl.static_range(ROWS):
            m_n = (cols < width) & (rows + r < height)
            mask = m_d[:, None] & m_n[None, :]
            offsets = ((rows + r).to(tl.int64) * stride_out_h + cols.to(tl.int64) * stride_out_w)[None, :]
            q = relu(q_rows[r])  # [D, T]
            den = tl.sum(q * z[:, None], axis=0) + eps
            num = tl.dot(kv, rounded(q, PRECISION), input_precision=PRECISION)
            tl.store(p_out + offsets, narrowed(num / den[None, :], out.dtype.element_ty), mask=mask)
            if IDENTITY:
                q = relu(load_pixels(p_q, stride_c, stride_h, stride_w, o_d, m_d, rows + r, cols, m_n))
                den = tl.sum(q.to(tl.float32) * z_0[:, None], axis=0) + eps
                num = tl.dot(kv_0, operand(q, PRECISION), input_precision=PRECISION)
                tl.store(p_out_0 + offsets, narrowed(num / den[None, :], out.dtype.element_ty), mask=mask)
