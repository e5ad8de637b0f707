"""How results are judged, here and in the tests, benchmarks and command-line tools: rule T, baselines, input makers.

Truth is the reference in float64 on the same rounded inputs. Rule T allows a result twice the error of the official
formula in the same dtype, and two units in the last place; float64 must be within 1e-12 of the largest value.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library

FLOAT64_TOLERANCE = 1e-12


def ulp(dtype: torch.dtype, value: float) -> float:
    """Distance between neighbouring numbers of `dtype` at |value|."""
    info = torch.finfo(dtype)
    if value == 0 or not math.isfinite(value):
        return float(info.smallest_normal * info.eps)
    exponent = max(math.floor(math.log2(abs(value))), round(math.log2(info.smallest_normal)))
    return float(info.eps) * 2.0**exponent


@dataclass(frozen=True)
class Verdict:
    """One comparison under rule T. Errors are largest absolute differences from the float64 truth."""

    error: float
    baseline_error: float
    budget: float
    largest: float
    masks_agree: bool

    @property
    def ok(self) -> bool:
        return self.masks_agree and self.error <= self.budget  # False for a NaN error

    @property
    def ratio(self) -> float:
        """Error over the baseline's error: target T2 is a median of at most 1.5 for float32."""
        return self.error / self.baseline_error if self.baseline_error else (math.inf if self.error else 0.0)

    def __str__(self) -> str:
        masks = "" if self.masks_agree else ", NaN or inf in the wrong places"
        return (
            f"error {self.error:.3g} (budget {self.budget:.3g}, official formula {self.baseline_error:.3g}, "
            f"largest value {self.largest:.3g}{masks})"
        )


def rule_t(ours: Tensor, truth: Tensor, base: Tensor, mask_from: Tensor | None = None) -> Verdict:
    """Judges `ours` against the float64 `truth`, with `base` the official formula in the same dtype.

    Where `base` is not finite, pass the official formula in float32, cast to ours.dtype, instead. `mask_from` says
    where NaN and inf belong (the formula in float32, rule T3); default: `truth` cast to ours.dtype.
    """
    if ours.shape != truth.shape or base.shape != truth.shape:
        raise ValueError(
            f"rule_t: ours must be of shape {list(truth.shape)}, got {list(ours.shape)}, {list(base.shape)}"
        )
    expected = truth.to(ours.dtype) if mask_from is None else mask_from.to(ours.dtype)
    masks_agree = all(
        bool(torch.equal(kind(ours), kind(expected))) for kind in (torch.isnan, torch.isposinf, torch.isneginf)
    )
    ours, truth, base = ours.detach(), truth.detach(), base.detach()
    finite = torch.isfinite(expected) & torch.isfinite(truth)
    wide, exact, baseline = ours.double()[finite], truth.double()[finite], base.double()[finite]
    if exact.numel() == 0:
        return Verdict(0.0, 0.0, 0.0, 0.0, masks_agree)
    largest = float(exact.abs().max())
    error, baseline_error = float((wide - exact).abs().max()), float((baseline - exact).abs().max())
    budget = 2 * baseline_error + 2 * ulp(ours.dtype, largest)
    if ours.dtype == torch.float64:
        budget = FLOAT64_TOLERANCE * largest
    return Verdict(error, baseline_error, budget, largest, masks_agree)


def assert_rule_t(what: str, ours: Tensor, truth: Tensor, base: Tensor, mask_from: Tensor | None = None) -> Verdict:
    verdict = rule_t(ours, truth, base, mask_from)
    assert verdict.ok, f"{what}: {verdict}"
    return verdict


def official_relu_linear_attention(qkv: Tensor | Sequence[Tensor], head_dim: int, eps: float = 1e-15) -> Tensor:
    """The official module's attention with its own dtype rules: the baseline of rule T, and a benchmark peer.

    Scales concatenated; linear for N > D, else quadratic; float16 upcast to float32 on the linear path; bfloat16
    products in bfloat16, only the division in float32; on the quadratic path 16-bit products in 16 bit.
    """
    tensors = [qkv] if isinstance(qkv, Tensor) else list(qkv)
    packed = torch.cat(tensors, dim=1)
    batch, _, height, width = packed.shape
    dtype, tokens = packed.dtype, height * width
    half = dtype in (torch.float16, torch.bfloat16)
    linear = tokens > head_dim
    if linear and dtype == torch.float16:
        packed = packed.float()
    q, k, v = packed.reshape(batch, -1, 3 * head_dim, tokens).split(head_dim, dim=2)  # type: ignore[no-untyped-call]  # [B, G, D, N]
    q, k = torch.relu(q), torch.relu(k)
    if linear:
        v = F.pad(v, (0, 0, 0, 1), value=1.0)
        out = (v @ k.transpose(-1, -2)) @ q
        if half:
            out = out.float()
        out = out[:, :, :-1] / (out[:, :, -1:] + eps)
    else:
        weights = k.transpose(-1, -2) @ q  # [B, G, N keys, N queries]
        if half:
            weights = weights.float()
        weights = weights / (weights.sum(dim=2, keepdim=True) + eps)
        out = v @ weights.to(dtype)
    return out.to(dtype).reshape(batch, -1, height, width)


