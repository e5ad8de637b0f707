"""Cases with a known outcome: NaN and inf, zero denominators, integers, empty batches.

Each maker gives cases by name; a case returns None when it holds, "not run: ..." or what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.calls import OPS, Arguments, Results, Sample, mapped, named_tensors, results, served
from benchmarks.gpu.parts import Context

Case = Callable[[], str | None]
SPECIAL = {"NaN": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
PARTS_OF_HEAD = {"q": 0, "k": 1, "v": 2}
RAW_FORWARD = {"cpu": "", "triton": "_triton", "cuda": ""}  # the suffix of a backend's registered ops
GRAD_SCALE = 2.0**10


def edge_cases(op: str, backend: str, dtype: torch.dtype, context: Context) -> dict[str, Case]:
    """T3: the masks of the formula in float32, forward and backward; and batches of no image."""
    cases: dict[str, Case] = {"E15: no image": partial(_empty, op, backend, dtype, context)}
    places = PARTS_OF_HEAD if op == "relu_linear_attention" else {"x": 0}
    for part, index in places.items():
        for name, value in SPECIAL.items():
            cases[f"T3: {name} in {part}"] = partial(_masks, op, backend, dtype, index, value, context)
    return cases


def _image_of(arguments: Arguments) -> Tensor:
    value = arguments["x"] if "x" in arguments else arguments["qkv"]
    image: Tensor = value[0] if isinstance(value, list) else value
    return image


def _masks(op: str, backend: str, dtype: torch.dtype, part: int, value: float, context: Context) -> str | None:
    """One special value in one image and head. The other image must stay as it was."""
    sample = Sample(op, 2, 2, 16, 9, 11)
    arguments = sample.make(dtype, context.device)
    clean = results(served(op, backend), arguments, False, dtype)
    _image_of(arguments)[1, part * sample.head_dim + 3, 4, 5] = value
    ours = results(served(op, backend), arguments, True, dtype)
    wide = mapped(arguments, lambda x: x.float())
    # lite_mla stores qkv in 16 bits: its specification in the same dtype, in float32 from there, tells the masks.
    expected = results(OPS[op].reference, arguments if op == "lite_mla" else wide, True, dtype)
    for name, result in ours.items():
        if name.startswith("grad_") and value != value and op != "relu_linear_attention":
            continue  # which zero meets the NaN in a backward of convolutions is the library's choice
        if name.startswith("grad_") and value == value:
            continue  # inf - inf and 0 * inf inside a backward depend on the order of its steps
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            if not torch.equal(kind(result), kind(expected[name].to(result.dtype))):
                return f"{name}: {kind.__name__} in the wrong places: {_count(kind, result, expected[name])}"
    for name, before in clean.items():
        if not torch.equal(ours[name][0], before[0]):
            return f"{name}: another image has changed"
    return None


def _count(kind: Callable[[Tensor], Tensor], result: Tensor, expected: Tensor) -> str:
    return f"{int(kind(result).sum())} of {int(kind(expected.to(result.dtype)).sum())} expected"


def _empty(op: str, backend: str, dtype: torch.dtype, context: Context) -> str | None:
    arguments = Sample(op, 0, 2, 16, 5, 4).make(dtype, context.device)
    found = results(served(op, backend), arguments, True, dtype)
    for name, tensor in named_tensors(arguments).items():
        grad = found[f"grad_{name}"]
        if grad.shape != tensor.shape or bool((grad != 0).any()):
            return f"grad_{name} must be zeros of {list(tensor.shape)}"
    outs = [result for name, result in found.items() if name.startswith("out")]
    return None if all(out.shape[0] == 0 for out in outs) else "outputs must hold no image"


def zero_cases(op: str, backend: str, dtype: torch.dtype, context: Context) -> dict[str, Case]:
    """T4: without a positive q, or k, or with zeros, the attention is exactly 0, and so is every gradient."""
    if op != "relu_linear_attention":
        return {"T4: zeros": partial(_zeros_in, op, backend, dtype, context)}
    cases: dict[str, Case] = {"T4: zeros": partial(_zeros_in, op, backend, dtype, context)}
    for name, parts in {"q": (0,), "k": (1,), "q and k": (0, 1)}.items():
        cases[f"T4: no positive {name}"] = partial(_no_positive, backend, dtype, parts, context)
    return cases


def _no_positive(backend: str, dtype: torch.dtype, parts: tuple[int, ...], context: Context) -> str | None:
    op = "relu_linear_attention"
    for height, width in ((9, 11), (2, 3)):  # N > D, N <= D
        arguments = Sample(op, 2, 2, 16, height, width).make(dtype, context.device)
        for image in arguments["qkv"]:
            packed = image.view(2, 2, 3, 16, height, width)
            for part in parts:
                packed[:, :, part] = -packed[:, :, part].abs()
        found = results(served(op, backend), arguments, True, dtype, GRAD_SCALE)
        wrong = [name for name, result in found.items() if bool((result != 0).any()) or bool(result.isnan().any())]
        if wrong:
            return f"{', '.join(wrong)} must be exactly 0 for {height} x {width}"
    return None


def _zeros_in(op: str, backend: str, dtype: torch.dtype, context: Context) -> str | None:
    arguments = Sample(op, 2, 2, 16, 9, 11).make(dtype, context.device)
    _image_of(arguments).zero_()
    if op == "relu_linear_attention":
        for image in arguments["qkv"]:
            image.zero_()
    found = results(served(op, backend), arguments, True, dtype, GRAD_SCALE)
    for name, result in found.items():
        # A gradient of the image itself, or of weights that meet the image first, is 0 or finite; outputs are 0.
        if name.startswith("out") and bool((result != 0).any()):
            return f"{name} must be exactly 0"
        if not bool(result.isfinite().all()):
            return f"{name} must be finite"
    return None


def integer_cases(op: str, backend: str, dtype: torch.dtype, context: Context) -> dict[str, Case]:
    """T5: sums of integers below 2^24 are exact in float32, so that every backend gives the same bits."""
    if op == "multiscale_aggregate":
        return {"T5: integers": partial(_exact_aggregation, backend, dtype, context)}
    if op == "relu_linear_attention":
        return {"T5: integer state": partial(_exact_state, backend, dtype, context)}
    return {}


def _integers(op: str, dtype: torch.dtype, context: Context, **sizes: Any) -> Arguments:
    return Sample(op, 2, 2, 16, 17, 13, values="integers", **sizes).make(dtype, context.device)


def _exact_aggregation(backend: str, dtype: torch.dtype, context: Context) -> str | None:
    for layout in ("nchw", "channels_last"):
        arguments = _integers("multiscale_aggregate", dtype, context, kernels=(3, 5), layout=layout)
        ours = results(served("multiscale_aggregate", backend), arguments, False, dtype)
        exact: Results = results(
            OPS["multiscale_aggregate"].reference, mapped(arguments, lambda x: x.double()), False, dtype
        )
        for name, result in ours.items():
            if not torch.equal(result, exact[name].to(dtype)):
                return f"{name}, {layout}: not the exact bits"
    return None


def _exact_state(backend: str, dtype: torch.dtype, context: Context) -> str | None:
    """The state, [B, G, D + 1, D] with the sums z in the last row, as the registered op returns it."""
    if backend == "reference":
        return "not run: the reference returns no state"
    arguments = _integers("relu_linear_attention", dtype, context)
    name = f"relu_linear_attention_fwd{RAW_FORWARD[backend]}"
    if not hasattr(torch.ops.efficientvit_kernels, name):
        return f"not run: no registered op {name}"
    head_dim = arguments["head_dim"]
    op: Any = getattr(torch.ops.efficientvit_kernels, name)
    state = op(arguments["qkv"], head_dim, 1e-15)[1]
    exact = []
    for image in arguments["qkv"]:
        packed = image.double().reshape(2, -1, 3, head_dim, image.shape[2] * image.shape[3])
        k, v = packed[:, :, 1].relu(), packed[:, :, 2]
        exact.append(torch.cat([v @ k.mT, k.sum(-1, keepdim=True).mT], dim=2))
    expected = torch.cat(exact, dim=1)
    if state.shape != expected.shape:
        return f"not run: the state is of another form, {list(state.shape)}"
    return None if torch.equal(state.double(), expected) else "the state is not the exact one"
