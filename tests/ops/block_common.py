"""What the tests of multiscale_aggregate and lite_mla share: calls by named arguments, and their judgement by rule T.

`Arguments` are the keyword arguments of a public op: tensors, lists of tensors, numbers, None. Results are named, too:
"out" (or "out[s]" per scale) and "grad_<argument>" for every tensor among the arguments.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from efficientvit_kernels.testing import Verdict, rule_t
from tests.ops.common import device_of

Arguments = dict[str, Any]


def tensors_of(arguments: Arguments) -> dict[str, Tensor]:
    """Every tensor with its name; those in lists as `name[i]`."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, list):
            found |= {f"{name}[{i}]": tensor for i, tensor in enumerate(value)}
    return found


def mapped(arguments: Arguments, change: Callable[[str, Tensor], Tensor]) -> Arguments:
    """The same arguments with `change(name, tensor)` in place of every tensor."""
    result = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            result[name] = change(name, value)
        elif isinstance(value, list):
            result[name] = [change(f"{name}[{i}]", tensor) for i, tensor in enumerate(value)]
    return result


def on_device(arguments: Arguments, backend: str) -> Arguments:
    """Where the backend's kernels run."""
    return mapped(arguments, lambda _, tensor: tensor.to(device_of(backend)))


def as_leaves(arguments: Arguments, needed: Callable[[str], bool] = lambda name: True) -> Arguments:
    return mapped(arguments, lambda name, tensor: tensor.detach().requires_grad_(needed(name)))


def outputs_of(result: Tensor | list[Tensor]) -> dict[str, Tensor]:
    return {"out": result} if isinstance(result, Tensor) else {f"out[{s}]": out for s, out in enumerate(result)}


def grad_outs_like(outputs: dict[str, Tensor], dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    """Random, one per output, rounded to `dtype`, in the dtypes of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    randoms = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs.values()]
    return [random.to(dtype).to(out.dtype) for random, out in zip(randoms, outputs.values(), strict=True)]


def results(
    function: Callable[..., Any], arguments: Arguments, grad_dtype: torch.dtype | None = None, device: str = "cpu"
) -> Arguments:
    """Outputs and the gradients of all tensor arguments, for fixed random grad_outs of `grad_dtype`'s precision.

    Computed on `device`, returned on the CPU.
    """
    leaves = as_leaves(mapped(arguments, lambda _, tensor: tensor.to(device)))
    outputs = outputs_of(function(**leaves))
    named = tensors_of(leaves)
    grad_outs = [
        grad_out.to(device) for grad_out in grad_outs_like(outputs, grad_dtype or next(iter(outputs.values())).dtype)
    ]
    grads = torch.autograd.grad(list(outputs.values()), list(named.values()), grad_outs)
    return {name: out.detach().cpu() for name, out in outputs.items()} | {
        f"grad_{name}": grad.cpu() for name, grad in zip(named, grads, strict=True)
    }


def in_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return mapped(arguments, lambda _, tensor: tensor.detach().to(dtype))


def judge_by_name(
    ours: Arguments, truth: Arguments, base: Arguments, fallback: Callable[[], Arguments]
) -> dict[str, Verdict]:
    """Rule T for every result. Where the base is not finite, it is `fallback()`'s: the formula in float32, cast."""
    assert list(ours) == list(truth) == list(base)
    if not all(bool(torch.isfinite(result).all()) for result in base.values()):
        wide = fallback()
        base = {n: b if torch.isfinite(b).all() else wide[n].to(b.dtype) for n, b in base.items()}
    return {name: rule_t(result, truth[name], base[name]) for name, result in ours.items()}


def assert_all_ok(verdicts: dict[str, Verdict]) -> None:
    failed = {name: str(verdict) for name, verdict in verdicts.items() if not verdict.ok}
    assert not failed, failed


def assert_equal_bits(actual: Arguments, expected: Arguments) -> None:
    assert list(actual) == list(expected)
    different = [name for name, result in actual.items() if not torch.equal(result, expected[name])]
    assert not different, different


def subsets(names: list[str]) -> list[frozenset[str]]:
    """Nothing, all, and every one and every pair of the names."""
    few = [frozenset(chosen) for count in (0, 1, 2) for chosen in itertools.combinations(names, count)]
    return [*few, frozenset(names)]


def grad_out_of_layout(grad_out: Tensor, layout: str) -> Tensor:
    """F17: what a caller may pass as grad_out; .sum() gives one of stride 0."""
    if layout == "broadcast":
        return grad_out[:1, :1, :1, :1].expand(grad_out.shape)
    if layout == "one row":
        return grad_out[:, :, :1].expand(grad_out.shape)
    if layout == "interleaved":
        return torch.stack([grad_out, grad_out], dim=-1)[..., 0]
    if layout == "channels_last":
        return grad_out.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return grad_out.transpose(2, 3).contiguous().transpose(2, 3)
    raise ValueError(layout)


GRAD_OUT_LAYOUTS = ["broadcast", "one row", "interleaved", "channels_last", "transposed"]


class SavedTensors:
    """While active, what autograd keeps for the backward."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def storages(self, excluded: list[Tensor]) -> dict[int, int]:
        """Bytes by address of every storage that is kept and not one of `excluded`'s."""
        known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        return {address: size for address, size in found.items() if address not in known}
