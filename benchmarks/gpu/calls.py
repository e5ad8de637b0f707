"""What is called: the ops with their backends, inputs made on the device, results by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import efficientvit_kernels as evk
from benchmarks.gpu.device import OpsCalled
from benchmarks.gpu.parts import FailedError, NotRunError
from benchmarks.shapes import Shape
from efficientvit_kernels import reference, testing
from efficientvit_kernels.ops._backends import DEVICE_OF_BACKEND, why_not

Arguments = dict[str, Any]  # keyword arguments of a public op: tensors, lists of tensors, numbers
Results = dict[str, Tensor]
Function = Callable[..., Any]


@dataclass(frozen=True)
class OpFunctions:
    public: Function
    reference: Function
    official: Function


OPS = {
    "relu_linear_attention": OpFunctions(
        evk.relu_linear_attention, reference.relu_linear_attention, testing.official_relu_linear_attention
    ),
    "multiscale_aggregate": OpFunctions(
        evk.multiscale_aggregate, reference.multiscale_aggregate, testing.official_multiscale_aggregate
    ),
    "lite_mla": OpFunctions(evk.lite_mla, reference.lite_mla, testing.official_lite_mla),
}
LAYOUTS = ("nchw", "channels_last", "transposed", "sliced", "offset", "expanded")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def runnable(device: str) -> list[str]:
    """The backends with kernels for this device that can run; Triton's interpreter, on CPU tensors, is not meant."""
    return [name for name, where in DEVICE_OF_BACKEND.items() if where == device and why_not(name, device) is None]


@dataclass(frozen=True)
class Sample:
    """One input of an op. `values`: "normal", or "integers" in [-3, 3]."""

    op: str
    batch: int = 2
    heads: int = 2
    head_dim: int = 16
    height: int = 9
    width: int = 7
    kernels: tuple[int, ...] = (5,)
    layout: str = "nchw"
    extras: bool = False  # biases, and in lite_mla an epilogue with a residual
    values: str = "normal"
    scale: float = 1.0

    def __str__(self) -> str:
        kernels = "-".join(map(str, self.kernels)) or "none"
        size = f"b{self.batch}h{self.heads}d{self.head_dim}_{self.height}x{self.width}_k{kernels}_{self.layout}"
        return size + ("_extras" if self.extras else "")

    @property
    def total(self) -> int:
        return self.heads * self.head_dim

    def make(self, dtype: torch.dtype, device: str, seed: int = 0) -> Arguments:
        maker = _Maker(self, dtype, device, seed)
        makers = {
            "relu_linear_attention": maker.attention,
            "multiscale_aggregate": maker.aggregation,
            "lite_mla": maker.block,
        }
        return makers[self.op]()


