"""Device functions for states [D + 1, D] in memory: the rows of KV = sum v k'^T, then z = sum k'; one after another for
the splits of the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_of_splits(p_state, o_row, o_col, splits, D: tl.constexpr):
    """Rows o_row and columns o_col of KV, its splits added in their order."""
    m = (o_row < D)[:, None] & (o_col < D)[None, :]
    p = p_state + o_row[:, None] * D + o_col[None, :]
    total = tl.load(p, mask=m, other=0.0)
    for s in range(1, splits):
        total += tl.load(p + s * (D + 1) * D, mask=m, other=0.0)
    return total


@triton.jit
def last_rows_sum(p_state, o_d, splits, D: tl.constexpr):
    """z, its splits added in their order."""
    p = p_state + D * D + o_d
    total = tl.load(p, mask=o_d < D, other=0.0)
    for s in range(1, splits):
        total += tl.load(p + s * (D + 1) * D, mask=o_d < D, other=0.0)
    return total


@triton.jit
def store_state_rows(p_state, kv, z, o_row, o_d, D: tl.constexpr):
    """Rows o_row of KV, and, with the first of them, z."""
    tl.store(p_state + o_row[:, None] * D + o_d[None, :], kv, mask=(o_row < D)[:, None] & (o_d < D)[None, :])
    # Not `& (tl.min(o_row) == 0)`: Triton 3.9's interpreter refuses a mask that a scalar condition is part of.
    tl.store(p_state + D * D + o_d, z, mask=o_d + tl.min(o_row) * D < D)
