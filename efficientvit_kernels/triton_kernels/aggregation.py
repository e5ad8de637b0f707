# ruff: noqa: RUF005, SIM108 (Triton knows `a + (b,)`, not `(*a, b)`)
"""Device functions of the aggregation P (D * x), for one group of D channels on a tile of tokens.

A tile has T lanes, and each lane ROWS rows of one column: a value that a lane loads serves all the rows that its
column of the k x k window touches, ROWS + K - 1 loads for ROWS * K products. What a lane holds is a tuple of ROWS
tensors [channels, T] in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import load, narrowed, operand, rounded, stored_operand

# Above this k the code for all rows of the window at once would grow too long.
MAX_UNROLLED: tl.constexpr = tl.constexpr(7)


@triton.jit
def tile_of(i_tile, tiles_w, ROWS: tl.constexpr, BANDS: tl.constexpr, COLS: tl.constexpr):
    """First row and column of every lane of a tile; tiles_w of them lie side by side.

    Lane l covers column l % COLS of the tile and ROWS rows of its band l // COLS. BANDS > 1 fills the lanes where an
    image has fewer columns than a matrix product needs.
    """
    o_lane = tl.arange(0, BANDS * COLS)
    cols = (i_tile % tiles_w) * COLS + o_lane % COLS
    rows = ((i_tile // tiles_w) * BANDS + o_lane // COLS) * ROWS
    return rows, cols


@triton.jit
def zero_rows(CHANNELS: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr):
    acc = ()
    for _ in tl.static_range(ROWS):
        acc = acc + (tl.zeros((CHANNELS, T), tl.float32),)
    return acc


@triton.jit
def load_pixels(p_x, stride_c, stride_h, stride_w, o_d, m_d, o_h, o_w, m_n):
    """x [channels, T] at rows o_h and columns o_w; 0 where masked."""
    offsets = o_h.to(tl.int64) * stride_h + o_w.to(tl.int64) * stride_w
    p = p_x + (o_d.to(tl.int64) * stride_c)[:, None] + offsets[None, :]
    return load(p, m_d[:, None] & m_n[None, :])


@triton.jit
def depthwise_rows(
    p_x, stride_c, stride_h, stride_w, o_d, m_d, rows, cols, height, width,
    p_weight, stride_wc, stride_wh, stride_ww,
    K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The K x K depthwise convolution, zero-padded: for every lane, its ROWS rows [channels, T].

    p_x and p_weight point at the channel that o_d counts from. Negative strides, from the last tap on, flip the weight.
    """
    p_tap = p_weight + o_d.to(tl.int64) * stride_wc
    p_first = _row_above(p_x, stride_c, stride_h, o_d, rows, K)
    acc = zero_rows(o_d.shape[0], cols.shape[0], ROWS)
    for dx in range(K):
        o_w = cols + (dx - K // 2)
        m_w = (o_w >= 0) & (o_w < width)
        if K <= MAX_UNROLLED:
            taps = ()
            for dy in tl.static_range(K):
                taps = taps + (load(p_tap + dy * stride_wh + dx * stride_ww, m_d).to(tl.float32)[:, None],)
            p = p_first + o_w.to(tl.int64)[None, :] * stride_w
            for i in tl.static_range(ROWS + K - 1):
                o_h = rows + (i - K // 2)
                m_n = m_w & (o_h >= 0) & (o_h < height)
                acc = _add_row_of_window(acc, load(p, m_d[:, None] & m_n[None, :]).to(tl.float32), taps, i)
                p += stride_h
        else:
            for dy in range(K):
                tap = load(p_tap + dy * stride_wh + dx * stride_ww, m_d).to(tl.float32)[:, None]
                sums = ()
                for r in tl.static_range(ROWS):
                    o_h = rows + (r + dy - K // 2)
                    m_n = m_w & (o_h >= 0) & (o_h < height)
                    x = load_pixels(p_x, stride_c, stride_h, stride_w, o_d, m_d, o_h, o_w, m_n)
                    sums = sums + (acc[r] + tap * x.to(tl.float32),)
                acc = sums
    return acc


@triton.jit
def _row_above(p_x, stride_c, stride_h, o_d, rows, K: tl.constexpr):
    """Addresses [channels, T] of the first row of the window, column 0.

    From there one row after the other: an offset for each would stay in registers for all columns of the window.
    """
    return p_x + (o_d.to(tl.int64) * stride_c)[:, None] + ((rows - K // 2).to(tl.int64) * stride_h)[None, :]


@triton.jit
def _add_row_of_window(acc, x, taps, ROW: tl.constexpr):
    """Row ROW of the window times the taps that carry it to a row of the lane.

    No masked taps: 0 times a NaN would be NaN, beyond the window.
    """
    sums = ()
    for r in tl.static_range(len(acc)):
        if (ROW - r >= 0) and (ROW - r < len(taps)):
            sums = sums + (acc[r] + taps[ROW - r] * x,)
        else:
            sums = sums + (acc[r],)
    return sums


@triton.jit
def add_to_rows(acc, p_bias, stride, o_d, m_d):
    """Every row plus a bias per channel; masked channels stay as they are."""
    bias = load(p_bias + o_d.to(tl.int64) * stride, m_d).to(tl.float32)[:, None]
    sums = ()
    for r in tl.static_range(len(acc)):
        sums = sums + (acc[r] + bias,)
    return sums


@triton.jit
def add_products(out, acc, p_weight, stride_wo, stride_wi, o_r, m_r, o_d, m_d, PRECISION: tl.constexpr):
    """out + P[o_r, o_d] acc for every row."""
    p = p_weight + (o_r.to(tl.int64) * stride_wo)[:, None] + (o_d.to(tl.int64) * stride_wi)[None, :]
    weight = operand(load(p, m_r[:, None] & m_d[None, :]), PRECISION)
    sums = ()
    for r in tl.static_range(len(acc)):
        sums = sums + (tl.dot(weight, rounded(acc[r], PRECISION), out[r], input_precision=PRECISION),)
    return sums


@triton.jit
def aggregate_rows(
    p_x, stride_c, stride_h, stride_w, rows, cols, height, width,
    p_depthwise, stride_dc, stride_dh, stride_dw, p_pointwise, stride_po, stride_pi,
    p_depthwise_bias, stride_db, p_pointwise_bias, stride_pb, o_r, m_r,
    D: tl.constexpr, BLOCK_C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    HAS_DEPTHWISE_BIAS: tl.constexpr, HAS_POINTWISE_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P (D * x + depthwise bias) + pointwise bias: for every row, the output channels o_r of one group.

    BLOCK_C input channels at a time. All pointers are at the first channel of the group.
    """
    o_c = tl.arange(0, BLOCK_C)
    out = zero_rows(o_r.shape[0], cols.shape[0], ROWS)
    for start in range(0, D, BLOCK_C):
        o_d = start + o_c
        acc = depthwise_rows(
            p_x, stride_c, stride_h, stride_w, o_d, o_d < D, rows, cols, height, width,
            p_depthwise, stride_dc, stride_dh, stride_dw, K, ROWS,
        )  # fmt: skip
        if HAS_DEPTHWISE_BIAS:
            acc = add_to_rows(acc, p_depthwise_bias, stride_db, o_d, o_d < D)
        out = add_products(out, acc, p_pointwise, stride_po, stride_pi, o_r, m_r, o_d, o_d < D, PRECISION)
    if HAS_POINTWISE_BIAS:
        out = add_to_rows(out, p_pointwise_bias, stride_pb, o_r, m_r)
    return out


@triton.jit
def store_rows(acc, p_out, stride_c, stride_h, stride_w, o_d, m_d, rows, cols, height, width):
    """Rounds each row once, to the type of the output."""
    p = p_out + (o_d.to(tl.int64) * stride_c)[:, None]
    for r in tl.static_range(len(acc)):
        offsets = (rows + r).to(tl.int64) * stride_h + cols.to(tl.int64) * stride_w
        m_n = (rows + r < height) & (cols < width)
        tl.store(p + offsets[None, :], narrowed(acc[r], p_out.dtype.element_ty), mask=m_d[:, None] & m_n[None, :])


@triton.jit
def middle_rows(
    p_grad, stride_c, stride_h, stride_w, p_weight, stride_wo, stride_wi, o_c, rows, cols, height, width,
    D: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P^T grad_out for the channels o_c of one group, 0 beyond the image. Products of stored values are exact."""
    acc = zero_rows(o_c.shape[0], cols.shape[0], ROWS)
    for start in range(0, D, BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        p = p_weight + (o_c.to(tl.int64) * stride_wi)[:, None] + (o_r.to(tl.int64) * stride_wo)[None, :]
        weight = stored_operand(load(p, (o_c < D)[:, None] & (o_r < D)[None, :]), PRECISION)
        sums = ()
        for r in tl.static_range(ROWS):
            m_n = (rows + r < height) & (cols < width)
            grad = load_pixels(p_grad, stride_c, stride_h, stride_w, o_r, o_r < D, rows + r, cols, m_n)
            sums = sums + (tl.dot(weight, stored_operand(grad, PRECISION), acc[r], input_precision=PRECISION),)
        acc = sums
    inside = ()
    for r in tl.static_range(ROWS):
        m_n = (rows + r < height) & (cols < width)
        inside = inside + (tl.where(m_n[None, :], _in_own_layout(acc[r]), 0.0),)
    return inside


@triton.jit
def _in_own_layout(x):
    """x, in a layout that is not the matrix unit's.

    Arithmetic between a product and loaded values happens in the product's layout, and every loaded value would go
    through shared memory. Triton passes no layout on through a gather.
    """
    i_column = tl.arange(0, x.shape[1])[None, :] + tl.zeros(x.shape, tl.int32)
    return tl.gather(x, i_column, axis=1)


@triton.jit
def add_grad_pointwise(
    total, acc, p_grad, stride_c, stride_h, stride_w, o_r, m_r, rows, cols, height, width, PRECISION: tl.constexpr
):
    """total + grad_out acc^T for the output channels o_r, summed over the rows of the lanes inside the image."""
    for r in tl.static_range(len(acc)):
        m_n = (rows + r < height) & (cols < width)
        grad = load_pixels(p_grad, stride_c, stride_h, stride_w, o_r, m_r, rows + r, cols, m_n)
        inside = rounded(tl.where(m_n[None, :], acc[r], 0.0), PRECISION)
        total = tl.dot(operand(grad, PRECISION), tl.trans(inside), total, input_precision=PRECISION)
    return total


@triton.jit
def depthwise_both_ways(
    grads, middle, p_x, stride_c, stride_h, stride_w, o_c, m_c, rows, cols, height, width,
    p_weight, stride_wc, stride_wh, stride_ww,
    K: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The convolution's rows, and grads[dx * K + dy] + middle * x: every x that is loaded serves both.

    EVEN: the rows of a lane are all inside the image or all outside.
    """
    p_tap = p_weight + o_c.to(tl.int64) * stride_wc
    m_lane = (rows < height) & (cols < width)
    p_first = _row_above(p_x, stride_c, stride_h, o_c, rows, K)
    acc = zero_rows(o_c.shape[0], cols.shape[0], ROWS)
    for dx in range(K):
        o_w = cols + (dx - K // 2)
        m_w = m_lane & (o_w >= 0) & (o_w < width)
        column, others, taps = (), (), ()
        for dy in tl.static_range(K):
            column = column + (grads[dy],)
            taps = taps + (load(p_tap + dy * stride_wh + dx * stride_ww, m_c).to(tl.float32)[:, None],)
        for tap in tl.static_range(K, K * K):
            others = others + (grads[tap],)
        p = p_first + o_w.to(tl.int64)[None, :] * stride_w
        for i in tl.static_range(ROWS + K - 1):
            o_h = rows + (i - K // 2)
            m_n = m_w & (o_h >= 0) & (o_h < height)
            x = load(p, m_c[:, None] & m_n[None, :]).to(tl.float32)
            p += stride_h
            acc = _add_row_of_window(acc, x, taps, i)
            column = _add_middle_times_row(column, middle, x, rows, height, i, EVEN)
        grads = others + column
    return acc, grads


@triton.jit
def _add_middle_times_row(column, middle, x, rows, height, ROW: tl.constexpr, EVEN: tl.constexpr):
    """column[dy] + middle * x, for every tap dy that carries row ROW of the window to a row of the lane."""
    sums = ()
    for dy in tl.static_range(len(column)):
        if (ROW - dy >= 0) and (ROW - dy < len(middle)):
            # Beyond the image middle is 0, and x may be NaN.
            inside = x if EVEN else tl.where((rows + (ROW - dy) < height)[None, :], x, 0.0)
            sums = sums + (column[dy] + middle[ROW - dy] * inside,)
        else:
            sums = sums + (column[dy],)
    return sums


@triton.jit
def next_column(taps, K: tl.constexpr):
    """The same with the first column of taps moved to the end: a loop cannot index a tuple."""
    moved = ()
    for tap in tl.static_range(K, K * K):
        moved = moved + (taps[tap],)
    for tap in tl.static_range(K):
        moved = moved + (taps[tap],)
    return moved
