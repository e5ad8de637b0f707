"""relu_linear_attention under autograd, torch.func, torch.compile and torch.export."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from efficientvit_kernels import reference, relu_linear_attention
from efficientvit_kernels.testing import make_qkv, native_calls
from tests.ops.common import BACKENDS, DTYPES, grad_out_like, run

ops = torch.ops.efficientvit_kernels


def away_from_the_kink(x: Tensor) -> Tensor:
    """relu has no derivative at 0: finite differences need |x| well above their step."""
    return torch.where(x.abs() < 0.05, 0.05 * torch.where(x < 0, -1.0, 1.0), x)


@pytest.mark.parametrize(("head_dim", "height", "width"), [(2, 3, 4), (4, 1, 3), (3, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, head_dim: int, height: int, width: int) -> None:
    leaves = [
        away_from_the_kink(tensor).requires_grad_()
        for tensor in make_qkv(2, 2, head_dim, height, width, scales=2, dtype=torch.float64)
    ]
    for eps in (1e-15, 0.1):
        assert torch.autograd.gradcheck(
            lambda *qkv, eps=eps: relu_linear_attention(qkv, head_dim, eps=eps, backend=backend), leaves
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "scales"), [((2, 48, 5, 7), 2), ((1, 96, 1, 1), 1), ((0, 48, 4, 4), 1), ((2, 48, 3, 0), 3)]
)
def test_opcheck(shape: tuple[int, ...], scales: int, dtype: torch.dtype) -> None:
    """Schema, fake kernels and dynamic shapes of the registered ops, on detached inputs."""
    torch.use_deterministic_algorithms(False)  # opcheck compares the memory that NaN filling would make unequal
    qkv = [torch.randn(shape).to(dtype) for _ in range(scales)]
    qkv[-1] = qkv[-1].contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(ops.relu_linear_attention_fwd.default, (qkv, 16, 1e-15))
    out, state = ops.relu_linear_attention_fwd(qkv, 16, 1e-15)
    for scales_needed in ([*range(scales)], [scales - 1], []):
        torch.library.opcheck(
            ops.relu_linear_attention_bwd.default, (torch.randn_like(out), qkv, state, 16, 1e-15, scales_needed)
        )


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_requires_grad_subsets(backend: str, mask: tuple[bool, ...]) -> None:
    qkv = make_qkv(2, 2, 8, 5, 6, scales=3)
    expected = run(qkv, 8, 1e-15, backend)[1]
    leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(qkv, mask, strict=True)]
    out = relu_linear_attention(leaves, 8, backend=backend)
    assert out.requires_grad == any(mask)
    if any(mask):
        out.backward(grad_out_like(out))
    for leaf, needed, grad in zip(leaves, mask, expected, strict=True):
        assert (leaf.grad is not None) == needed
        assert leaf.grad is None or torch.equal(leaf.grad, grad)


def test_the_same_tensor_twice() -> None:
    qkv = make_qkv(2, 2, 8, 5, 6)[0].requires_grad_()
    out = relu_linear_attention([qkv, qkv], 8)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    (single,) = torch.autograd.grad(relu_linear_attention(qkv, 8).sum(), qkv)
    assert torch.equal(grad, 2 * single)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["expanded", "channels_last", "transposed", "sliced", "one row broadcast"])
def test_grad_out_of_any_layout(kind: str, dtype: torch.dtype) -> None:
    """F17: grad_out need not be contiguous; .sum() gives one of stride 0."""
    qkv = make_qkv(2, 2, 8, 5, 6, scales=2, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in qkv]
    out = relu_linear_attention(leaves, 8, backend="cpu")
    grad_out = grad_out_like(out)
    if kind == "expanded":
        grad_out = grad_out[:1, :1, :1, :1].expand(out.shape)
    elif kind == "channels_last":
        grad_out = grad_out.contiguous(memory_format=torch.channels_last)
    elif kind == "transposed":
        grad_out = grad_out.transpose(2, 3).contiguous().transpose(2, 3)
    elif kind == "sliced":
        grad_out = torch.stack([grad_out, grad_out], dim=-1)[..., 0]
    else:
        grad_out = grad_out[:, :, :1].expand(out.shape)
    assert not grad_out.is_contiguous()
    strided = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    contiguous = torch.autograd.grad(out, leaves, grad_out.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))


def test_saves_inputs_and_state_only() -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    qkv = [tensor.requires_grad_() for tensor in make_qkv(2, 3, 16, 9, 9, scales=2)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        relu_linear_attention(qkv, 16, backend="cpu")
    inputs = {tensor.data_ptr() for tensor in qkv}
    others = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    assert [list(tensor.shape) for tensor in others] == [[2, 6, 17, 16]]


def test_no_graph_when_no_gradient_is_needed() -> None:
    qkv = make_qkv(1, 2, 8, 5, 6)[0].requires_grad_()
    with torch.no_grad():
        assert relu_linear_attention(qkv, 8).grad_fn is None
    with torch.inference_mode():
        out = relu_linear_attention(qkv, 8)
    assert out.is_inference()
    assert torch.equal(out, relu_linear_attention(qkv.detach(), 8))


def test_second_backward_through_the_same_graph() -> None:
    qkv = make_qkv(1, 2, 8, 5, 6)[0].requires_grad_()
    out = relu_linear_attention(qkv, 8).sum()
    (first,) = torch.autograd.grad(out, qkv, retain_graph=True)
    (second,) = torch.autograd.grad(out, qkv)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, qkv)


def test_input_changed_after_forward_is_noticed() -> None:
    """F18"""
    leaf = make_qkv(1, 2, 8, 5, 6)[0].requires_grad_()
    qkv = leaf * 1
    out = relu_linear_attention(qkv, 8, backend="cpu")
    qkv.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_double_backward_raises_and_names_the_way_out() -> None:
    qkv = make_qkv(1, 2, 8, 5, 6)[0].requires_grad_()
    out = relu_linear_attention(qkv, 8, backend="cpu")
    (grad,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="relu_linear_attention: derivative must be of first order"):
        torch.autograd.grad(grad.sum(), qkv, allow_unused=True)


def test_double_backward_of_the_reference() -> None:
    leaf = away_from_the_kink(make_qkv(1, 1, 2, 2, 3, dtype=torch.float64)[0]).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: relu_linear_attention(x, 2, eps=0.1, backend="reference"), leaf)


def test_forward_mode_raises() -> None:
    """A bare op would silently return a zero tangent."""
    qkv = make_qkv(1, 2, 8, 3, 3)[0]
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: relu_linear_attention(x, 8, backend="cpu"), (qkv,), (qkv,))


def test_func_grad() -> None:
    qkv = make_qkv(1, 2, 8, 3, 3)[0]
    actual = torch.func.grad(lambda x: relu_linear_attention(x, 8, backend="cpu").square().sum())(qkv)
    expected = torch.func.grad(lambda x: reference.relu_linear_attention(x, 8).square().sum())(qkv)
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_vmap_is_refused_clearly() -> None:
    with pytest.raises(RuntimeError, match=r"[Bb]atch"):
        torch.vmap(lambda x: relu_linear_attention(x, 8, backend="cpu"))(torch.zeros(3, 1, 48, 3, 3))


def check_compiled(compiled: object, shape: tuple[int, int, int, int]) -> None:
    qkv = [tensor.requires_grad_() for tensor in make_qkv(*shape[:2], 8, *shape[2:], scales=2)]
    expected = relu_linear_attention(qkv, 8, eps=1e-6).sin()
    expected_grads = torch.autograd.grad(expected.sum(), qkv)
    before = native_calls()
    out = compiled(qkv)  # type: ignore[operator]
    grads = torch.autograd.grad(out.sum(), qkv)
    assert native_calls() - before == 2
    assert torch.allclose(out, expected, rtol=1e-6, atol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(grads, expected_grads, strict=True))


def test_compile_static_and_dynamic(fresh_compiler: None) -> None:
    """One static graph, then one dynamic one, forward and backward, without a graph break; never a third."""
    compiled = torch.compile(lambda qkv: relu_linear_attention(qkv, 8, eps=1e-6).sin(), fullgraph=True)
    check_compiled(compiled, (1, 2, 6, 5))
    check_compiled(compiled, (3, 2, 9, 7))
    with torch.compiler.set_stance("fail_on_recompile"):
        check_compiled(compiled, (2, 2, 11, 4))
        check_compiled(compiled, (5, 2, 3, 8))


def test_compile_inference(fresh_compiler: None) -> None:
    qkv = make_qkv(2, 2, 16, 5, 6)[0]
    compiled = torch.compile(lambda x: relu_linear_attention(x, 16) + 1, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(qkv), relu_linear_attention(qkv, 16) + 1, rtol=1e-6, atol=1e-6)


class Core(torch.nn.Module):
    def forward(self, qkv: Tensor) -> Tensor:
        return relu_linear_attention([qkv, qkv * 0.5], 8)


def test_export() -> None:
    qkv = make_qkv(2, 2, 8, 5, 6)[0]
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    program = torch.export.export(Core(), (qkv,), dynamic_shapes={"qkv": {2: height, 3: width}})
    other = make_qkv(2, 2, 8, 9, 4)[0]
    assert torch.equal(program.module()(other), Core()(other))
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("relu_linear_attention_fwd" in target for target in targets)


def test_meta_and_fake_tensors() -> None:
    qkv = torch.empty(2, 96, 5, 6, device="meta", dtype=torch.bfloat16)
    out = relu_linear_attention([qkv, qkv], 16)
    assert out.shape == (2, 64, 5, 6)
    assert out.dtype == torch.bfloat16
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(2, 96, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
        out = relu_linear_attention(fake, 16, backend="cpu")
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.autograd.grad(out.sum(), fake)[0].stride() == fake.stride()
