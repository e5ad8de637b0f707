"""What rounding does to lite_mla: the exact formula, in float64, with a random rounding error at every stage.

The errors are those that any implementation of the contract makes: the stored tensors (qkv, y; in the backward what
passes between the stages) are rounded to x's dtype, and every sum, product and quotient is off by up to half a unit in
the last place of float32 (of float64 for float64) of the terms that it adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.block_common import Arguments, in_dtype, results


def prescribed(arguments: Arguments, seed: int) -> Arguments:
    """One draw of the results: output and gradients, the gradients rounded to their dtypes.

    A backward computes the aggregated scales again and may store them; every other draw does so, for its gradients.
    """
    dtype = arguments["x"].dtype
    wide = in_dtype(arguments, torch.float64)
    stored = dtype if seed % 2 else torch.float64

    def block(scales: torch.dtype, **kwargs: Any) -> Tensor:
        noise = Noise(torch.finfo(torch.promote_types(dtype, torch.float32)).eps, seed)
        return noisy_block(noise, dtype, scales, **kwargs)

    found = results(partial(block, stored), wide, dtype)
    if stored != torch.float64:
        found["out"] = block(torch.float64, **wide)
    vectors = ("grad_proj_scale", "grad_proj_shift")
    return {name: result if name in vectors else result.to(dtype) for name, result in found.items()}


class Noise:
    """Rounding errors of random size and sign, up to eps / 2, forward and backward."""

    def __init__(self, eps: float, seed: int) -> None:
        self.eps, self.generator = eps, torch.Generator().manual_seed(seed)

    def of(self, size: Tensor) -> Tensor:
        """An error for each element of `size`, the sum of the absolute values of what is added up there."""
        uniform = torch.rand(size.shape, generator=self.generator, dtype=torch.float64)
        return (uniform - 0.5) * self.eps * size.detach()

    def relative(self, x: Tensor) -> Tensor:
        return x * (1 + self.of(torch.ones_like(x)))

    def of_terms(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`function`, which adds and multiplies, with errors in proportion to the absolute values of its terms."""
        result: Tensor = _SumOfProducts.apply(self, function, *tensors)
        return result

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        def convolve(*tensors: Tensor) -> Tensor:
            return F.conv2d(*tensors, padding=weight.shape[-1] // 2, groups=groups)

        return self.of_terms(convolve, x, weight, *([] if bias is None else [bias]))


class _SumOfProducts(torch.autograd.Function):
    """Errors in proportion to the sum of the absolute values of the terms, in the gradients too."""

    @staticmethod
    def forward(ctx: Any, noise: Noise, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.noise, ctx.function = noise, function
        ctx.save_for_backward(*tensors)
        return function(*tensors) + noise.of(function(*(tensor.abs() for tensor in tensors)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        exact = _gradients(ctx.function, ctx.saved_tensors, grad)
        sizes = _gradients(ctx.function, [tensor.abs() for tensor in ctx.saved_tensors], grad.abs())
        return (None, None, *(g + ctx.noise.of(size) for g, size in zip(exact, sizes, strict=True)))


def _gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(function(*leaves), leaves, grad)


class _StoredGradient(torch.autograd.Function):
    """The identity; its gradient is a tensor that the backward stores in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype).double(), None


def noisy_block(
    noise: Noise,
    dtype: torch.dtype,
    scales: torch.dtype,
    *,
    x: Tensor,
    qkv_weight: Tensor,
    depthwise_weights: list[Tensor],
    pointwise_weights: list[Tensor],
    proj_weight: Tensor,
    head_dim: int,
    eps: float,
    **optional: Any,
) -> Tensor:
    channels = qkv_weight.shape[0]
    qkv = noise.conv(x, qkv_weight, optional.get("qkv_bias")).to(dtype).double()
    multi_scale = [qkv]
    for s, (depthwise, pointwise) in enumerate(zip(depthwise_weights, pointwise_weights, strict=True)):
        first, second = (
            optional[name][s] if name in optional else None for name in ("depthwise_biases", "pointwise_biases")
        )
        between = noise.conv(qkv, depthwise, first, groups=channels)
        aggregated = noise.conv(between, pointwise, second, groups=channels // head_dim)
        multi_scale.append(_StoredGradient.apply(aggregated, dtype))
    out = torch.cat([noisy_attention(noise, packed, head_dim, eps, scales) for packed in multi_scale], dim=1)
    y = noise.conv(_StoredGradient.apply(out, dtype), proj_weight, None)
    if "proj_scale" in optional:
        y = noise.of_terms(lambda a, vector: a * vector.view(1, -1, 1, 1), y, optional["proj_scale"])
    if "proj_shift" in optional:
        y = noise.of_terms(lambda a, vector: a + vector.view(1, -1, 1, 1), y, optional["proj_shift"])
    return (y + optional["residual"] if "residual" in optional else y).to(dtype)


def noisy_attention(noise: Noise, packed: Tensor, head_dim: int, eps: float, stored: torch.dtype) -> Tensor:
    batch, channels, height, width = packed.shape

    def state_of(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = packed.reshape(batch, channels // (3 * head_dim), 3 * head_dim, height * width)
        q, k, v = tokens.split(head_dim, dim=2)  # [B, heads, D, N]
        q, k = q.relu(), k.relu()
        ones = torch.ones_like(k[:, :, :1]).mT
        return q, noise.of_terms(torch.matmul, v, k.mT), noise.of_terms(torch.matmul, k, ones)

    q, kv, z = state_of(packed.to(stored).double())
    if stored != torch.float64:  # the state is the forward's, of what was not stored; the gradients are of what was
        _, exact_kv, exact_z = state_of(packed.detach())
        kv, z = kv + (exact_kv - kv).detach(), z + (exact_z - z).detach()
    numerator = noise.of_terms(torch.matmul, kv, q)
    denominator = noise.of_terms(torch.matmul, z.mT, q) + eps
    return noise.relative(numerator / denominator).reshape(batch, channels // 3, height, width)