def official_multiscale_aggregate(
    qkv: Tensor,
    depthwise_weights: Sequence[Tensor],
    pointwise_weights: Sequence[Tensor],
    *,
    head_dim: int,
    depthwise_biases: Sequence[Tensor] | None = None,
    pointwise_biases: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The official module's two convolutions per scale, each in the dtype of qkv: the baseline of rule T."""
    channels = qkv.shape[1]
    outputs = []
    for s, (depthwise, pointwise) in enumerate(zip(depthwise_weights, pointwise_weights, strict=True)):
        first = None if depthwise_biases is None else depthwise_biases[s]
        second = None if pointwise_biases is None else pointwise_biases[s]
        out = F.conv2d(qkv, depthwise, first, padding=depthwise.shape[-1] // 2, groups=channels)
        outputs.append(F.conv2d(out, pointwise, second, groups=channels // head_dim))
    return outputs


def official_lite_mla(
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
) -> Tensor:
    """The official module's sequence of ops in the dtype of x: the baseline of rule T.

    The epilogue is a BatchNorm's in eval mode: computed in at least float32 and rounded once; then the residual.
    """
    qkv = F.conv2d(x, qkv_weight, qkv_bias)
    aggregated = official_multiscale_aggregate(
        qkv,
        depthwise_weights,
        pointwise_weights,
        head_dim=head_dim,
        depthwise_biases=depthwise_biases,
        pointwise_biases=pointwise_biases,
    )
    y = F.conv2d(official_relu_linear_attention([qkv, *aggregated], head_dim, eps), proj_weight)
    if proj_scale is not None or proj_shift is not None:
        wide = y.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide if proj_scale is None else wide * proj_scale.view(1, -1, 1, 1)
        y = (wide if proj_shift is None else wide + proj_shift.view(1, -1, 1, 1)).to(x.dtype)
    return y if residual is None else y + residual


def make_qkv(
    batch: int,
    heads: int,
    head_dim: int,
    height: int,
    width: int,
    *,
    scales: int = 1,
    dtype: torch.dtype = torch.float32,
    layout: str = "nchw",
    seed: int = 0,
) -> list[Tensor]:
    """Random qkv tensors, one per scale. `layout`: nchw, channels_last, sliced (every axis cut out of a larger tensor)
    or transposed (H and W swapped in memory)."""
    generator = torch.Generator().manual_seed(seed)
    channels = heads * 3 * head_dim

    def one() -> Tensor:
        if layout == "sliced":
            larger = (batch + 1, channels + 3, height + 2, 2 * width + 1)
            big = torch.randn(larger, generator=generator, dtype=torch.float64)
            return big.to(dtype)[1:, 2 : 2 + channels, 1 : 1 + height, 1 : 1 + 2 * width : 2]
        if layout == "transposed":
            x = torch.randn(batch, channels, width, height, generator=generator, dtype=torch.float64)
            return x.to(dtype).transpose(2, 3)
        x = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64).to(dtype)
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout != "nchw":
            raise ValueError(f"make_qkv: layout must be nchw, channels_last, sliced or transposed, got {layout!r}")
        return x

    return [one() for _ in range(scales)]


def gradients(out: Tensor, grad_out: Tensor, inputs: Iterable[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out, list(inputs), grad_out, allow_unused=False))


def native_calls() -> int:
    """Number of native kernel calls so far in this process, eager or compiled: to show which backend really ran."""
    return _library.cpu_calls()


def triton_launches() -> int:
    """Number of Triton kernel launches so far in this process, in the interpreter, too."""
    launch = sys.modules.get(f"{__package__}.triton_kernels.launch")
    return 0 if launch is None else int(launch.launches())
