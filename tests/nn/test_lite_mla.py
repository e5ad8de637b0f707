"""LiteMLA and FusedLiteMLA as modules: dtypes, autocast, copies, hooks, checkpointing, compile."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from efficientvit_kernels import FusedLiteMLA, LiteMLA
from efficientvit_kernels.testing import native_calls, rule_t

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = (torch.float16, torch.bfloat16)


def pair(**kwargs: Any) -> tuple[LiteMLA, FusedLiteMLA]:
    """The reference module and the fused one with the same random weights and BN statistics, in eval mode."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"in_channels": 32, "out_channels": 32, "dim": 8} | kwargs
    module = LiteMLA(**arguments)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    fused = FusedLiteMLA(**arguments)
    fused.load_state_dict(module.state_dict())
    return module.eval(), fused.eval()


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (2, 32, 9, 7)), generator=torch.Generator().manual_seed(1)).to(dtype)


CONSTRUCTIONS: list[dict[str, Any]] = [
    {},
    {"scales": ()},
    {"scales": (3, 5)},
    {"scales": (3, 5, 7)},
    {"heads": 2},
    {"heads": 7},
    {"heads_ratio": 0.5},
    {"dim": 16},
    {"dim": 32},
    {"out_channels": 12},
    {"use_bias": True},
    {"use_bias": (True, False)},
    {"norm": None},
    {"norm": "bn2d"},
    {"norm": ("ln2d", "trms2d")},
    {"act_func": "silu"},
    {"act_func": ("relu6", "gelu")},
    {"eps": 1e-3},
    {"kernel_func": "hswish"},
    {"kernel_func": "gelu"},
]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kwargs", CONSTRUCTIONS, ids=str)
def test_every_constructor_argument(kwargs: dict[str, Any], train: bool) -> None:
    module, fused = pair(**kwargs)
    module.double().train(train)
    fused.double().train(train)
    x, y = image().double().requires_grad_(), image().double().requires_grad_()
    expected, out = module(x), fused(y)
    assert torch.allclose(out, expected, rtol=1e-11, atol=1e-11)
    grad_out = torch.randn_like(out)
    expected.backward(grad_out)
    out.backward(grad_out)
    assert torch.allclose(y.grad, x.grad, rtol=1e-9, atol=1e-10)  # type: ignore[arg-type]
    for (name, ours), theirs in zip(fused.named_parameters(), module.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9), name  # type: ignore[arg-type]
    for (name, ours), theirs in zip(fused.named_buffers(), module.buffers(), strict=True):
        assert torch.allclose(ours, theirs), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_modules(dtype: torch.dtype, channels_last: bool) -> None:
    """.half() and .bfloat16(): rule T, with the plain-torch module in the same dtype as the baseline."""
    module, fused = pair(in_channels=64, out_channels=64, dim=16)
    x = image(2, 64, 12, 12, dtype=dtype)
    module, fused = module.to(dtype), fused.to(dtype)
    if channels_last:
        x, fused = x.contiguous(memory_format=torch.channels_last), fused.to(memory_format=torch.channels_last)
    out, base = fused(x), module(x)
    truth = copy.deepcopy(module).double()(x.double())
    assert out.dtype == dtype
    verdict = rule_t(out, truth, base)
    assert verdict.ok, verdict
    assert out.stride() == base.stride()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_e7_e8_cpu_autocast(dtype: torch.dtype) -> None:
    """Under CPU autocast the official fp16 denominators underflow: NaN pixels in 3 of 50 inputs. Ours: none."""
    module, fused = pair(in_channels=64, out_channels=64, dim=16)
    truth_module = copy.deepcopy(module).double()
    for seed in range(50):
        x = torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.autocast("cpu", dtype=dtype):
            out = fused(x)
        assert torch.isfinite(out).all(), seed
        truth = truth_module(x.double())
        assert (out.double() - truth).abs().max() <= 20 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_training(dtype: torch.dtype) -> None:
    _, fused = pair()
    fused.train()
    x = image().requires_grad_()
    before = native_calls()
    with torch.autocast("cpu", dtype=dtype):
        out = fused(x)
    out.float().square().sum().backward()
    assert native_calls() - before == 2
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fused.parameters())
    assert all(torch.isfinite(p.grad).all() for p in fused.parameters())  # type: ignore[arg-type]


def test_e5_large_inputs_in_half_precision() -> None:
    """fp16 at 3e4: finite, where the official module is. Beyond, only stored fp16 stages may overflow."""
    _, fused = pair()
    x = image(1, 32, 16, 16)
    x = (x / x.abs().max() * 3e4).half()
    assert torch.isfinite(fused.half()(x)).all()


def test_e14_nan_pixel_stays_in_its_image() -> None:
    _, fused = pair()
    x = image()
    x[1, 3, 4, 4] = float("nan")
    out = fused(x)
    assert torch.isfinite(out[0]).all()
    assert torch.isnan(out[1]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 16), (1, 17), (4, 4), (4, 5), (2, 3)])
def test_e17_small_images(size: tuple[int, int]) -> None:
    module, fused = pair(in_channels=64, out_channels=64, dim=16)
    x = image(2, 64, *size)
    assert torch.allclose(fused(x), module(x), rtol=1e-4, atol=1e-5)


def test_e15_batch_of_zero() -> None:
    _, fused = pair()
    x = torch.zeros(0, 32, 6, 5, requires_grad=True)
    out = fused(x)
    out.sum().backward()
    assert out.shape == (0, 32, 6, 5)
    assert x.grad is not None
    assert all(p.grad is not None and not p.grad.any() for p in fused.parameters())


