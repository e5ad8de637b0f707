"""What is measured: per op its inputs, its providers (ours and the peers), and its arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from efficientvit_kernels import relu_linear_attention
from efficientvit_kernels.testing import make_qkv, official_relu_linear_attention

Step = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """relu_linear_attention at one layer of a model: B images, heads per scale, D, H x W, two scales."""

    name: str
    batch: int
    heads: int
    head_dim: int
    height: int
    width: int

    @property
    def flops_forward(self) -> float:
        """Products of the two matrix multiplications, D x (D + 1) per token each; two operations a product."""
        tokens = self.batch * self.height * self.width * 2 * self.heads
        return 4.0 * tokens * self.head_dim * (self.head_dim + 1)

    @property
    def flops_backward(self) -> float:
        """grad_q, the gradient of the state, grad_k and grad_v: four products of the same size."""
        return 2 * self.flops_forward


SHAPES = [
    Shape("b1-cls224 stage 3", 1, 8, 16, 14, 14),
    Shape("b1-cls224 stage 4", 1, 16, 16, 7, 7),
    Shape("b1-seg512 stage 3", 1, 8, 16, 32, 32),
    Shape("b3-seg1024x2048 stage 3", 1, 8, 32, 64, 128),
    Shape("l1-cls224 stage 4", 1, 16, 32, 7, 7),
    Shape("sam-l1 stage 4", 1, 16, 32, 32, 32),
]

# Each takes packed qkv (a list of two) and returns what one timed call does.
PROVIDERS: dict[str, Callable[[list[Tensor], int], Tensor]] = {
    "ours": lambda qkv, head_dim: relu_linear_attention(qkv, head_dim),
    "eager": official_relu_linear_attention,
}


def providers(compile_peer: bool) -> dict[str, Callable[[list[Tensor], int], Tensor]]:
    found = dict(PROVIDERS)
    if compile_peer:
        torch.compiler.reset()
        found["torch.compile"] = torch.compile(official_relu_linear_attention, fullgraph=True, dynamic=False)
    return found


def make_step(
    function: Callable[[list[Tensor], int], Tensor], shape: Shape, dtype: torch.dtype, layout: str, train: bool
) -> Step:
    qkv = make_qkv(
        shape.batch, shape.heads, shape.head_dim, shape.height, shape.width, scales=2, dtype=dtype, layout=layout
    )
    if not train:

        def inference() -> object:
            with torch.no_grad():
                return function(qkv, shape.head_dim)

        return inference
    leaves = [tensor.requires_grad_() for tensor in qkv]
    grad_out = torch.randn_like(function(leaves, shape.head_dim))

    def training() -> object:
        return torch.autograd.grad(function(leaves, shape.head_dim), leaves, grad_out)

    return training
