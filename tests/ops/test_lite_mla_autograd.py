"""lite_mla under autograd, torch.func, torch.compile and torch.export."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import lite_mla
from tests.ops import block_autograd as checks
from tests.ops.block_common import Arguments, SavedTensors, as_leaves, mapped, tensors_of
from tests.ops.common import BACKENDS, DTYPES
from tests.ops.lite_mla_samples import ALL, Sample

pytestmark = pytest.mark.usefixtures("one_thread")

ops = torch.ops.efficientvit_kernels
CPU = partial(lite_mla, backend="cpu")
SAMPLE = Sample(2, 6, 1, 4, 5, 6, (3, 5), ALL, out_channels=5)
RECOMPUTE = pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])


@pytest.mark.parametrize(
    "sample",
    [
        Sample(2, 3, 1, 2, 2, 3, (3,), ALL, out_channels=2, eps=0.1),
        Sample(1, 2, 1, 3, 1, 2, (), "scale", eps=0.1),
        Sample(1, 2, 2, 1, 2, 2, (1, 5), "biases shift", eps=0.1),
        Sample(1, 4, 1, 2, 3, 2, (3,), "residual", layout="channels_last", eps=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
@RECOMPUTE
def test_gradcheck(recompute: bool, backend: str, sample: Sample) -> None:
    """With an eps that dominates: relu's kink and tiny denominators are no place for finite differences."""
    arguments = as_leaves(sample.make(torch.float64, seed=5))
    named = tensors_of(arguments)

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(named, tensors, strict=True))
        return lite_mla(**mapped(arguments, lambda name, _: given[name]), backend=backend, recompute=recompute)

    assert torch.autograd.gradcheck(function, list(named.values()), fast_mode=backend == "reference")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sample",
    [
        Sample(2, 12, 2, 8, 5, 7, (3, 5), ALL, out_channels=9),
        Sample(2, 8, 1, 8, 4, 4, (5,), "scale shift", layout="channels_last"),
        Sample(1, 16, 1, 16, 1, 1, (), "biases"),
        Sample(0, 8, 1, 8, 4, 4, (3,), ALL),
    ],
    ids=str,
)
def test_opcheck(sample: Sample, dtype: torch.dtype) -> None:
    """Schema, fake kernels and dynamic shapes of the registered ops, on detached inputs."""
    torch.use_deterministic_algorithms(False)  # opcheck compares the memory that NaN filling would make unequal
    a = sample.make(dtype)
    products = (a["qkv_weight"], a["depthwise_weights"], a["pointwise_weights"], a["proj_weight"], a.get("qkv_bias"))
    biases = (a.get("depthwise_biases", []), a.get("pointwise_biases", []))
    scale, shift = a.get("proj_scale"), a.get("proj_shift")
    for save in (True, False):
        forward = (a["x"], *products, *biases, scale, shift, a.get("residual"), sample.head_dim, 1e-6, save)
        torch.library.opcheck(ops.lite_mla_fwd.default, forward)
        y, qkv, state = ops.lite_mla_fwd(*forward)
        kept = (qkv, state) if save else (None, None)
        for needs in ((True, True), (True, False), (False, True), (False, False)):
            context = (torch.randn_like(y), a["x"], *kept)
            rest = (scale, shift is not None, sample.head_dim, 1e-6, *needs)
            torch.library.opcheck(ops.lite_mla_bwd.default, (*context, *products, *biases, *rest))


