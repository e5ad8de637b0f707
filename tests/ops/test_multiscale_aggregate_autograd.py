"""multiscale_aggregate under autograd, torch.func, torch.compile and torch.export."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import multiscale_aggregate
from tests.ops import block_autograd as checks
from tests.ops.aggregate_samples import Sample
from tests.ops.block_common import Arguments, SavedTensors, as_leaves, tensors_of
from tests.ops.common import BACKENDS, DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")

ops = torch.ops.efficientvit_kernels
CPU = partial(multiscale_aggregate, backend="cpu")
SAMPLE = Sample(2, 1, 4, 5, 6, kernels=(3, 5), biases=True)


@pytest.mark.parametrize(
    "sample",
    [
        Sample(2, 1, 2, 3, 4, kernels=(3,), biases=True),
        Sample(1, 1, 1, 1, 1, kernels=(5,)),
        Sample(1, 1, 3, 2, 5, kernels=(1, 7), biases=True),
        Sample(1, 2, 2, 4, 3, kernels=(5, 3), layout="channels_last"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, sample: Sample) -> None:
    arguments = as_leaves(sample.make(torch.float64))
    scales = len(sample.kernels)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        lists = [list(tensors[1 + i * scales : 1 + (i + 1) * scales]) for i in range(4)]
        biases = {"depthwise_biases": lists[2], "pointwise_biases": lists[3]} if sample.biases else {}
        return tuple(multiscale_aggregate(tensors[0], *lists[:2], head_dim=sample.head_dim, **biases, backend=backend))

    inputs = [
        arguments["qkv"],
        *arguments["depthwise_weights"],
        *arguments["pointwise_weights"],
        *arguments.get("depthwise_biases", []),
        *arguments.get("pointwise_biases", []),
    ]
    # The slow mode takes a minute for the reference, which is torch's own autograd.
    assert torch.autograd.gradcheck(function, inputs, fast_mode=backend == "reference")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sample",
    [
        Sample(2, 2, 8, 5, 7, kernels=(3, 5), biases=True),
        Sample(2, 1, 8, 4, 4, kernels=(5,), layout="channels_last"),
        Sample(1, 1, 16, 1, 1, kernels=(1, 3, 7)),
        Sample(0, 1, 8, 4, 4, biases=True),
        Sample(2, 1, 8, 3, 0, kernels=(3,), biases=True),
    ],
    ids=str,
)
def test_opcheck(sample: Sample, dtype: torch.dtype) -> None:
    """Schema, fake kernels and dynamic shapes of the registered ops, on detached inputs."""
    torch.use_deterministic_algorithms(False)  # opcheck compares the memory that NaN filling would make unequal
    a = sample.make(dtype)
    weights = (a["depthwise_weights"], a["pointwise_weights"])
    biases = (a.get("depthwise_biases", []), a.get("pointwise_biases", []))
    forward = (a["qkv"], *weights, *biases, sample.head_dim)
    torch.library.opcheck(ops.multiscale_aggregate_fwd.default, forward)
    grad_outs = [torch.randn_like(out) for out in ops.multiscale_aggregate_fwd(*forward)]
    for needs in ((True, True, sample.biases), (True, False, False), (False, True, False), (False, False, False)):
        backward = (grad_outs, a["qkv"], *weights, biases[0], sample.head_dim, *needs)
        torch.library.opcheck(ops.multiscale_aggregate_bwd.default, backward)


@pytest.mark.parametrize("backend", BACKENDS)
def test_requires_grad_subsets(backend: str) -> None:
    checks.check_requires_grad_subsets(partial(multiscale_aggregate, backend=backend), SAMPLE.make(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_grad_out_of_any_layout(layout: str, dtype: torch.dtype) -> None:
    checks.check_grad_out_layouts(CPU, Sample(2, 2, 8, 5, 6, kernels=(3, 5), layout=layout, biases=True).make(dtype))


def test_one_scale_of_several_is_used() -> None:
    """The grad_out of the others is None, which stands for zeros."""
    leaves = as_leaves(SAMPLE.make(torch.float32))
    inputs = list(tensors_of(leaves).values())
    grads = torch.autograd.grad(CPU(**leaves)[1].sum(), inputs)
    expected = torch.autograd.grad(
        multiscale_aggregate(**leaves, backend="reference")[1].sum(), inputs, allow_unused=True
    )
    for name, grad, wanted in zip(tensors_of(leaves), grads, expected, strict=True):
        assert torch.allclose(grad, torch.zeros_like(grad) if wanted is None else wanted, rtol=1e-4, atol=1e-4), name


def test_saves_qkv_and_parameters_only() -> None:
    leaves = as_leaves(SAMPLE.make(torch.float32))
    with SavedTensors() as saved:
        CPU(**leaves)
    assert saved.storages(list(tensors_of(leaves).values())) == {}
    assert len(saved.tensors) == 1 + 3 * 2


def test_no_graph_when_no_gradient_is_needed() -> None:
    checks.check_no_graph(CPU, SAMPLE.make(torch.float32))


def test_second_backward_through_the_same_graph() -> None:
    checks.check_backward_twice(CPU, SAMPLE.make(torch.float32))


@pytest.mark.parametrize("name", ["qkv", "depthwise_weights[1]", "pointwise_weights[0]", "depthwise_biases[0]"])
def test_input_changed_after_forward_is_noticed(name: str) -> None:
    checks.check_changed_input_is_noticed(CPU, SAMPLE.make(torch.float32), name)


def test_double_backward_raises_and_names_the_way_out() -> None:
    checks.check_double_backward_raises(CPU, SAMPLE.make(torch.float32), "multiscale_aggregate")


def test_double_backward_of_the_reference() -> None:
    a = as_leaves(Sample(1, 1, 1, 3, 2, kernels=(3,)).make(torch.float64))

    def function(qkv: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
        return multiscale_aggregate(qkv, [depthwise], [pointwise], head_dim=1, backend="reference")[0]

    assert torch.autograd.gradgradcheck(function, (a["qkv"], a["depthwise_weights"][0], a["pointwise_weights"][0]))


def test_forward_mode_raises() -> None:
    checks.check_forward_mode_raises(CPU, SAMPLE.make(torch.float32), "qkv")


def test_func_grad() -> None:
    reference = partial(multiscale_aggregate, backend="reference")
    checks.check_func_grad(CPU, reference, SAMPLE.make(torch.float32), "qkv")


def test_vmap_is_refused_clearly() -> None:
    checks.check_vmap_is_refused(CPU, SAMPLE.make(torch.float32), "qkv")


def arguments_of_size(batch: int, height: int, width: int) -> Arguments:
    return Sample(batch, 2, 4, height, width, kernels=(3, 5), biases=True).make(torch.float32)


def test_compile_static_and_dynamic(fresh_compiler: None) -> None:
    checks.check_compiled(multiscale_aggregate, arguments_of_size, calls=2)


def test_compile_inference(fresh_compiler: None) -> None:
    arguments = SAMPLE.make(torch.float32)
    compiled = torch.compile(lambda kwargs: [out + 1 for out in multiscale_aggregate(**kwargs)], fullgraph=True)
    with torch.no_grad():
        for out, expected in zip(compiled(arguments), multiscale_aggregate(**arguments), strict=True):
            assert torch.allclose(out, expected + 1, rtol=1e-6, atol=1e-6)


class Aggregate(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        arguments = arguments_of_size(1, 1, 1)
        self.depthwise = torch.nn.ParameterList(arguments["depthwise_weights"])
        self.pointwise = torch.nn.ParameterList(arguments["pointwise_weights"])

    def forward(self, qkv: Tensor) -> list[Tensor]:
        return multiscale_aggregate(qkv, list(self.depthwise), list(self.pointwise), head_dim=4)


def test_export() -> None:
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    qkv = arguments_of_size(2, 5, 6)["qkv"]
    program = torch.export.export(Aggregate(), (qkv,), dynamic_shapes={"qkv": {2: height, 3: width}})
    other = arguments_of_size(2, 9, 4)["qkv"]
    for out, expected in zip(program.module()(other), Aggregate()(other), strict=True):
        assert torch.equal(out, expected)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("multiscale_aggregate_fwd" in target for target in targets)


def test_meta_and_fake_tensors() -> None:
    arguments = SAMPLE.make(torch.bfloat16)
    meta = {k: [t.to("meta") for t in v] if isinstance(v, list) else v for k, v in arguments.items()}
    outs = multiscale_aggregate(**meta | {"qkv": arguments["qkv"].to("meta")})
    assert all(out.shape == arguments["qkv"].shape and out.dtype == torch.bfloat16 for out in outs)
    with torch._subclasses.FakeTensorMode():
        arguments = arguments_of_size(2, 5, 6)
        fake = arguments["qkv"].contiguous(memory_format=torch.channels_last).requires_grad_()
        outs = CPU(**arguments | {"qkv": fake})
        assert all(out.is_contiguous(memory_format=torch.channels_last) for out in outs)
        assert torch.autograd.grad(sum(out.sum() for out in outs), fake)[0].stride() == fake.stride()
