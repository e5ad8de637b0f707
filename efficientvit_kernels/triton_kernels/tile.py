"""Device functions that several kernels share: addresses of tokens, relu, operands of matrix products."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# The interpreter computes bfloat16 wrongly, without a word: there everything is float32 right after the load.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

# Counts that no address is vectorised by: without them in its key a kernel is compiled once for all resolutions that
# are equally aligned.
_COUNTS = (
    *("height", "width", "tiles", "tiles_w", "split_tiles", "block_tiles", "blocks_m", "blocks_n"),
    *("splits", "blocks", "heads", "groups", "first_group"),
)


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` for what is launched."""
    names = inspect.signature(function).parameters
    return triton.jit(function, do_not_specialize=[name for name in _COUNTS if name in names])


@triton.jit
def token_offsets(o_n, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Offsets of the tokens o_n of a plane; FLAT: all of them lie stride_w apart."""
    if FLAT:
        return o_n.to(tl.int64) * stride_w
    return (o_n // width).to(tl.int64) * stride_h + (o_n % width).to(tl.int64) * stride_w


@triton.jit
def load(pointers, mask):
    """The stored values, 0 where masked; in the interpreter as float32."""
    values = tl.load(pointers, mask=mask, other=0.0)
    return values.to(tl.float32) if INTERPRETED else values


@triton.jit
def relu(x):
    """A maximum with 0 would lose NaN."""
    return tl.where(x < 0, 0.0, x).to(x.dtype)


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """A computed fp32 operand of a product: rounded to nearest TF32 where the product is in TF32.

    The matrix units cut the lower 13 bits off, which would pull every result towards 0. NaN stays as it is: its lower
    bits may carry into the sign.
    """
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """A stored value as the fp32 operand of a product whose other operand is computed; exact for 16-bit storage."""
    return rounded(x, PRECISION) if x.dtype == tl.float32 else x.to(tl.float32)


@triton.jit
def stored_operand(x, PRECISION: tl.constexpr):
    """A stored value as the operand of a product with another stored value: in its own type, so products are exact."""
    return rounded(x, PRECISION) if x.dtype == tl.float32 else x


@triton.jit
def remainder(x, high, PRECISION: tl.constexpr):
    """What rounding left of a computed operand, for a second product: 22 bits in all.

    For the products of the backward with a state, whose terms may cancel: with 16-bit storage the official formula in
    float32 is the measure there. inf and NaN have no remainder.
    """
    return rounded(tl.where(tl.abs(high) < float("inf"), x - high, 0.0), PRECISION)


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """fp32 to the type of an output, rounded to nearest; the interpreter would cut bfloat16 off instead."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)
