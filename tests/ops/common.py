"""What the tests of the ops share: executors, dtypes, layouts; samples of relu_linear_attention and their judgement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efficientvit_kernels import reference, relu_linear_attention
from efficientvit_kernels.testing import Verdict, gradients, make_qkv, official_relu_linear_attention, rule_t

BACKENDS = ["reference", "cpu"]
# Where there is no GPU, in Triton's interpreter and in the CUDA emulator: slow, so for small samples only.
EXECUTORS = [*BACKENDS, "triton", "cuda"]
NATIVE = [*BACKENDS, "cuda"]  # Triton has tests of its own for the larger ops
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HALF = (torch.float16, torch.bfloat16)
LAYOUTS = ["nchw", "channels_last", "transposed", "permuted", "sliced", "offset", "expanded"]


def executors(
    dtypes: Sequence[torch.dtype] = (torch.float32,), names: Sequence[str] = EXECUTORS
) -> list[tuple[str, torch.dtype]]:
    """Pairs of an executor and a dtype that it serves, for tests of the arguments "backend" and "dtype"."""
    on_gpu = ("triton", "cuda")
    return [(name, dtype) for name in names for dtype in dtypes if name not in on_gpu or dtype != torch.float64]


def device_of(backend: str) -> str:
    """Where a backend's tensors lie; Triton's interpreter and the CUDA emulator take those of the CPU."""
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Sample:
    """One input of relu_linear_attention."""

    batch: int
    heads: int
    head_dim: int
    height: int
    width: int
    scales: int = 1
    layout: str = "nchw"
    eps: float = 1e-15

    def __str__(self) -> str:
        text = f"b{self.batch}h{self.heads}d{self.head_dim}_{self.height}x{self.width}_s{self.scales}_{self.layout}"
        return text if self.eps == 1e-15 else f"{text}_eps{self.eps}"

    def make(self, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        return make_qkv(
            self.batch,
            self.heads,
            self.head_dim,
            self.height,
            self.width,
            scales=self.scales,
            dtype=dtype,
            layout=self.layout,
            seed=seed,
        )

    @property
    def tokens(self) -> int:
        return self.height * self.width


SAMPLES = [
    # Shapes of the official models: B0-B3 classification at 224 and below, segmentation, L and SAM, DC-AE and SANA.
    *(Sample(1, heads, 16, size, size, scales=2) for heads, size in ((4, 14), (8, 14), (16, 7), (8, 16), (8, 9))),
    *(Sample(1, heads, 32, size, size, scales=2) for heads, size in ((8, 14), (16, 7), (4, 24), (16, 16))),
    Sample(2, 4, 32, 32, 32),
    Sample(1, 2, 16, 64, 128, scales=2, layout="channels_last"),
    Sample(1, 1, 32, 64, 64, scales=2),
    # Head dims: one, odd, between the vector widths, wide.
    *(Sample(2, 2, dim, 9, 7) for dim in (1, 2, 3, 4, 5, 7, 8, 12, 15, 17, 24, 31, 33, 40, 48, 63, 64, 65, 96)),
    Sample(1, 1, 128, 6, 5),
    Sample(1, 1, 256, 3, 5),
    Sample(1, 300, 4, 3, 3),
    # Token counts: one, around the vector widths and the tiles, long rows, odd ones.
    *(Sample(2, 2, 16, height, width) for height, width in ((1, 1), (1, 3), (1, 15), (1, 16), (1, 17), (4, 4), (4, 5))),
    *(Sample(1, 2, 8, 1, tokens) for tokens in (31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 511, 513, 1023, 1025)),
    Sample(1, 1, 16, 1, 5000),
    Sample(1, 1, 4, 97, 101),
    Sample(5, 3, 8, 11, 13, scales=3),
    Sample(33, 1, 4, 3, 5),
    # Layouts.
    *(
        Sample(2, 3, dim, 9, 7, scales=2, layout=layout)
        for dim in (8, 16, 32)
        for layout in ("channels_last", "sliced", "transposed")
    ),
    *(Sample(1, 2, 5, 17, 19, layout=layout) for layout in ("channels_last", "sliced", "transposed")),
    # Epsilons: timm's, one that dominates, none.
    *(Sample(2, 2, 16, 6, 5, eps=eps) for eps in (1e-5, 1e-3, 100.0, 0.0)),
]


def as_layout(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout, inside memory that is NaN everywhere else; "expanded": the first image's."""
    batch, channels, height, width = x.shape
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "permuted":
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    if layout == "sliced":
        big = torch.full((2 * batch, 3 * channels, height + 1, 2 * width), float("nan"), dtype=x.dtype)
        return big[::2, ::3, 1:, ::2].copy_(x)
    if layout == "offset":
        big = torch.full((x.numel() + 3,), float("nan"), dtype=x.dtype)
        return big[3:].view(x.shape).copy_(x)
    if layout == "expanded":
        return x[:1].expand(x.shape) if batch else x
    if layout != "nchw":
        raise ValueError(f"as_layout: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return x.contiguous()


def run(qkv: list[Tensor], head_dim: int, eps: float, backend: str, seed: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of qkv, on the CPU, for a fixed random grad_out."""
    device = device_of(backend)
    leaves = [tensor.detach().to(device).requires_grad_() for tensor in qkv]
    out = relu_linear_attention(leaves, head_dim, eps=eps, backend=backend)
    grads = gradients(out, grad_out_like(out, seed).to(device), leaves)
    return out.detach().cpu(), [grad.cpu() for grad in grads]


def grad_out_like(out: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)


def truth_and_base(qkv: list[Tensor], head_dim: int, eps: float) -> tuple[list[Tensor], list[Tensor]]:
    """[output, gradients...] of the specification in float64, and of the official formula in qkv's dtype.

    For N <= head_dim the official module takes its quadratic path. There our contract is one float32 formula, and the
    official gradients of q and k may cancel to an error of exactly 0 (always for N = 1): the base is then whichever of
    the official formula and the specification in the same dtype errs more.
    """
    dtype = qkv[0].dtype
    grad_out = grad_out_like(reference.relu_linear_attention([t.detach() for t in qkv], head_dim, eps=eps))

    def evaluate(function: object, wide: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(wide).requires_grad_() for tensor in qkv]
        out = function(leaves, head_dim, eps=eps)  # type: ignore[operator]
        results = [out.detach(), *gradients(out, grad_out.to(wide), leaves)]
        return results if wide == torch.float64 else [result.to(dtype) for result in results]

    truth = evaluate(reference.relu_linear_attention, torch.float64)
    base = evaluate(official_relu_linear_attention, dtype)
    tokens = qkv[0].shape[2] * qkv[0].shape[3]
    if tokens <= head_dim:
        other = evaluate(reference.relu_linear_attention, dtype)
        base = [max(pair, key=lambda b, t=t: _error(b, t)) for t, *pair in zip(truth, base, other, strict=True)]
    return truth, base


def _error(result: Tensor, truth: Tensor) -> float:
    difference = (result.double() - truth).abs()
    return float(torch.nan_to_num(difference, nan=0.0, posinf=0.0).max()) if difference.numel() else 0.0


def judge(qkv: list[Tensor], head_dim: int, eps: float, backend: str) -> dict[str, Verdict]:
    """Rule T for the output and for each packed gradient."""
    truth, base = truth_and_base(qkv, head_dim, eps)
    out, grads = run(qkv, head_dim, eps, backend)
    assert out.dtype == qkv[0].dtype
    assert all(grad.dtype == qkv[0].dtype for grad in grads)
    names = ["out", *(f"grad_qkv[{i}]" for i in range(len(qkv)))]
    return {name: rule_t(ours, t, b) for name, ours, t, b in zip(names, [out, *grads], truth, base, strict=True)}


def uncancelled_gradients(qkv: list[Tensor], head_dim: int, eps: float) -> list[float]:
    """Per scale, the largest gradient if nothing cancelled: every term of the formula with its absolute value.

    A gradient carries rounding errors in proportion to this, whatever is left after the cancellation: with equal
    tokens, say, nothing is left of grad_q and grad_k, and their terms are as large as v and grad_out over q.
    """
    out = reference.relu_linear_attention([tensor.detach() for tensor in qkv], head_dim, eps=eps)
    sizes = []
    for tensor, grad_out in zip(qkv, grad_out_like(out).double().abs().chunk(len(qkv), dim=1), strict=True):
        heads = tensor.shape[1] // (3 * head_dim)
        packed = tensor.detach().double().reshape(tensor.shape[0], heads, 3 * head_dim, -1)
        q, k, v = packed.split(head_dim, dim=2)  # [B, heads, D, N]
        q, k, v = q.relu(), k.relu(), v.abs()
        kv, z = v @ k.mT, k.sum(-1, keepdim=True)
        den = z.mT @ q + eps
        grad_num = grad_out.reshape(v.shape) / den
        grad_den = (grad_num * (kv @ q / den)).sum(2, keepdim=True)
        grad_q = (kv.mT @ grad_num + z * grad_den) * (q > 0)
        grad_k = ((grad_num @ q.mT).mT @ v + (q * grad_den).sum(-1, keepdim=True)) * (k > 0)
        grad_v = grad_num @ q.mT @ k
        sizes.append(max(float(grad.max()) for grad in (grad_q, grad_k, grad_v)))
    return sizes