@pytest.mark.parametrize("backend", BACKENDS)
@RECOMPUTE
def test_requires_grad_subsets(recompute: bool, backend: str) -> None:
    call = partial(lite_mla, backend=backend, recompute=recompute)
    checks.check_requires_grad_subsets(call, SAMPLE.make(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_grad_out_of_any_layout(layout: str, dtype: torch.dtype) -> None:
    checks.check_grad_out_layouts(CPU, Sample(2, 12, 2, 8, 5, 6, (3, 5), ALL, layout).make(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saves_x_qkv_and_a_small_state(dtype: torch.dtype) -> None:
    sample = Sample(2, 48, 3, 16, 9, 9, (3, 5), ALL)
    leaves = as_leaves(sample.make(dtype))
    inputs = list(tensors_of(leaves).values())
    with SavedTensors() as saved:
        CPU(**leaves)
    x_bytes = leaves["x"].untyped_storage().nbytes()
    state_bytes = 2 * 9 * 17 * 16 * torch.promote_types(dtype, torch.float32).itemsize
    assert sorted(saved.storages(inputs).values()) == sorted([3 * x_bytes, state_bytes])
    with SavedTensors() as saved:
        CPU(**leaves, recompute=True)
    assert saved.storages(inputs) == {}
    kept = {tensor.untyped_storage().data_ptr() for tensor in saved.tensors}
    assert leaves["x"].untyped_storage().data_ptr() in kept
    assert leaves["residual"].untyped_storage().data_ptr() not in kept


@RECOMPUTE
def test_no_graph_when_no_gradient_is_needed(recompute: bool) -> None:
    checks.check_no_graph(partial(CPU, recompute=recompute), SAMPLE.make(torch.float32))


@RECOMPUTE
def test_second_backward_through_the_same_graph(recompute: bool) -> None:
    checks.check_backward_twice(partial(CPU, recompute=recompute), SAMPLE.make(torch.float32))


@RECOMPUTE
@pytest.mark.parametrize("name", ["x", "qkv_weight", "depthwise_weights[1]", "proj_weight", "pointwise_biases[0]"])
def test_input_changed_after_forward_is_noticed(name: str, recompute: bool) -> None:
    checks.check_changed_input_is_noticed(partial(CPU, recompute=recompute), SAMPLE.make(torch.float32), name)


def test_residual_may_be_changed_after_forward() -> None:
    """It is not saved: its gradient is grad_y."""
    leaves = mapped(as_leaves(SAMPLE.make(torch.float32)), lambda _, leaf: leaf * 1)
    y = CPU(**leaves)
    with torch.no_grad():
        leaves["residual"].add_(1)
    y.sum().backward()


def test_only_the_residual_needs_a_gradient() -> None:
    """No backward op runs, and the gradient is grad_y."""
    arguments = SAMPLE.make(torch.float32)
    residual = arguments["residual"].requires_grad_()
    y = CPU(**arguments)
    grad_y = torch.randn_like(y)
    before = checks.native_calls()
    (grad,) = torch.autograd.grad(y, residual, grad_y)
    assert checks.native_calls() == before
    assert torch.equal(grad, grad_y)


def test_double_backward_raises_and_names_the_way_out() -> None:
    arguments = SAMPLE.make(torch.float32)
    del arguments["residual"]  # y is linear in it: its gradient is a constant
    checks.check_double_backward_raises(CPU, arguments, "lite_mla")


def test_double_backward_of_the_reference() -> None:
    arguments = as_leaves(Sample(1, 2, 1, 1, 2, 2, (3,), eps=0.1).make(torch.float64, seed=5))
    named = tensors_of(arguments)

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(named, tensors, strict=True))
        return lite_mla(**mapped(arguments, lambda name, _: given[name]), backend="reference")

    assert torch.autograd.gradgradcheck(function, list(named.values()))


@pytest.mark.parametrize("name", ["x", "residual", "proj_shift"])
def test_forward_mode_raises(name: str) -> None:
    checks.check_forward_mode_raises(CPU, SAMPLE.make(torch.float32), name)


def test_func_grad() -> None:
    checks.check_func_grad(CPU, partial(lite_mla, backend="reference"), SAMPLE.make(torch.float32), "x")


def test_vmap_is_refused_clearly() -> None:
    checks.check_vmap_is_refused(CPU, SAMPLE.make(torch.float32), "x")


def arguments_of_size(batch: int, height: int, width: int) -> Arguments:
    return Sample(batch, 16, 2, 8, height, width, (3, 5), ALL, eps=1e-3).make(torch.float32)


@RECOMPUTE
def test_compile_static_and_dynamic(recompute: bool, fresh_compiler: None) -> None:
    checks.check_compiled(partial(lite_mla, recompute=recompute), arguments_of_size, calls=2)


def test_compile_inference(fresh_compiler: None) -> None:
    arguments = SAMPLE.make(torch.float32)
    compiled = torch.compile(lambda kwargs: lite_mla(**kwargs) + 1, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(arguments), lite_mla(**arguments) + 1, rtol=1e-6, atol=1e-6)


class Block(torch.nn.Module):
    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = {name: value for name, value in arguments.items() if name not in ("x", "residual")}

    def forward(self, x: Tensor) -> Any:
        return lite_mla(x, **self.arguments)


def test_export() -> None:
    arguments = arguments_of_size(2, 5, 6)
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    block = Block(arguments)
    program = torch.export.export(block, (arguments["x"],), dynamic_shapes={"x": {2: height, 3: width}})
    other = arguments_of_size(2, 9, 4)["x"]
    assert torch.equal(program.module()(other), block(other))
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("lite_mla_fwd" in target for target in targets)


def test_meta_and_fake_tensors() -> None:
    arguments = mapped(SAMPLE.make(torch.bfloat16), lambda _, tensor: tensor.to("meta"))
    y = lite_mla(**arguments)
    assert y.shape == (2, 5, 5, 6)
    assert y.dtype == torch.bfloat16
    with torch._subclasses.FakeTensorMode():
        fake = arguments_of_size(2, 5, 6)
        fake["x"] = fake["x"].contiguous(memory_format=torch.channels_last).requires_grad_()
        y = CPU(**fake)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.autograd.grad(y.sum(), fake["x"])[0].stride() == fake["x"].stride()
