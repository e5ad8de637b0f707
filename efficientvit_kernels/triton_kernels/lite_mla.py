"""lite_mla in Triton: forward in four launches, between which only qkv and the attention's result are stored.

Forward: the product for qkv (cuBLAS), aggregation fused with the sum of the states, aggregation fused with their
application, the projection with its epilogue. Where that would take too many registers (D above 32),
aggregation and attention are kernels of their own.
Backward: what lies between the products is computed again from qkv, by the kernels of the two other ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops._fakes import empty_image
from ..ops._lite_mla_backward import Kernels, composed_backward
from ..ops._products import product
from .configs import MAX_REGISTERS
from .launch import arch_of, block_of, launch, product_kind, product_precision, tap_strides
from .lite_mla_configs import BlockConfig, block_config, tiles_per_program, tiles_per_split
from .lite_mla_kernels import aggregate_apply_kernel, aggregate_kv_state_kernel
from .multiscale_aggregate import multiscale_aggregate_bwd, multiscale_aggregate_fwd
from .pointwise import product_with_epilogue
from .relu_linear_attention import apply, kv_states, relu_linear_attention_bwd, summed

Weights = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


def lite_mla_fwd(
    x: Tensor,
    qkv_weight: Tensor,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    proj_weight: Tensor,
    qkv_bias: Tensor | None,
    depthwise_biases: Sequence[Tensor],
    pointwise_biases: Sequence[Tensor],
    proj_scale: Tensor | None,
    proj_shift: Tensor | None,
    residual: Tensor | None,
    head_dim: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and with `save` qkv, in the format of x, and the fp32 state [B, heads * (1 + S), D + 1, D]; empty without."""
    aggregation = (depthwise_weights, pointwise_weights, depthwise_biases, pointwise_biases)
    scales, channels = len(depthwise_weights), qkv_weight.shape[0]
    groups = channels // (3 * head_dim) * (1 + scales)
    state = x.new_empty((x.shape[0], groups, head_dim + 1, head_dim) if save else 0, dtype=torch.float32)
    if x.numel() == 0:
        y = empty_image(x, proj_weight.shape[0])
        return y, empty_image(x, channels) if save else x.new_empty(0), state
    qkv = product(qkv_weight, x, qkv_bias)
    out = empty_image(x, groups * head_dim)
    fused = _fused(qkv, depthwise_weights, head_dim)
    if fused is None:
        multi_scale = [qkv, *multiscale_aggregate_fwd(qkv, *aggregation, head_dim)]
        states = kv_states(multi_scale, head_dim)
        apply(multi_scale, states, state if save else None, out, head_dim, eps)
    else:
        states = _aggregated_states(qkv, aggregation, fused[0], head_dim)
        _aggregate_and_apply(qkv, aggregation, fused[1], states, state if save else None, out, head_dim, eps)
    y = product_with_epilogue(proj_weight, out, proj_scale, proj_shift, residual, like=x)
    return y, qkv if save else x.new_empty(0), state


def _fused(
    qkv: Tensor, depthwise: Sequence[Tensor], head_dim: int
) -> tuple[list[BlockConfig], list[BlockConfig]] | None:
    """Per scale, the configurations of the two fused kernels; None where a scale has none, or there are no scales."""
    kind = product_kind(qkv.dtype)
    state, application = (
        [block_config(kernel, kind, block_of(head_dim), weight.shape[-1], qkv.shape[3]) for weight in depthwise]
        for kernel in ("state", "apply")
    )
    found = [config for config in state if config], [config for config in application if config]
    return found if len(depthwise) > 0 and len(found[0]) == len(found[1]) == len(depthwise) else None


class _Scale:
    """One scale's part of a fused launch: grid, arguments and constexprs that both kernels take."""

    def __init__(self, qkv: Tensor, aggregation: Weights, config: BlockConfig, s: int, head_dim: int) -> None:
        batch, channels, height, width = qkv.shape
        depthwise, pointwise = aggregation[0][s], aggregation[1][s]
        biases = [aggregation[2][s], aggregation[3][s]] if aggregation[2] else [depthwise, pointwise]
        self.heads = channels // (3 * head_dim)
        self.programs = batch * self.heads
        self.tiles, self.tiles_w = config.tiles(height, width)
        self.tensors = (qkv, depthwise, pointwise, *biases)
        self.first_group = (1 + s) * self.heads
        self.strides = (
            *qkv.stride(),
            *tap_strides(depthwise),
            *pointwise.stride()[:2],
            *(bias.stride(0) for bias in biases),
        )
        self.meta: dict[str, Any] = {
            "D": head_dim,
            "BLOCK_D": block_of(head_dim),
            "K": depthwise.shape[-1],
            "ROWS": config.rows,
            "BANDS": config.bands,
            "COLS": config.cols,
            "HAS_BIAS": len(aggregation[2]) > 0,
            "IDENTITY": s == 0,
            "PRECISION": product_precision(qkv.dtype),
            "num_warps": config.num_warps,
            "num_stages": 1,
        }
        if arch_of(qkv).startswith("sm_"):
            # Left to itself, ptxas spills a few registers to fit one more block.
            self.meta["maxnreg"] = MAX_REGISTERS