def test_e21_layouts_of_the_input() -> None:
    _, fused = pair()
    x = image()
    expected = fused(x)
    sliced = torch.zeros(2, 40, 11, 15)[:, 4:36, 1:10, ::2][..., :7].copy_(x)
    for other in (sliced, x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.allclose(fused(other), expected, rtol=1e-5, atol=1e-6)
    out = fused(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6)
    expanded = fused(x[:1].expand(3, -1, -1, -1))
    assert torch.allclose(expanded, expected[:1].expand(3, -1, -1, -1), rtol=1e-5, atol=1e-6)


def test_state_dict_keys_are_the_official_ones() -> None:
    _, fused = pair(scales=(3, 5))
    assert list(fused.state_dict()) == [
        "qkv.conv.weight",
        "aggreg.0.0.weight",
        "aggreg.0.1.weight",
        "aggreg.1.0.weight",
        "aggreg.1.1.weight",
        "proj.conv.weight",
        "proj.norm.weight",
        "proj.norm.bias",
        "proj.norm.running_mean",
        "proj.norm.running_var",
        "proj.norm.num_batches_tracked",
    ]


def test_deepcopy_pickle_and_save() -> None:
    _, fused = pair()
    x, expected = image(), fused(image())
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(stream, weights_only=False),
    ):
        assert type(other) is FusedLiteMLA
        assert torch.equal(other(x), expected)
        next(other.parameters()).data.zero_()
        assert torch.equal(fused(x), expected)


def test_load_state_dict_takes_effect_at_once() -> None:
    """Nothing derived from the weights is cached."""
    _, fused = pair()
    fused(image())
    state = {key: value * 2 if value.is_floating_point() else value for key, value in fused.state_dict().items()}
    module, _ = pair()
    module.load_state_dict(state)
    fused.load_state_dict(state)
    assert torch.allclose(fused(image()), module(image()), rtol=1e-4, atol=1e-5)


def test_hooks_on_the_module_and_on_submodules() -> None:
    _, fused = pair()
    seen = []
    fused.register_forward_pre_hook(lambda *_: seen.append("before"))
    fused.qkv.conv.register_forward_hook(lambda *_: seen.append("qkv"))
    fused.proj.register_forward_hook(lambda *_: seen.append("proj"))
    fused.register_forward_hook(lambda *_: seen.append("after"))
    fused(image())
    assert seen == ["before", "qkv", "proj", "after"]


def test_parametrized_submodule() -> None:
    module, fused = pair()
    for m in (module, fused):
        torch.nn.utils.parametrizations.weight_norm(m.qkv.conv)
    assert torch.allclose(fused(image()), module(image()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    _, fused = pair()
    x = image().requires_grad_()
    fused(x).square().sum().backward()
    expected = [x.grad, *(p.grad for p in fused.parameters())]
    y = image().requires_grad_()
    fused.zero_grad()
    checkpoint(fused, y, use_reentrant=use_reentrant).square().sum().backward()
    grads = [y.grad, *(p.grad for p in fused.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compile(train: bool, fresh_compiler: None) -> None:
    """fullgraph, forward and backward: one static graph, then one for every size."""
    _, fused = pair()
    fused.train(train)
    twin = copy.deepcopy(fused)
    compiled = torch.compile(twin, fullgraph=True)
    for step, shape in enumerate([(2, 32, 9, 7), (3, 32, 12, 5), (4, 32, 8, 11), (2, 32, 3, 14)]):
        x, y = image(*shape).requires_grad_(), image(*shape).requires_grad_()
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            out = compiled(y)
        before = native_calls()
        out.square().sum().backward()
        assert native_calls() == before + 1
        expected = fused(x)
        expected.square().sum().backward()
        assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(y.grad, x.grad, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kwargs", [{}, {"use_bias": True, "scales": (3, 5)}, {"norm": "bn2d"}], ids=str)
def test_export(kwargs: dict[str, Any], train: bool) -> None:
    """With sizes left open; the program calls the ops that the module would."""
    _, fused = pair(**kwargs)
    fused.train(train)
    sizes = {axis: torch.export.Dim(name, min=2) for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    program = torch.export.export(fused, (image(),), dynamic_shapes={"x": sizes})
    other = image(3, 32, 5, 8)
    assert torch.allclose(program.module()(other), copy.deepcopy(fused)(other), rtol=1e-5, atol=1e-6)
    called = {str(node.target).split(".")[-2] for node in program.graph.nodes if "efficientvit" in str(node.target)}
    two = {"multiscale_aggregate_fwd", "relu_linear_attention_fwd"}
    assert called == ({"lite_mla_fwd"} if fused.fusion_plan().path == "whole" else two)


def test_compile_under_autocast(fresh_compiler: None) -> None:
    _, fused = pair()
    compiled = torch.compile(fused, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = compiled(image()), fused(image())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_functional_call() -> None:
    """Weights handed in as plain tensors: the fused path takes them, and gives their gradients."""
    _, fused = pair()
    weights = {name: parameter.detach() * 1.5 for name, parameter in fused.named_parameters()}
    before = native_calls()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(fused, weights, image()).square().sum()

    grads = torch.func.grad(loss)(weights)
    assert native_calls() - before == 2
    twin = copy.deepcopy(fused)
    twin.load_state_dict(weights, strict=False)
    twin(image()).square().sum().backward()
    assert all(torch.equal(grads[name], parameter.grad) for name, parameter in twin.named_parameters())


def test_training_lowers_the_loss() -> None:
    _, fused = pair()
    fused.train()
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.05)
    x, target = image(), image(2, 32, 9, 7).flip(0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (fused(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
