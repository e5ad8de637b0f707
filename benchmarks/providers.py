"""What is timed: a provider binds one round's inputs and gives the call that computes an op from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

Dims = tuple[int, ...]
Step = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """What all providers of a row have in common."""

    dtype: torch.dtype = torch.float32
    layout: str = "nchw"
    threads: int = 1
    training: bool = False  # forward + backward, with gradients of every input and weight


@dataclass(frozen=True)
class Provider:
    """`bind(inputs, grad_outs)` returns a call whose result `tensors` understands; only that call is timed."""

    bind: Callable[[list[Tensor], list[Tensor]], Step]
    note: str = ""  # what a reader of the figures must know


def tensors(result: object) -> list[Tensor]:
    """The outputs of a step, then its gradients; torch's tensors or numpy's arrays."""
    items = result if isinstance(result, (list, tuple)) else [result]
    return [item if isinstance(item, Tensor) else torch.from_numpy(item) for item in items]


def random_tensors(shapes: Sequence[Dims], dtype: torch.dtype, layout: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [tensor.contiguous(memory_format=LAYOUTS[layout]) for tensor in made]


def torch_provider(module: nn.Module, settings: Settings, layout: str | None = None, note: str = "") -> Provider:
    """`module` on inputs of `layout` (default: the row's). Its weights are converted once, inputs outside the call.

    Grad mode is set around the timed calls by `timing.grad_mode`, as inference code does it once for many calls.
    """
    memory_format = LAYOUTS[layout or settings.layout]
    module = module.to(memory_format=memory_format)
    parameters = list(module.parameters())

    def bind(inputs: list[Tensor], grad_outs: list[Tensor]) -> Step:
        own = [tensor.detach().clone(memory_format=memory_format) for tensor in inputs]
        if not settings.training:
            return lambda: module(*own)
        leaves = [*(tensor.requires_grad_() for tensor in own), *parameters]
        grads = [tensor.contiguous(memory_format=memory_format) for tensor in grad_outs]

        def step() -> object:
            out = module(*own)
            outs = [out] if isinstance(out, Tensor) else list(out)
            return [*outs, *torch.autograd.grad(outs, leaves, grads)]

        return step

    return Provider(bind, note)