def _aggregated_states(qkv: Tensor, aggregation: Weights, configs: Sequence[BlockConfig], head_dim: int) -> Tensor:
    """The states [B, heads * (1 + S), splits, D + 1, D] of all scales, with few splits."""
    batch, _, height, width = qkv.shape
    parts = [_Scale(qkv, aggregation, config, s, head_dim) for s, config in enumerate(configs)]
    # All scales share the number of splits; a scale with fewer tiles has empty ones, which are zero.
    splits = max(-(-part.tiles // tiles_per_split(part.tiles)) for part in parts)
    heads = parts[0].heads
    groups = heads * (1 + len(parts))
    states = qkv.new_empty((batch, groups, splits, head_dim + 1, head_dim), dtype=torch.float32)
    for part in parts:
        split_tiles = -(-part.tiles // splits)
        launch(
            aggregate_kv_state_kernel,
            part.programs * splits,
            *(*part.tensors, states, height, width, part.tiles, part.tiles_w, split_tiles, splits, heads, groups),
            *(part.first_group, *part.strides),
            **part.meta,
        )
    return summed(states)


def _aggregate_and_apply(
    qkv: Tensor,
    aggregation: Weights,
    configs: Sequence[BlockConfig],
    states: Tensor,
    state: Tensor | None,
    out: Tensor,
    head_dim: int,
    eps: float,
) -> None:
    """Fills `out`, and `state`, where given, with the sum of the splits."""
    _, _, height, width = qkv.shape
    for s, config in enumerate(configs):
        part = _Scale(qkv, aggregation, config, s, head_dim)
        block_tiles = tiles_per_program(part.tiles, part.programs)
        blocks = -(-part.tiles // block_tiles)
        launch(
            aggregate_apply_kernel,
            part.programs * blocks,
            *(*part.tensors, states, states if state is None else state, out, eps, height, width),
            *(part.tiles, part.tiles_w, block_tiles, blocks, states.shape[2], part.heads, states.shape[1]),
            *(part.first_group, *part.strides, *out.stride()),
            STORE_STATE=state is not None,
            **part.meta,
        )


def _attend(multi_scale: Sequence[Tensor], head_dim: int, eps: float) -> tuple[Tensor, Callable[[], Tensor]]:
    qkv, states = multi_scale[0], kv_states(multi_scale, head_dim)

    def attended() -> Tensor:
        out = empty_image(qkv, states.shape[1] * head_dim)
        apply(multi_scale, states, None, out, head_dim, eps)
        return out

    return states.sum(dim=2), attended


def _attention_grads(
    grad_out: Tensor, multi_scale: Sequence[Tensor], state: Tensor, head_dim: int, eps: float
) -> list[Tensor]:
    return relu_linear_attention_bwd(grad_out, multi_scale, state, head_dim, eps, range(len(multi_scale)))


def _aggregation_grads(
    grad_scales: Sequence[Tensor],
    qkv: Tensor,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    depthwise_biases: Sequence[Tensor],
    head_dim: int,
    needs_weights: bool,
    needs_biases: bool,
    addend: Tensor,
) -> list[Tensor]:
    weights = (depthwise_weights, pointwise_weights, depthwise_biases)
    return multiscale_aggregate_bwd(grad_scales, qkv, *weights, head_dim, True, needs_weights, needs_biases, addend)


_KERNELS = Kernels(multiscale_aggregate_fwd, _attend, _attention_grads, _aggregation_grads)


def lite_mla_bwd(grad_y: Tensor, x: Tensor, qkv: Tensor | None, state: Tensor | None, *arguments: Any) -> list[Tensor]:
    """See `composed_backward`; the state of the forward is not that of the scales as they are stored."""
    return composed_backward(_KERNELS, grad_y, x, qkv, *arguments)
