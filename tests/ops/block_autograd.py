"""Checks under autograd and torch.compile that hold for multiscale_aggregate and lite_mla alike.

`call` is a public op with its backend bound, and `arguments` its keyword arguments; see `block_common`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efficientvit_kernels.testing import native_calls
from tests.ops.block_common import (
    GRAD_OUT_LAYOUTS,
    Arguments,
    as_leaves,
    grad_out_of_layout,
    grad_outs_like,
    mapped,
    outputs_of,
    results,
    subsets,
    tensors_of,
)

Call = Callable[..., Any]


def check_requires_grad_subsets(call: Call, arguments: Arguments) -> None:
    """F19: gradients for what asks for them, the same bits as together, None elsewhere."""
    expected = results(call, arguments)
    names = list(tensors_of(arguments))
    for needed in subsets(names):
        leaves = as_leaves(arguments, needed.__contains__)
        outputs = outputs_of(call(**leaves))
        grad_outs = grad_outs_like(outputs, next(iter(outputs.values())).dtype)
        asked = {out: grad for out, grad in zip(outputs.values(), grad_outs, strict=True) if out.requires_grad}
        assert bool(asked) == bool(needed), needed
        if asked:
            torch.autograd.backward(list(asked), list(asked.values()))
        for name, leaf in tensors_of(leaves).items():
            assert (leaf.grad is not None) == (name in needed), (name, needed)
            assert leaf.grad is None or torch.equal(leaf.grad, expected[f"grad_{name}"]), (name, needed)


def check_grad_out_layouts(call: Call, arguments: Arguments) -> None:
    """F17: grad_out of any strides gives the bits of a contiguous one."""
    leaves = as_leaves(arguments)
    outputs = list(outputs_of(call(**leaves)).values())
    inputs = list(tensors_of(leaves).values())
    for layout in GRAD_OUT_LAYOUTS:
        grad_outs = [grad_out_of_layout(g, layout) for g in grad_outs_like(outputs_of(outputs), outputs[0].dtype)]
        assert not any(grad_out.is_contiguous() for grad_out in grad_outs)
        strided = torch.autograd.grad(outputs, inputs, grad_outs, retain_graph=True)
        plain = torch.autograd.grad(outputs, inputs, [g.contiguous() for g in grad_outs], retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True)), layout


def check_no_graph(call: Call, arguments: Arguments) -> None:
    leaves = as_leaves(arguments)
    with torch.no_grad():
        plain = outputs_of(call(**leaves))
    assert all(out.grad_fn is None for out in plain.values())
    with torch.inference_mode():
        inference = outputs_of(call(**leaves))
    recorded = outputs_of(call(**leaves))
    for name, out in plain.items():
        assert inference[name].is_inference()
        assert torch.equal(inference[name], out)
        assert torch.equal(recorded[name], out)  # training computes what inference computes, bit for bit


def check_backward_twice(call: Call, arguments: Arguments) -> None:
    """Through the same graph with retain_graph; without it the second one raises, and so does a changed input."""
    leaves = as_leaves(arguments)
    inputs = list(tensors_of(leaves).values())
    total = _total(call(**leaves))
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    second = torch.autograd.grad(total, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, inputs)


def check_changed_input_is_noticed(call: Call, arguments: Arguments, name: str) -> None:
    """F18"""
    copies = mapped(as_leaves(arguments), lambda _, leaf: leaf * 1)
    total = _total(call(**copies))
    with torch.no_grad():
        tensors_of(copies)[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def check_double_backward_raises(call: Call, arguments: Arguments, op: str) -> None:
    leaves = as_leaves(arguments)
    for name, leaf in tensors_of(leaves).items():
        total = _total(call(**leaves), power=2)
        (grad,) = torch.autograd.grad(total, leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{op}: derivative must be of first order"):
            torch.autograd.grad(grad.sum(), list(tensors_of(leaves).values()), allow_unused=True)
        assert grad.requires_grad, name


def check_forward_mode_raises(call: Call, arguments: Arguments, name: str) -> None:
    """A bare op would silently return a zero tangent."""
    value = arguments[name]

    def function(tensor: Tensor) -> Any:
        return call(**arguments | {name: tensor})

    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(function, (value,), (value,))


def check_func_grad(call: Call, reference: Call, arguments: Arguments, name: str) -> None:
    actual, expected = (
        torch.func.grad(lambda tensor, f=function: _total(f(**arguments | {name: tensor}), power=2))(arguments[name])
        for function in (call, reference)
    )
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)


def check_vmap_is_refused(call: Call, arguments: Arguments, name: str) -> None:
    with pytest.raises(RuntimeError, match=r"[Bb]atch"):
        torch.vmap(lambda tensor: call(**arguments | {name: tensor}))(torch.stack([arguments[name]] * 2))


def check_compiled(call: Call, arguments_of_size: Callable[[int, int, int], Arguments], calls: int) -> None:
    """One static graph, then one dynamic one, forward and backward, without a graph break; never a third."""

    def function(**kwargs: Any) -> list[Tensor]:
        return [out.sin() for out in outputs_of(call(**kwargs)).values()]

    compiled = torch.compile(function, fullgraph=True)
    sizes = [(1, 6, 5), (3, 9, 7), (2, 11, 4), (5, 3, 8)]
    for step, size in enumerate(sizes):
        arguments = arguments_of_size(*size)
        expected = results(function, arguments)
        before = native_calls()
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            found = results(compiled, arguments)
        assert native_calls() - before == calls
        for name, result in found.items():
            scale = float(expected[name].abs().max())
            assert torch.allclose(result, expected[name], rtol=1e-5, atol=2e-6 * max(scale, 1.0)), name


def _total(result: Any, power: int = 1) -> Tensor:
    outputs = list(outputs_of(result).values())
    return torch.stack([out.pow(power).sum() for out in outputs]).sum()
