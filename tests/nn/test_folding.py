"""FusedLiteMLA's BatchNorm in the epilogue, memory for the backward, recompute, and autocast on every path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficientvit_kernels import FusedLiteMLA, LiteMLA
from efficientvit_kernels.testing import native_calls, rule_t
from tests.nn.test_lite_mla import HALF, image, pair
from tests.ops.block_common import SavedTensors

pytestmark = pytest.mark.usefixtures("one_thread")


def agrees(fused: FusedLiteMLA, module: LiteMLA) -> bool:
    return torch.allclose(fused(image()), module(image()), rtol=1e-4, atol=1e-5)


def test_statistics_are_read_at_every_call() -> None:
    """Neither load_state_dict, nor an optimizer's step, nor training, nor a change in place leaves anything stale."""
    module, fused = pair(use_bias=True)
    assert agrees(fused, module)
    state = {k: v * 1.5 if v.is_floating_point() else v for k, v in module.state_dict().items()}
    for m in (module, fused):
        m.load_state_dict(state)
    assert agrees(fused, module)
    for m in (module, fused):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        m(image()).square().mean().backward()
        optimizer.step()
    assert agrees(fused, module)
    for m in (module, fused):
        m.train()(image())
        m.eval()
    assert agrees(fused, module)
    for m in (module, fused):
        m.proj.norm.running_var.mul_(3)
        m.proj.norm.weight.data.neg_()
        m.proj.norm.eps = 0.5
    assert agrees(fused, module)
    for m in (module, fused):
        m.proj.norm = nn.BatchNorm2d(32).eval()
    assert agrees(fused, module)


