"""lite_mla: checks, choice of the backend, autograd, fake kernels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._autograd import (
    apply_backward,
    by_kind,
    keep_nothing,
    keep_signatures,
    needs_autograd,
    only_needed,
    refuse_second_order,
)
from ._backends import choose, registered
from ._checks import (
    check_aggregation,
    check_bool,
    check_eps,
    check_image,
    check_like,
    check_place,
    check_positive_int,
    check_shape,
    shape_text,
)
from ._fakes import empty_image, empty_state, register_fakes
from ._python_ops import register_python

OP = "lite_mla"


def lite_mla(
    x: Tensor,
    qkv_weight: Tensor,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    proj_weight: Tensor,
    *,
    head_dim: int,
    qkv_bias: Tensor | None = None,
    depthwise_biases: Sequence[Tensor] | None = None,
    pointwise_biases: Sequence[Tensor] | None = None,
    proj_scale: Tensor | None = None,
    proj_shift: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-15,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """A whole LiteMLA block, multi-scale ReLU linear attention, up to an affine epilogue; inference and training.

    qkv = W_qkv x;  qkv_s = P_s (D_s * qkv) per scale s;  out = ReLU linear attention of [qkv, qkv_1, ... qkv_S];
    y = proj_scale * (W_proj out) + proj_shift + residual.

    Args:
        x: [B, C, H, W]; float16, bfloat16, float32 or float64. Any strides. B may be 0, H and W may not.
        qkv_weight: [3T, C, 1, 1] with T = heads * D; output channels head-major, inside a head [q(D) | k(D) | v(D)].
        depthwise_weights, pointwise_weights: S tensors [3T, 1, k, k] and [3T, D, 1, 1]; see `multiscale_aggregate`.
            S may be 0.
        proj_weight: [C_out, T * (1 + S), 1, 1]; input channels scale-major, then head.
        head_dim: D, at least 1.
        qkv_bias: [3T] or None.
        depthwise_biases, pointwise_biases: S tensors [3T] each, or None for both.
        proj_scale, proj_shift: [C_out] or None: a folded norm, a bias. x's dtype or at least float32.
        residual: [B, C_out, H, W] or None; any strides.
        eps: added to the attention's denominator, in float32 (float64 for float64).
        recompute: save x alone for the backward, and compute qkv again there.
        backend: "auto", "reference", "cpu", "triton" or "cuda". A named backend runs or raises.
        All tensors have x's dtype (but for proj_scale and proj_shift) and device.

    Returns:
        [B, C_out, H, W] of x's dtype; channels_last if x is.

    Numerics: products and sums in float32 (float64 for float64) from the stored values. qkv is stored, hence rounded
    once, in x's dtype; what lies between qkv and y is float32, and y is rounded once; the triton and cuda backends also
    store, and round, the attention's result, and cuda a wide projection's. The cpu backend gives the same bits from run
    to run, at any thread count, in any layout and with or without gradients. Backward saves x, qkv and a [B, heads * (1
    + S), D + 1, D] state, or x alone; a second differentiation and forward-mode differentiation raise.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, number of tensors, device, eps or backend name.
        NotImplementedError: the named backend cannot run here; the message says why.

    Source: H. Cai et al., "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction", 2023.
    """
    _check_x_and_qkv_weight(x, qkv_weight, head_dim)
    check_aggregation(
        OP,
        "x",
        x,
        qkv_weight.shape[0],
        head_dim,
        depthwise_weights,
        pointwise_weights,
        depthwise_biases,
        pointwise_biases,
    )
    scales = len(depthwise_weights)
    _check_proj_weight(x, proj_weight, qkv_weight.shape[0] // 3 * (1 + scales))
    _check_vectors(x, qkv_weight, proj_weight, qkv_bias, proj_scale, proj_shift)
    if residual is not None:
        check_like(OP, "residual", residual, "x", x)
        check_shape(OP, "residual", residual, (x.shape[0], proj_weight.shape[0], *x.shape[2:]))
    check_eps(OP, eps)
    check_bool(OP, "recompute", recompute)
    compute = torch.promote_types(x.dtype, torch.float32)
    proj_scale = None if proj_scale is None else proj_scale.to(compute)
    proj_shift = None if proj_shift is None else proj_shift.to(compute)
    sizes = [weight.shape[-1] for weight in depthwise_weights]
    backend = choose(OP, backend, x.device.type, x.dtype, head_dim, sizes)
    if backend == "reference":
        return reference.lite_mla(
            x,
            qkv_weight,
            depthwise_weights,
            pointwise_weights,
            proj_weight,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            depthwise_biases=depthwise_biases,
            pointwise_biases=pointwise_biases,
            proj_scale=proj_scale,
            proj_shift=proj_shift,
            residual=residual,
            eps=eps,
        )
    parameters = (
        *(qkv_weight, *depthwise_weights, *pointwise_weights, proj_weight),
        *(qkv_bias, *(depthwise_biases or ()), *(pointwise_biases or ()), proj_scale, proj_shift),
    )
    if needs_autograd((x, residual, *parameters)):
        y: Tensor = _LiteMLA.apply(backend, head_dim, float(eps), scales, not recompute, residual, x, *parameters)[0]
        return y
    return _LiteMLA.forward(backend, head_dim, float(eps), scales, False, residual, x, *parameters)[0]


def _check_x_and_qkv_weight(x: Tensor, qkv_weight: Tensor, head_dim: int) -> None:
    check_positive_int(OP, "head_dim", head_dim)
    check_image(OP, "x", x)
    _, channels, height, width = x.shape
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"{OP}: x must be of shape [B, C > 0, H > 0, W > 0], got {shape_text(x)}")
    check_like(OP, "qkv_weight", qkv_weight, "x", x)
    rows = qkv_weight.shape[0] if qkv_weight.dim() == 4 else 0
    if rows == 0 or rows % (3 * head_dim) != 0 or qkv_weight.shape[1:] != (channels, 1, 1):
        expected = f"[heads * 3 * {head_dim}, {channels}, 1, 1]"
        raise ValueError(f"{OP}: qkv_weight must be of shape {expected}, got {shape_text(qkv_weight)}")


def _check_proj_weight(x: Tensor, proj_weight: Tensor, columns: int) -> None:
    check_like(OP, "proj_weight", proj_weight, "x", x)
    if proj_weight.dim() != 4 or proj_weight.shape[0] == 0 or proj_weight.shape[1:] != (columns, 1, 1):
        expected = f"[C_out, {columns}, 1, 1]"
        raise ValueError(f"{OP}: proj_weight must be of shape {expected}, got {shape_text(proj_weight)}")


def _check_vectors(
    x: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_scale: Tensor | None,
    proj_shift: Tensor | None,
) -> None:
    if qkv_bias is not None:
        check_like(OP, "qkv_bias", qkv_bias, "x", x)
        check_shape(OP, "qkv_bias", qkv_bias, (qkv_weight.shape[0],))
    for arg, vector in (("proj_scale", proj_scale), ("proj_shift", proj_shift)):
        if vector is None:
            continue
        if not isinstance(vector, Tensor):
            raise TypeError(f"{OP}: {arg} must be a tensor, got {type(vector).__name__}")
        accepted = (x.dtype, torch.promote_types(x.dtype, torch.float32))
        if vector.dtype not in accepted:
            expected = " or ".join(str(dtype) for dtype in dict.fromkeys(accepted))
            raise TypeError(f"{OP}: {arg} must be of dtype {expected}, got {vector.dtype}")
        check_place(OP, arg, vector, "x", x)
        check_shape(OP, arg, vector, (proj_weight.shape[0],))


def _op_arguments(scales: int, parameters: Sequence[Any]) -> tuple[Any, ...]:
    """From the flat parameters of the Functions, which take no lists, to the arguments of the registered ops.

    Flat is the order in which the backward returns gradients: qkv_weight, depthwise and pointwise weights, proj_weight,
    qkv_bias, depthwise and pointwise biases (or none), proj_scale, proj_shift. Missing vectors are None.
    """
    weights, (proj_weight, qkv_bias, *biases) = parameters[1 : 1 + 2 * scales], parameters[1 + 2 * scales : -2]
    depthwise, pointwise, depthwise_biases, pointwise_biases = by_kind([*weights, *biases], scales)
    products = (parameters[0], depthwise, pointwise, proj_weight)
    return (*products, qkv_bias, depthwise_biases, pointwise_biases, *parameters[-2:])


class _LiteMLA(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        backend: str,
        head_dim: int,
        eps: float,
        scales: int,
        save: bool,
        residual: Tensor | None,
        x: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = _op_arguments(scales, parameters)
        y, qkv, state = registered(OP, "fwd", backend)(x, *arguments, residual, head_dim, eps, save)
        return y, qkv, state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, ctx.head_dim, ctx.eps, ctx.scales, save, _, x, *parameters = inputs
        _, qkv, state = output
        ctx.given = [parameter is not None for parameter in parameters]
        ctx.mark_non_differentiable(qkv, state)
        kept = (qkv, state) if save else (None, None)
        ctx.save_for_backward(x, *kept, *parameters[:-1])  # the shift moves no gradient but its own

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_residual, needs_x, *needed = ctx.needs_input_grad[5:]
        needs_weights = any(needed)
        grads: Sequence[Tensor] = ()
        if needs_x or needs_weights:
            config = (ctx.backend, ctx.head_dim, ctx.eps, ctx.scales, ctx.given[-1], needs_x, needs_weights)
            grads = apply_backward(_LiteMLABackward, *config, grad_y, *ctx.saved_tensors)
        computed = [needs_x, *(needs_weights and given for given in ctx.given)]
        by_input = only_needed(grads, computed, [needs_x, *needed])
        return (None, None, None, None, None, grad_y if needs_residual else None, *by_input)


class _LiteMLABackward(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(keep_nothing)
    backward = staticmethod(refuse_second_order(OP))

    @staticmethod
    def forward(
        backend: str,
        head_dim: int,
        eps: float,
        scales: int,
        has_shift: bool,
        needs_x: bool,
        needs_weights: bool,
        grad_y: Tensor,
        x: Tensor,
        qkv: Tensor | None,
        state: Tensor | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        arguments = _op_arguments(scales, (*parameters, None))[:-1]
        return tuple(
            registered(OP, "bwd", backend)(
                grad_y, x, qkv, state, *arguments, has_shift, head_dim, eps, needs_x, needs_weights
            )
        )


keep_signatures(_LiteMLA, _LiteMLABackward)


def _fwd_fake(
    x: Tensor,
    qkv_weight: Tensor,
    depthwise_weights: list[Tensor],
    pointwise_weights: list[Tensor],
    proj_weight: Tensor,
    qkv_bias: Tensor | None,
    depthwise_biases: list[Tensor],
    pointwise_biases: list[Tensor],
    proj_scale: Tensor | None,
    proj_shift: Tensor | None,
    residual: Tensor | None,
    head_dim: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = empty_image(x, proj_weight.shape[0])
    channels = qkv_weight.shape[0]
    groups = channels // (3 * head_dim) * (1 + len(depthwise_weights))
    state = empty_state(x, groups, head_dim)
    if not save:
        return y, x.new_empty(0), state.new_empty(0)
    return y, x.new_empty((x.shape[0], channels, *x.shape[2:])), state


def _fwd_fake_on_gpu(x: Tensor, qkv_weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As the native op's, but that qkv has the format of x, as torch's products give it."""
    y, qkv, state = _fwd_fake(x, qkv_weight, *arguments)
    return y, empty_image(x, qkv_weight.shape[0]) if arguments[-1] else qkv, state