class _Maker:
    def __init__(self, sample: Sample, dtype: torch.dtype, device: str, seed: int) -> None:
        self.sample, self.dtype, self.device = sample, dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def values(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        if self.sample.values == "integers":
            drawn = torch.randint(-3, 4, shape, generator=self.generator, device=self.device)
            return drawn.to(dtype or self.dtype)
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return (scale * drawn).to(dtype or self.dtype)

    def image(self, channels: int, scale: float = 1.0) -> Tensor:
        sample = self.sample
        x = self.values(sample.batch, channels, sample.height, sample.width, scale=scale * sample.scale)
        return as_layout(x, sample.layout)

    def weight(self, *shape: int) -> Tensor:
        return self.values(*shape, scale=1 / math.sqrt(math.prod(shape[1:])))

    def attention(self) -> Arguments:
        images = [self.image(3 * self.sample.total) for _ in range(1 + len(self.sample.kernels))]
        return {"qkv": images, "head_dim": self.sample.head_dim, "eps": 1e-15}

    def aggregation(self) -> Arguments:
        return {"qkv": self.image(3 * self.sample.total), **self._scales(), "head_dim": self.sample.head_dim}

    def _scales(self) -> Arguments:
        sample, channels = self.sample, 3 * self.sample.total
        found: Arguments = {
            "depthwise_weights": [self.weight(channels, 1, k, k) for k in sample.kernels],
            "pointwise_weights": [self.weight(channels, sample.head_dim, 1, 1) for _ in sample.kernels],
        }
        if sample.extras:
            for name in ("depthwise_biases", "pointwise_biases"):
                found[name] = [self.values(channels, scale=0.3) for _ in sample.kernels]
        return found

    def block(self) -> Arguments:
        total, sample = self.sample.total, self.sample
        found = {
            "x": self.image(total),
            "qkv_weight": self.weight(3 * total, total, 1, 1),
            **self._scales(),
            "proj_weight": self.weight(total, total * (1 + len(sample.kernels)), 1, 1),
            "head_dim": sample.head_dim,
            "eps": 1e-15,
        }
        if sample.extras:
            compute = torch.promote_types(self.dtype, torch.float32)
            found["qkv_bias"] = self.values(3 * total, scale=0.3)
            found["proj_scale"] = 1 + self.values(total, scale=0.3, dtype=compute)
            found["proj_shift"] = self.values(total, dtype=compute)
            found["residual"] = self.image(total)
        return found


def of_shape(op: str, shape: Shape, **changes: Any) -> Sample:
    """The sample of an official layer. The aggregation has none where the layer does not aggregate."""
    kernels = shape.scales or ((5,) if op == "multiscale_aggregate" else ())
    sample = Sample(op, shape.batch, shape.heads, shape.dim, shape.height, shape.width, kernels)
    return replace(sample, **changes)


def as_layout(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout, inside memory that is NaN everywhere else."""
    batch, channels, height, width = x.shape
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        big = x.new_full((2 * batch, channels + 3, height + 1, 2 * width), float("nan"))
        return big[::2, 2 : 2 + channels, 1:, ::2].copy_(x)
    if layout == "offset":
        big = x.new_full((x.numel() + 1,), float("nan"))
        return big[1:].view(x.shape).copy_(x)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout != "nchw":
        raise ValueError(f"as_layout: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return x.contiguous()


def named_tensors(arguments: Arguments) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, list):
            found |= {f"{name}[{i}]": tensor for i, tensor in enumerate(value)}
    return found


def mapped(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    return {
        name: change(value)
        if isinstance(value, Tensor)
        else ([change(item) for item in value] if isinstance(value, list) else value)
        for name, value in arguments.items()
    }


def served(op: str, backend: str) -> Function:
    """The public op with its backend named; one that does not have the op, or the dtype, cannot be run."""

    def call(**arguments: Any) -> Any:
        try:
            return OPS[op].public(**arguments, backend=backend)
        except NotImplementedError as error:
            raise NotRunError(str(error)) from error

    return call


def outputs_of(result: Any) -> Results:
    return {"out": result} if isinstance(result, Tensor) else {f"out[{i}]": out for i, out in enumerate(result)}


def bound(
    function: Function, arguments: Arguments, training: bool, grad_dtype: torch.dtype, grad_scale: float = 1.0
) -> Callable[[], Results]:
    """The call alone: its leaves, which share their memory with `arguments`, and its grad_outs are made beforehand.

    It returns the outputs, and in training the gradients of all tensors for fixed random grad_outs that are rounded to
    `grad_dtype`.
    """
    leaves = mapped(arguments, lambda tensor: tensor.detach().requires_grad_(training))
    inputs = named_tensors(leaves)
    grad_outs: list[Tensor] = []

    def step() -> Results:
        with torch.set_grad_enabled(training):
            outputs = outputs_of(function(**leaves))
        found = {name: out.detach() for name, out in outputs.items()}
        if not training:
            return found
        if not grad_outs:
            grad_outs.extend(_grad_outs(found, grad_dtype, grad_scale))
        grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), grad_outs)
        return found | {f"grad_{name}": grad for name, grad in zip(inputs, grads, strict=True)}

    return step


def _grad_outs(outputs: Results, dtype: torch.dtype, scale: float) -> list[Tensor]:
    generator = torch.Generator(next(iter(outputs.values())).device).manual_seed(1)
    drawn = [torch.randn(out.shape, generator=generator, device=out.device) * scale for out in outputs.values()]
    return [random.to(dtype).to(out.dtype) for random, out in zip(drawn, outputs.values(), strict=True)]


def results(function: Function, arguments: Arguments, training: bool, *grad: Any) -> Results:
    """One such call: `grad` is the dtype and scale of its grad_outs."""
    return bound(function, arguments, training, *grad)()


def different_bits(actual: Results, expected: Results) -> list[str]:
    return [name for name, result in actual.items() if not bool(same_bits(result, expected[name]).all())]


def same_bits(actual: Tensor, expected: Tensor) -> Tensor:
    """Elementwise, NaN equal to itself."""
    as_integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    return actual.view(as_integer) == expected.view(as_integer)


@contextmanager
def proof_of_native(backend: str) -> Iterator[OpsCalled]:
    """Fails unless a registered op of this package ran meanwhile; the reference has none, and is not watched: torch
    does not compile under such a watch."""
    ops = OpsCalled()
    if backend == "reference":
        yield ops
        return
    with ops:
        yield ops
    if not ops.names:
        raise FailedError(f"backend {backend} called no op of the package: the reference ran in its place")
