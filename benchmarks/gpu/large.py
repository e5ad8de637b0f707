"""Tensors of more than 2^31 elements: what lies behind the boundary must be what the same slice alone gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.calls import OPS, Arguments, Results, Sample, bound, proof_of_native, runnable, served
from benchmarks.gpu.child import result_of
from benchmarks.gpu.device import tf32
from benchmarks.gpu.parts import Context, FailedError, NotRunError, Step

BOUNDARY = 2**31
CHILD_S = 240.0
DTYPE = torch.bfloat16
# Both sides round float32 sums of other orders once: a unit in the last place, and for gradients, whose stored
# intermediates round too, a few.
TOLERANCE = {"out": 2.0, "grad": 8.0}  # times eps times the largest value of the slice


def steps(context: Context) -> list[Step]:
    backends = runnable(context.device)
    if not backends:
        return [Step("no backend", nothing_to_compare)]
    return [
        Step(f"{along}: {op}, {backend}, {'backward' if training else 'forward'}", partial(in_child, *what), 20.0)
        for training in (False, True)
        for along in ("images", "heads")
        for op in OPS
        for backend in backends
        if (what := (op, backend, along, training)) and not (op == "lite_mla" and along == "heads")
    ]


def nothing_to_compare(context: Context) -> dict[str, Any]:
    raise NotRunError("no backend of this package has kernels for this device")


def in_child(op: str, backend: str, along: str, training: bool, context: Context) -> dict[str, Any]:
    arguments = {"op": op, "backend": backend, "along": along, "training": training}
    arguments |= {"device": context.device, "boundary": 2**14 if context.quick else BOUNDARY}
    if context.quick:
        return compare(**arguments)  # type: ignore[arg-type]
    return result_of("large:compare", arguments, min(CHILD_S, context.left()))


def sample_of(op: str, along: str, boundary: int) -> Sample:
    """qkv just beyond the boundary; in lite_mla it is the largest tensor."""
    if boundary < BOUNDARY:
        heads, dim, side = 2, 16, 9
    else:
        heads, dim, side = (4, 32, 128) if along == "images" else (1, 32, 256)
    per_unit = heads * 3 * dim * side * side
    units = boundary // per_unit + 3
    if along == "images":
        return Sample(op, units, heads, dim, side, side, kernels=() if op == "relu_linear_attention" else (5,))
    return Sample(op, 1, units * heads, dim, side, side, kernels=() if op == "relu_linear_attention" else (5,))


def compare(op: str, backend: str, along: str, training: bool, device: str, boundary: int) -> dict[str, Any]:
    """The first, the boundary's and the last images (or heads) against the reference on these alone. Gradients of
    weights are sums over all images and are only looked at for NaN."""
    sample = sample_of(op, along, boundary)
    arguments = sample.make(DTYPE, device)
    grad_outs: list[Tensor] = []
    call = bound(served(op, backend), arguments, training, DTYPE)
    with proof_of_native(backend):
        whole = call()
    image = arguments["x"] if op == "lite_mla" else arguments["qkv"]
    image = image[0] if isinstance(image, list) else image
    units = sample.batch if along == "images" else sample.heads
    per_unit = sample.batch * 3 * sample.total * sample.height * sample.width // units
    at_boundary = min(boundary // per_unit, units - 1)
    worst: dict[str, float] = {}
    for unit in sorted({0, at_boundary, units - 1}):
        part = _slice(arguments, op, along, unit, sample)
        grads = _slices_of_grad_outs(whole, unit, along, sample, DTYPE) if training else grad_outs
        expected = _reference(op, part, grads)
        for name, result in expected.items():
            actual = _unit(whole[name], unit, along, sample, name)
            kind = name.split("_")[0].split("[")[0]
            limit = TOLERANCE[kind] * torch.finfo(DTYPE).eps * float(result.float().abs().max())
            error = float((actual.float() - result.float()).abs().max())
            worst[f"{name}, {along} {unit}"] = error / limit if limit else error
            if not error <= limit:
                raise FailedError(f"{name}, {along} {unit}: error {error:.3g}, allowed {limit:.3g}", {"worst": worst})
    weights = [name for name, result in whole.items() if not bool(result.isfinite().all())]
    if weights:
        raise FailedError(f"not finite: {', '.join(weights)}")
    largest = max(image.numel(), per_unit * units)
    return {"sample": str(sample), "elements": largest, "beyond": largest > boundary, "share_of_tolerance": worst}


def _slice(arguments: Arguments, op: str, along: str, unit: int, sample: Sample) -> Arguments:
    part = dict(arguments)
    channels = slice(unit * 3 * sample.head_dim, (unit + 1) * 3 * sample.head_dim)
    for name in ("x", "qkv"):
        if name in part:
            part[name] = _of_image(part[name], lambda t: t[unit : unit + 1] if along == "images" else t[:, channels])
    if along == "heads":
        for name in ("depthwise_weights", "pointwise_weights"):
            if name in part:
                part[name] = [weight[channels] for weight in part[name]]
    return part


def _of_image(value: Any, cut: Any) -> Any:
    return [cut(tensor).clone() for tensor in value] if isinstance(value, list) else cut(value).clone()


def _unit(result: Tensor, unit: int, along: str, sample: Sample, name: str) -> Tensor:
    """The part of an output, or of an image's gradient, that belongs to one image or head."""
    if along == "images":
        return result[unit : unit + 1]
    per_head = result.shape[1] // sample.heads
    return result[:, unit * per_head : (unit + 1) * per_head]


def _slices_of_grad_outs(whole: Results, unit: int, along: str, sample: Sample, dtype: torch.dtype) -> list[Tensor]:
    """The grad_outs that `bound` draws, cut like the outputs."""
    from benchmarks.gpu.calls import _grad_outs

    outputs = {name: result for name, result in whole.items() if name.startswith("out")}
    return [_unit(grad, unit, along, sample, "") for grad in _grad_outs(outputs, dtype, 1.0)]


def _reference(op: str, part: Arguments, grad_outs: list[Tensor]) -> Results:
    """Outputs, and with grad_outs the gradients of the images."""
    image = part["x"] if op == "lite_mla" else part["qkv"]
    name = "grad_x" if op == "lite_mla" else "grad_qkv"
    leaves = [tensor.requires_grad_(bool(grad_outs)) for tensor in (image if isinstance(image, list) else [image])]
    with tf32(False):
        result = OPS[op].reference(**part)
    outs = [result] if isinstance(result, Tensor) else list(result)
    names = ["out"] if isinstance(result, Tensor) else [f"out[{i}]" for i in range(len(outs))]
    found = {name: out.detach() for name, out in zip(names, outs, strict=True)}
    if not grad_outs:
        return found
    with tf32(False):
        grads = torch.autograd.grad(outs, leaves, grad_outs)
    keys = [f"{name}[{i}]" for i in range(len(leaves))] if isinstance(image, list) else [name]
    return found | dict(zip(keys, grads, strict=True))