def _bwd_fake(
    grad_y: Tensor,
    x: Tensor,
    qkv: Tensor | None,
    state: Tensor | None,
    qkv_weight: Tensor,
    depthwise_weights: list[Tensor],
    pointwise_weights: list[Tensor],
    proj_weight: Tensor,
    qkv_bias: Tensor | None,
    depthwise_biases: list[Tensor],
    pointwise_biases: list[Tensor],
    proj_scale: Tensor | None,
    has_shift: bool,
    head_dim: int,
    eps: float,
    needs_x: bool,
    needs_weights: bool,
) -> list[Tensor]:
    grads = [empty_image(x, x.shape[1])] if needs_x else []
    if not needs_weights:
        return grads
    weights = (qkv_weight, *depthwise_weights, *pointwise_weights, proj_weight)
    vectors = ([] if qkv_bias is None else [qkv_bias], depthwise_biases, pointwise_biases)
    grads += [tensor.new_empty(tensor.shape) for tensor in (*weights, *chain(*vectors))]
    epilogues = (proj_scale is not None) + has_shift
    compute = torch.promote_types(x.dtype, torch.float32)
    return grads + [proj_weight.new_empty(proj_weight.shape[0], dtype=compute) for _ in range(epilogues)]


register_fakes(OP, _fwd_fake, _bwd_fake)
_PRODUCTS = "Tensor qkv_weight, Tensor[] depthwise_weights, Tensor[] pointwise_weights, Tensor proj_weight, "
_VECTORS = "Tensor? qkv_bias, Tensor[] depthwise_biases, Tensor[] pointwise_biases, Tensor? proj_scale, "
for _backend in ("triton", "cuda"):
    register_python(
        OP,
        "fwd",
        _backend,
        f"(Tensor x, {_PRODUCTS}{_VECTORS}Tensor? proj_shift, Tensor? residual, int head_dim, float eps, bool save) "
        "-> (Tensor, Tensor, Tensor)",
        _fwd_fake_on_gpu,
    )
    register_python(
        OP,
        "bwd",
        _backend,
        f"(Tensor grad_y, Tensor x, Tensor? qkv, Tensor? state, {_PRODUCTS}{_VECTORS}bool has_shift, int head_dim, "
        "float eps, bool needs_x, bool needs_weights) -> Tensor[]",
        _bwd_fake,
    )
