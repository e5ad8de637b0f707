"""What the autograd Functions of the ops share: when they are needed, and what their backward does not promise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_autograd(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call must go through the op's Function; a bare op is quicker where no gradient is asked for."""
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return True  # the Function raises for forward mode, where a bare op would return zero tangents
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """`setup_context` of a Function that cannot be differentiated."""


def refuse_second_order(op: str) -> Callable[..., None]:
    """`backward` of the Function that holds an op's backward.

    That one is a Function of its own, so that differentiating it raises; a mere `once_differentiable` lets
    `autograd.grad(..., allow_unused=True)` return None in silence.
    """

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"{op}: derivative must be of first order, got a second differentiation; use backend='reference' for it"
        )

    return backward


def apply_backward(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Runs the Function of an op's backward.

    Compiled backwards refuse a second differentiation themselves, and Dynamo passes one argument too many to a Function
    without gradients whose forward takes *args: there its forward is called as a function.
    """
    if torch.compiler.is_compiling():
        return function.forward(*arguments)
    return function.apply(*arguments)


def by_kind(parameters: Sequence[Tensor], scales: int) -> list[list[Tensor]]:
    """The flat parameters of the aggregation (Functions take no lists) as four lists: depthwise and pointwise weights,
    depthwise and pointwise biases. The biases may be missing."""
    return [list(parameters[i * scales : (i + 1) * scales]) for i in range(4)]


def only_needed(grads: Sequence[Tensor], computed: Sequence[bool], needed: Sequence[bool]) -> list[Tensor | None]:
    """One entry per input: `grads` holds those that were computed, of which not all may be asked for."""
    remaining = iter(grads)
    by_input = [next(remaining) if was_computed else None for was_computed in computed]
    return [grad if is_needed else None for grad, is_needed in zip(by_input, needed, strict=True)]


def keep_signatures(*functions: type[torch.autograd.Function]) -> None:
    """apply() asks for the signature of forward at every call; working it out takes longer than a small kernel."""
    for function in functions:
        function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
