# ruff: noqa: RUF005 (Triton knows `a + (b,)`, not `(*a, b)`)
"""multiscale_aggregate in Triton, one scale at a time: out = P (D * qkv + b) + c.

Forward: one launch per scale. Backward: `gradients_kernel` computes the gradient of the depthwise convolution's output,
middle = P^T grad_out, and with it, from the same loads of qkv, partial sums of the gradients of P and D, which torch
adds up; `grad_qkv_kernel` convolves middle with the flipped D. No atomics, so two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ..ops._fakes import empty_image
from .aggregation import (
    add_grad_pointwise,
    add_to_rows,
    aggregate_rows,
    depthwise_both_ways,
    depthwise_rows,
    load_pixels,
    middle_rows,
    next_column,
    store_rows,
    tile_of,
    zero_rows,
)
from .aggregation_configs import (
    AggregationConfig,
    Tiling,
    forward_config,
    grad_pointwise_config,
    grad_qkv_config,
    grad_taps_config,
    gradients_config,
    gradients_fit,
    middle_config,
)
from .launch import launch, product_precision, tap_strides
from .tile import kernel


@kernel
def forward_kernel(
    qkv, depthwise, pointwise, depthwise_bias, pointwise_bias, out, height, width, tiles_w, tiles, groups,
    stride_b, stride_c, stride_h, stride_w, stride_dc, stride_dh, stride_dw, stride_po, stride_pi, stride_db, stride_pb,
    stride_out_b, stride_out_c, stride_out_h, stride_out_w,
    D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, ROW_BLOCKS: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, BANDS: tl.constexpr, COLS: tl.constexpr,
    HAS_DEPTHWISE_BIAS: tl.constexpr, HAS_POINTWISE_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out for BLOCK_R channels of one group, on one tile of one image."""
    pid = tl.program_id(0)
    rows, cols = tile_of(pid % tiles, tiles_w, ROWS, BANDS, COLS)
    o_r = (pid // tiles) % ROW_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    i_bg = pid // tiles // ROW_BLOCKS
    i_b, first = (i_bg // groups).to(tl.int64), ((i_bg % groups) * D).to(tl.int64)
    acc = aggregate_rows(
        qkv + i_b * stride_b + first * stride_c, stride_c, stride_h, stride_w, rows, cols, height, width,
        depthwise + first * stride_dc, stride_dc, stride_dh, stride_dw,
        pointwise + first * stride_po, stride_po, stride_pi,
        depthwise_bias + first * stride_db, stride_db, pointwise_bias + first * stride_pb, stride_pb, o_r, o_r < D,
        D, BLOCK_C, K, ROWS, HAS_DEPTHWISE_BIAS, HAS_POINTWISE_BIAS, PRECISION,
    )  # fmt: skip
    p_out = out + i_b * stride_out_b + first * stride_out_c
    store_rows(acc, p_out, stride_out_c, stride_out_h, stride_out_w, o_r, o_r < D, rows, cols, height, width)


@kernel
def gradients_kernel(
    grad_out, qkv, depthwise, pointwise, depthwise_bias, middle, partials,
    height, width, tiles_w, tiles, tasks, tasks_per_program, groups, columns,
    stride_grad_b, stride_grad_c, stride_grad_h, stride_grad_w, stride_b, stride_c, stride_h, stride_w,
    stride_dc, stride_dh, stride_dw, stride_po, stride_pi, stride_db,
    stride_mid_b, stride_mid_c, stride_mid_h, stride_mid_w,
    D: tl.constexpr, BLOCK_C: tl.constexpr, C_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, R_BLOCKS: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, BANDS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr,
    HAS_DEPTHWISE_BIAS: tl.constexpr, STORES_MIDDLE: tl.constexpr, POINTWISE: tl.constexpr, TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Over a run of tasks, each a tile of an image: middle for BLOCK_C channels of one group, and partial sums.

    A row of `partials` [programs per block, 3T, columns] is P's D columns, if POINTWISE, of BLOCK_R rows per program;
    then, if TAPS, K * K taps, dx first. R_BLOCKS is 1 unless there is nothing but POINTWISE.
    """
    pid = tl.program_id(0)
    i_c, i_r = pid % C_BLOCKS, pid // C_BLOCKS % R_BLOCKS
    i_group, i_chunk = pid // C_BLOCKS // R_BLOCKS % groups, pid // C_BLOCKS // R_BLOCKS // groups
    first = (i_group * D).to(tl.int64)
    o_c, o_r = i_c * BLOCK_C + tl.arange(0, BLOCK_C), i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    p_d = depthwise + first * stride_dc
    grad_pointwise = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    grad_taps = zero_rows(BLOCK_C, BANDS * COLS, K * K if TAPS else 1)
    start = i_chunk * tasks_per_program
    for task in range(start, tl.minimum(start + tasks_per_program, tasks)):
        i_b = (task // tiles).to(tl.int64)
        rows, cols = tile_of(task % tiles, tiles_w, ROWS, BANDS, COLS)
        p_grad = grad_out + i_b * stride_grad_b + first * stride_grad_c
        p_x = qkv + i_b * stride_b + first * stride_c
        if STORES_MIDDLE or TAPS:
            mid = middle_rows(
                p_grad, stride_grad_c, stride_grad_h, stride_grad_w,
                pointwise + first * stride_po, stride_po, stride_pi, o_c, rows, cols, height, width,
                D, BLOCK_R, ROWS, PRECISION,
            )  # fmt: skip
        if STORES_MIDDLE:
            p_mid = middle + i_b * stride_mid_b + first * stride_mid_c
            store_rows(mid, p_mid, stride_mid_c, stride_mid_h, stride_mid_w, o_c, o_c < D, rows, cols, height, width)
        if TAPS:
            acc, grad_taps = depthwise_both_ways(
                grad_taps, mid, p_x, stride_c, stride_h, stride_w, o_c, o_c < D, rows, cols, height, width,
                p_d, stride_dc, stride_dh, stride_dw, K, ROWS, EVEN,
            )  # fmt: skip
        elif POINTWISE:
            acc = depthwise_rows(
                p_x, stride_c, stride_h, stride_w, o_c, o_c < D, rows, cols, height, width,
                p_d, stride_dc, stride_dh, stride_dw, K, ROWS,
            )  # fmt: skip
        if POINTWISE:
            if HAS_DEPTHWISE_BIAS:
                acc = add_to_rows(acc, depthwise_bias + first * stride_db, stride_db, o_c, o_c < D)
            grad_pointwise = add_grad_pointwise(
                grad_pointwise, acc, p_grad, stride_grad_c, stride_grad_h, stride_grad_w, o_r, o_r < D,
                rows, cols, height, width, PRECISION,
            )  # fmt: skip
    p_row = partials + (i_chunk.to(tl.int64) * groups * D + first) * columns
    if POINTWISE:
        p = p_row + o_r[:, None] * columns + o_c[None, :]
        tl.store(p, grad_pointwise, mask=(o_r < D)[:, None] & (o_c < D)[None, :])
    if TAPS:
        p_taps = p_row + o_c * columns + D
        for _ in range(K):
            for dy in tl.static_range(K):
                tl.store(p_taps + dy, tl.sum(grad_taps[dy], axis=1), mask=o_c < D)
            p_taps += K
            grad_taps = next_column(grad_taps, K)


@kernel
def grad_taps_kernel(
    middle, qkv, partials, height, width, tiles_w, tiles, tasks, tasks_per_program, channels, blocks,
    stride_mid_b, stride_mid_c, stride_mid_h, stride_mid_w, stride_b, stride_c, stride_h, stride_w,
    BLOCK_C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BANDS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """partials[program of the block, channel, dx * K + dy] = middle * x over a run of tasks: for a large K."""
    i_c, i_chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    p_row = partials + (i_chunk.to(tl.int64) * channels + o_c) * (K * K)
    start = i_chunk * tasks_per_program
    for tap in range(K * K):
        total = tl.zeros((BLOCK_C, BANDS * COLS), tl.float32)
        for task in range(start, tl.minimum(start + tasks_per_program, tasks)):
            i_b = (task // tiles).to(tl.int64)
            p_mid, p_x = middle + i_b * stride_mid_b, qkv + i_b * stride_b
            rows, cols = tile_of(task % tiles, tiles_w, ROWS, BANDS, COLS)
            for r in tl.static_range(ROWS):
                o_h, o_w = rows + (r + tap % K - K // 2), cols + (tap // K - K // 2)
                m_n = (rows + r < height) & (cols < width) & (o_h >= 0) & (o_h < height) & (o_w >= 0) & (o_w < width)
                grad = load_pixels(p_mid, stride_mid_c, stride_mid_h, stride_mid_w, o_c, m_c, rows + r, cols, m_n)
                x = load_pixels(p_x, stride_c, stride_h, stride_w, o_c, m_c, o_h, o_w, m_n)
                total += grad.to(tl.float32) * x.to(tl.float32)
        tl.store(p_row + tap, tl.sum(total, axis=1), mask=m_c)


@kernel
def grad_qkv_kernel(
    middle, depthwise, addend, grad_qkv, height, width, tiles_w, tiles, channels, blocks,
    stride_mid_b, stride_mid_c, stride_mid_h, stride_mid_w, stride_dc, stride_dh, stride_dw,
    stride_add_b, stride_add_c, stride_add_h, stride_add_w, stride_out_b, stride_out_c, stride_out_h, stride_out_w,
    BLOCK_C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BANDS: tl.constexpr, COLS: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
):  # fmt: skip
    """middle convolved with the flipped depthwise weight, plus the addend."""
    pid = tl.program_id(0)
    rows, cols = tile_of(pid % tiles, tiles_w, ROWS, BANDS, COLS)
    i_b, first = (pid // tiles // blocks).to(tl.int64), ((pid // tiles) % blocks * BLOCK_C).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = first + o_c < channels
    acc = depthwise_rows(
        middle + i_b * stride_mid_b + first * stride_mid_c, stride_mid_c, stride_mid_h, stride_mid_w,
        o_c, m_c, rows, cols, height, width,
        depthwise + first * stride_dc + (K - 1) * (stride_dh + stride_dw), stride_dc, -stride_dh, -stride_dw, K, ROWS,
    )  # fmt: skip
    if HAS_ADDEND:
        p_add = addend + i_b * stride_add_b + first * stride_add_c
        sums = ()
        for r in tl.static_range(ROWS):
            m_n = (rows + r < height) & (cols < width)
            x = load_pixels(p_add, stride_add_c, stride_add_h, stride_add_w, o_c, m_c, rows + r, cols, m_n)
            sums = sums + (acc[r] + x.to(tl.float32),)
        acc = sums
    p_out = grad_qkv + i_b * stride_out_b + first * stride_out_c
    store_rows(acc, p_out, stride_out_c, stride_out_h, stride_out_w, o_c, m_c, rows, cols, height, width)


def _bias_stride(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.stride(0)


def _forward(
    qkv: Tensor, depthwise: Tensor, pointwise: Tensor, bias_d: Tensor | None, bias_p: Tensor | None, head_dim: int
) -> Tensor:
    batch, channels, height, width = qkv.shape
    k, groups, precision = depthwise.shape[-1], channels // head_dim, product_precision(qkv.dtype)
    tiling = Tiling(forward_config(head_dim, height, width, precision == "ieee"), height, width)
    row_blocks = -(-head_dim // tiling.block_r)
    out = empty_image(qkv, channels)
    launch(
        forward_kernel,
        batch * groups * row_blocks * tiling.tiles,
        *(qkv, depthwise, pointwise, depthwise if bias_d is None else bias_d, pointwise if bias_p is None else bias_p),
        *(out, height, width, tiling.tiles_w, tiling.tiles, groups, *qkv.stride(), *tap_strides(depthwise)),
        *(*pointwise.stride()[:2], _bias_stride(bias_d), _bias_stride(bias_p), *out.stride()),
        D=head_dim,
        BLOCK_R=tiling.block_r,
        ROW_BLOCKS=row_blocks,
        K=k,
        HAS_DEPTHWISE_BIAS=bias_d is not None,
        HAS_POINTWISE_BIAS=bias_p is not None,
        PRECISION=precision,
        **tiling.meta,
    )
    return out


def multiscale_aggregate_fwd(
    qkv: Tensor,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    depthwise_biases: Sequence[Tensor],
    pointwise_biases: Sequence[Tensor],
    head_dim: int,
) -> list[Tensor]:
    """One output [B, 3T, H, W] per scale; empty lists stand for biases that are not there."""
    if qkv.numel() == 0:
        return [empty_image(qkv, qkv.shape[1]) for _ in depthwise_weights]
    absent = [None] * len(depthwise_weights)
    scales = zip(
        depthwise_weights, pointwise_weights, depthwise_biases or absent, pointwise_biases or absent, strict=True
    )
    return [_forward(qkv, *parameters, head_dim) for parameters in scales]


def multiscale_aggregate_bwd(
    grad_outs: Sequence[Tensor],
    qkv: Tensor,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    depthwise_biases: Sequence[Tensor],
    head_dim: int,
    needs_qkv: bool,
    needs_weights: bool,
    needs_biases: bool,
    addend: Tensor | None = None,
) -> list[Tensor]:
    """What is needed of: grad_qkv; the gradients of the depthwise and of the pointwise weights; of both biases.

    grad_qkv has `addend` [B, 3T, H, W], of any dtype and strides, added before it is rounded.
    """
    scales, channels = range(len(grad_outs)), qkv.shape[1]
    grads = [empty_image(qkv, channels)] if needs_qkv else []
    weights = [w.new_empty(w.shape) for w in (*depthwise_weights, *pointwise_weights)] if needs_weights else []
    biases = [qkv.new_empty(channels) for _ in range(2 * len(scales))] if needs_biases else []
    if qkv.numel() == 0:
        return [grad.zero_() for grad in (*grads, *weights, *biases)]
    if needs_qkv and not scales:
        grads[0].zero_() if addend is None else grads[0].copy_(addend)
    for s in scales:
        grad_out, depthwise, pointwise = grad_outs[s], depthwise_weights[s], pointwise_weights[s]
        if needs_biases:
            _store_grad_biases(grad_out, pointwise, biases[s], biases[len(scales) + s])
        bias = depthwise_biases[s] if depthwise_biases else None
        scale = _Gradients(grad_out, qkv, depthwise, pointwise, bias, head_dim)
        middle = scale.compute(needs_qkv, (weights[s], weights[len(scales) + s]) if needs_weights else None)
        if needs_qkv:
            to = grads[0] if s == scales[-1] else torch.empty_like(grads[0], dtype=torch.float32)
            _grad_qkv(middle, depthwise, addend, to)
            addend = to
    return [*grads, *weights, *biases]


class _Gradients:
    """One scale's middle and gradients of the weights: in one launch if they fit in a program, or one by one."""

    def __init__(
        self, grad_out: Tensor, qkv: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor | None, head_dim: int
    ) -> None:
        self.grad_out, self.qkv, self.depthwise, self.pointwise, self.bias = grad_out, qkv, depthwise, pointwise, bias
        self.head_dim, self.k, self.size = head_dim, depthwise.shape[-1], qkv.shape[2:]
        self.precision = product_precision(qkv.dtype)

    def compute(self, needs_middle: bool, weights: tuple[Tensor, Tensor] | None) -> Tensor:
        """middle, of qkv's dtype, if it is needed; fills the gradients of both weights, if they are wanted."""
        dim, k, middle = self.head_dim, self.k, empty_image(self.qkv, self.qkv.shape[1])
        if weights is None:
            if needs_middle:
                self._launch(middle_config(dim, *self.size), middle)
        elif gradients_fit(dim, k, self.precision == "ieee"):
            config = gradients_config(dim, k, *self.size)
            sums = self._launch(config, middle if needs_middle else None, pointwise=True, taps=True)
            _store(weights, sums[:, :dim], sums[:, dim:])
        else:
            self._launch(middle_config(dim, *self.size), middle)
            sums = self._launch(grad_pointwise_config(dim, *self.size), None, pointwise=True)
            _store(weights, sums, _grad_taps(middle, self.qkv, k))
        return middle

    def _launch(
        self, config: AggregationConfig, middle: Tensor | None, pointwise: bool = False, taps: bool = False
    ) -> Tensor:
        """Fills middle; returns the sums [3T, columns] in fp32: the programs' partial sums, added in their order."""
        qkv, dim, k = self.qkv, self.head_dim, self.k
        batch, channels, height, width = qkv.shape
        tiling, groups = Tiling(config, height, width), channels // dim
        c_blocks = -(-dim // config.block_c)
        r_blocks = -(-dim // config.block_r) if middle is None else 1
        tasks, per_program, programs = tiling.runs(batch, groups * c_blocks * r_blocks)
        columns = (dim if pointwise else 0) + (k * k if taps else 0)
        partials = qkv.new_empty((programs, channels, columns), dtype=torch.float32)
        filled, bias = qkv if middle is None else middle, self.depthwise if self.bias is None else self.bias
        launch(
            gradients_kernel,
            groups * c_blocks * r_blocks * programs,
            *(self.grad_out, qkv, self.depthwise, self.pointwise, bias, filled, partials),
            *(height, width, tiling.tiles_w, tiling.tiles, tasks, per_program, groups, columns),
            *(*self.grad_out.stride(), *qkv.stride(), *tap_strides(self.depthwise)),
            *(*self.pointwise.stride()[:2], _bias_stride(self.bias), *filled.stride()),
            D=dim,
            C_BLOCKS=c_blocks,
            BLOCK_R=config.block_r,
            R_BLOCKS=r_blocks,
            K=k,
            EVEN=height % config.rows == 0,
            HAS_DEPTHWISE_BIAS=self.bias is not None,
            STORES_MIDDLE=middle is not None,
            POINTWISE=pointwise,
            TAPS=taps,
            PRECISION=self.precision,
            **tiling.meta,
        )
        return partials.sum(dim=0)


def _store(weights: tuple[Tensor, Tensor], grad_pointwise: Tensor, grad_taps: Tensor) -> None:
    """Rounds the sums once. Taps come with dx first."""
    depthwise, pointwise = weights
    k = depthwise.shape[-1]
    pointwise.copy_(grad_pointwise[:, :, None, None])
    depthwise.copy_(grad_taps.unflatten(1, (1, k, k)).transpose(2, 3))


def _grad_taps(middle: Tensor, qkv: Tensor, k: int) -> Tensor:
    batch, channels, height, width = qkv.shape
    tiling = Tiling(grad_taps_config(height, width), height, width)
    blocks = -(-channels // tiling.block_c)
    tasks, per_program, programs = tiling.runs(batch, blocks)
    partials = qkv.new_empty((programs, channels, k * k), dtype=torch.float32)
    launch(
        grad_taps_kernel,
        blocks * programs,
        *(middle, qkv, partials, height, width, tiling.tiles_w, tiling.tiles, tasks, per_program, channels, blocks),
        *(*middle.stride(), *qkv.stride()),
        K=k,
        **tiling.meta,
    )
    return partials.sum(dim=0)


def _store_grad_biases(grad_out: Tensor, pointwise: Tensor, grad_depthwise: Tensor, grad_pointwise: Tensor) -> None:
    """The sum of grad_out over all tokens, and P^T of that. Biases are rare, and this needs no kernel of its own."""
    channels, head_dim = pointwise.shape[:2]
    sums = grad_out.sum(dim=(0, 2, 3), dtype=torch.float32)
    grad_pointwise.copy_(sums)
    products = pointwise.reshape(channels // head_dim, head_dim, head_dim) * sums.view(-1, head_dim, 1)
    grad_depthwise.copy_(products.sum(dim=1).view(channels))


def _grad_qkv(middle: Tensor, depthwise: Tensor, addend: Tensor | None, to: Tensor) -> None:
    batch, channels, height, width = to.shape
    k = depthwise.shape[-1]
    tiling = Tiling(grad_qkv_config(height, width), height, width)
    blocks = -(-channels // tiling.block_c)
    added = to if addend is None else addend
    launch(
        grad_qkv_kernel,
        batch * blocks * tiling.tiles,
        *(middle, depthwise, added, to, height, width, tiling.tiles_w, tiling.tiles, channels, blocks),
        *(*middle.stride(), *tap_strides(depthwise), *added.stride(), *to.stride()),
        K=k,
        HAS_ADDEND=addend is not None,
        **tiling.meta,
    )