@pytest.mark.parametrize("use_bias", [False, True])
def test_gradients_in_eval_mode(use_bias: bool) -> None:
    """They flow through the folded norm into its weight and bias; the running statistics stay."""
    module, fused = pair(use_bias=use_bias)
    grads = []
    for m in (module.double(), fused.double()):
        before = {name: buffer.clone() for name, buffer in m.named_buffers()}
        x = image().double().requires_grad_()
        y = m(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        grads.append([x.grad, *(p.grad for p in m.parameters())])
        assert all(torch.equal(buffer, before[name]) for name, buffer in m.named_buffers())
    for ours, theirs in zip(*reversed(grads), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)  # type: ignore[arg-type]


def test_a_frozen_norm_beside_training_convolutions() -> None:
    """proj.norm.eval() in a module that trains: folded, with gradients for the rest."""
    module, fused = pair()
    for m in (module, fused):
        m.double().train()
        m.proj.norm.eval().requires_grad_(False)
        m(image().double()).square().sum().backward()
    assert fused.proj.norm.weight.grad is None
    for ours, theirs in zip(fused.parameters(), module.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)  # type: ignore[arg-type]


def test_norm_weight_of_zero() -> None:
    """Blocks that start as the identity: y is the norm's bias, and the weight gets its gradient."""
    module, fused = pair()
    for m in (module, fused):
        m.double().proj.norm.weight.data.zero_()
        (m(image().double()) + 1).square().sum().backward()
    assert fused.proj.norm.weight.grad.abs().max() > 0
    assert torch.allclose(fused.proj.norm.weight.grad, module.proj.norm.weight.grad, rtol=1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_norm_kept_in_float32(dtype: torch.dtype) -> None:
    """A 16-bit module whose BatchNorm stays in float32."""
    module, fused = pair(in_channels=64, out_channels=64, dim=16)
    truth = copy.deepcopy(module).double()
    module, fused = module.to(dtype), fused.to(dtype)
    for m in (module, fused):
        m.proj.norm.float()
    truth.load_state_dict(module.state_dict())
    x = image(2, 64, 12, 12, dtype=dtype)
    out = fused(x)
    assert out.dtype == dtype
    verdict = rule_t(out, truth(x.double()), module(x))
    assert verdict.ok, verdict


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """What a forward keeps for the backward, parameters and buffers not counted, x counted."""
    known = [*module.parameters(), *module.buffers()]
    with SavedTensors() as saved:
        y = module(x)
    sizes = saved.storages(known)
    del y
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_memory_of_training(dtype: torch.dtype) -> None:
    """x, qkv and the norm's input: 5x of x; with recompute 2x; and a state that does not grow with the image."""
    module, fused = pair(in_channels=64, out_channels=64, dim=16)
    module, fused = module.to(dtype).train(), fused.to(dtype).train()
    x = image(2, 64, 64, 64, dtype=dtype).requires_grad_()
    x_bytes = x.untyped_storage().nbytes()
    small = 2 * 8 * 17 * 16 * 4 + 64 * 4 * 4
    assert saved_bytes(fused, x) <= 5 * x_bytes + small
    fused.recompute = True
    assert saved_bytes(fused, x) <= 2 * x_bytes + small
    assert saved_bytes(module, x) > 15 * x_bytes  # what the separate operations keep


def test_memory_of_eval_mode_with_gradients() -> None:
    """No norm, so x and qkv, or x alone."""
    _, fused = pair(in_channels=64, out_channels=64, dim=16)
    x = image(2, 64, 64, 64).requires_grad_()
    x_bytes = x.untyped_storage().nbytes()
    small = 2 * 8 * 17 * 16 * 4 + 64 * 4 * 8
    assert saved_bytes(fused, x) <= 4 * x_bytes + small
    fused.recompute = True
    assert saved_bytes(fused, x) <= x_bytes + small


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kwargs", [{}, {"use_bias": True, "scales": (3, 5)}, {"norm": "bn2d"}], ids=str)
def test_recompute_gives_equal_bits(kwargs: dict[str, Any], train: bool) -> None:
    _, fused = pair(**kwargs)
    results = []
    for recompute in (False, True):
        twin = copy.deepcopy(fused).train(train)
        twin.recompute = recompute
        x = image().requires_grad_()
        y = twin(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in twin.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


def test_recompute_is_part_of_the_module() -> None:
    fused = FusedLiteMLA(32, 32, recompute=True)
    assert copy.deepcopy(fused).recompute
    assert "recompute=True" in repr(fused)
    assert "recompute" not in repr(FusedLiteMLA(32, 32))
    assert FusedLiteMLA.from_module(LiteMLA(32, 32), recompute=True).recompute
    assert not FusedLiteMLA.from_module(fused).recompute
    state = fused.__getstate__()
    del state["recompute"]  # as in a pickle from before there was one
    old = FusedLiteMLA.__new__(FusedLiteMLA)
    old.__setstate__(state)
    assert not old.recompute
    assert torch.equal(old.eval()(image()), fused.eval()(image()))


def nothing(fused: Any) -> None:
    pass


def hook_on_qkv(fused: Any) -> None:
    fused.qkv.register_forward_hook(lambda *_: None)


def hook_on_aggreg(fused: Any) -> None:
    fused.aggreg[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "change", [lambda fused: None, hook_on_qkv, hook_on_aggreg], ids=["whole", "two ops", "one op"]
)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_e7_e8_autocast_on_every_path(dtype: torch.dtype, change: Any, backend: str) -> None:
    """The convolutions' dtype, no NaN, the error of 16-bit storage; gradients in the parameters' float32."""
    module, fused = pair(in_channels=64, out_channels=64, dim=16, use_bias=True)
    fused.backend = backend
    change(fused)
    truth = copy.deepcopy(module).double()
    for seed in range(10):
        x = torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        before = native_calls()
        with torch.autocast("cpu", dtype=dtype):
            y, expected = fused(x), module(x)
        y.float().square().sum().backward()
        assert (native_calls() > before) == (backend == "auto")
        assert y.dtype == expected.dtype == dtype
        assert torch.isfinite(y).all()
        exact = truth(x.double())
        assert (y.double() - exact).abs().max() <= 20 * torch.finfo(dtype).eps * exact.abs().max()
        assert x.grad is not None
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fused.parameters())
        assert all(torch.isfinite(p.grad).all() for p in fused.parameters())  # type: ignore[arg-type]


def test_autocast_leaves_float64_alone() -> None:
    """As torch's convolutions do."""
    _, fused = pair()
    fused.double()
    x = image().double()
    expected = fused(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fused(x), expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_no_gradient_for_a_frozen_module(recompute: bool) -> None:
    """Only x asks for one: the backward computes no weight gradients, and none appears."""
    _, fused = pair()
    fused.requires_grad_(False)
    fused.recompute = recompute
    x = image().requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in fused.parameters())
