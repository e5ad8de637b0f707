"""accelerate and restore on our own, the official and timm's models."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficientvit_kernels import FusedLiteMLA, LiteMLA, Report, accelerate, restore
from efficientvit_kernels.testing import native_calls, official_relu_linear_attention, rule_t
from tests.processes import python

pytestmark = pytest.mark.usefixtures("one_thread")
timm = pytest.importorskip("timm", reason="timm is in the development extras")


class OfficialStandIn(nn.Module):
    """A LiteMLA with the official attributes and formula, filed under the official module and class name."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        ours = LiteMLA(channels, channels, dim=dim)
        self.dim, self.eps = dim, 1e-15
        self.qkv, self.aggreg, self.kernel_func, self.proj = ours.qkv, ours.aggreg, ours.kernel_func, ours.proj

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        return self.proj(official_relu_linear_attention([qkv, *(op(qkv) for op in self.aggreg)], self.dim, self.eps))


OfficialStandIn.__module__, OfficialStandIn.__qualname__ = "efficientvit.models.nn.ops", "LiteMLA"


class Subclass(LiteMLA):
    pass


class LookAlikeLiteMLA(nn.Identity):
    pass


def own_model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), LiteMLA(32, 32), nn.Sequential(LiteMLA(32, 32, dim=16), nn.ReLU()))


def official_model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), OfficialStandIn(32, 8), OfficialStandIn(32, 16))


def timm_model(name: str = "efficientvit_b0") -> nn.Module:
    return timm.create_model(name, num_classes=10)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "own": (own_model, 2),
    "official": (official_model, 2),
    "timm b0": (timm_model, 4),
    "timm b1": (lambda: timm_model("efficientvit_b1"), 7),
    "timm l1": (lambda: timm_model("efficientvit_l1"), 6),
}


@pytest.fixture(params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    build, count = MODELS[request.param]
    return build(), count


def image(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def test_same_numbers_keys_and_exact_undo(case: tuple[nn.Module, int]) -> None:
    model, count = case
    model.eval()
    before = dict(model.named_modules())
    state = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    expected = model(image())
    truth_model = copy.deepcopy(model)
    accelerate(truth_model, "reference")

    report = accelerate(model)
    calls = native_calls()
    out = model(image())

    assert len(report.swapped) == count
    assert not report.left
    assert native_calls() - calls == count
    verdict = rule_t(out, truth_model.double()(image().double()), expected)
    assert verdict.ok, verdict
    assert list(model.state_dict()) == list(state)
    assert all(value.data_ptr() == state[key][0] for key, value in model.state_dict().items())
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert list(dict(model.named_modules())) == list(before)
    assert sum(isinstance(module, FusedLiteMLA) for module in model.modules()) == count

    assert restore(model) == [swap.name for swap in report.swapped]
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())
    assert torch.equal(model(image()), expected)
    assert restore(model) == []


def test_idempotent(case: tuple[nn.Module, int]) -> None:
    model, _ = case
    first = accelerate(model)
    modules = dict(model.named_modules())
    assert accelerate(model) == first
    assert all(module is modules[name] for name, module in model.named_modules())
    accelerate(model, "reference")
    assert {m.backend for m in model.modules() if isinstance(m, FusedLiteMLA)} == {"reference"}
    calls = native_calls()
    model.eval()(image())
    assert native_calls() == calls


def test_training_gradients(case: tuple[nn.Module, int]) -> None:
    """One training step: the gradients of every parameter, in float64."""
    model, _ = case
    model.double().train()
    fused = copy.deepcopy(model)
    exact = copy.deepcopy(model)
    accelerate(fused)
    accelerate(exact, "reference")
    x = image().double()
    for m in (exact, fused):
        m(x).square().mean().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), exact.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-8 * theirs.grad.abs().max() + 1e-12, name


def test_every_layer_is_fused_whole(case: tuple[nn.Module, int]) -> None:
    model, count = case
    report = accelerate(model)
    assert [swap.plan for swap in report.swapped] == ["whole"] * count
    assert str(report).count("  whole  (was ") == count


def test_the_report_says_what_keeps_a_layer_from_being_fused_whole() -> None:
    model = own_model()
    model[1].qkv.conv.register_forward_hook(lambda *_: None)
    torch.nn.utils.parametrizations.weight_norm(model[2][0].aggreg[0][1])
    report = accelerate(model)
    assert [swap.plan for swap in report.swapped] == [
        "aggregation and attention only: qkv.conv has a forward hook",
        "attention only: aggreg.0.1 is a ParametrizedConv2d",
    ]
    assert "fused  1  aggregation and attention only: qkv.conv has a forward hook  (was efficientvit" in str(report)


def test_recompute(case: tuple[nn.Module, int]) -> None:
    """It reaches every module, a later call changes it, and restore leaves nothing of it behind."""
    model, _ = case
    model.double()
    twin = copy.deepcopy(model)
    accelerate(model, recompute=True)
    accelerate(twin)
    assert {m.recompute for m in model.modules() if isinstance(m, FusedLiteMLA)} == {True}
    for m in (model, twin):
        m(image().double()).square().mean().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    accelerate(model)
    assert {m.recompute for m in model.modules() if isinstance(m, FusedLiteMLA)} == {False}
    restore(model)
    assert not any("recompute" in m.__dict__ for m in model.modules())


def test_timm_keeps_its_eps() -> None:
    model = timm_model()
    accelerate(model)
    assert {m.eps for m in model.modules() if isinstance(m, FusedLiteMLA)} == {1e-5}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_timm_in_half_precision(dtype: torch.dtype) -> None:
    model = timm_model().eval().to(dtype)
    expected = model(image().to(dtype))
    truth = copy.deepcopy(model)
    accelerate(truth, "reference")
    accelerate(model)
    verdict = rule_t(model(image().to(dtype)), truth.double()(image().to(dtype).double()), expected)
    assert verdict.ok, verdict


def test_mode_hooks_and_new_submodules_survive_both_ways() -> None:
    model = own_model()
    calls: list[str] = []
    model[1].register_forward_hook(lambda *_: calls.append("early"))
    accelerate(model)
    assert model[1].training
    model.eval()
    handle = model[1].register_forward_hook(lambda *_: calls.append("late"))
    model[1].proj = nn.Sequential(model[1].proj)
    model(image())
    assert calls == ["early", "late"]
    restore(model)
    assert not model[1].training
    assert isinstance(model[1].proj, nn.Sequential)
    model(image())
    assert calls == ["early", "late"] * 2
    handle.remove()
    model(image())
    assert calls == [*["early", "late"] * 2, "early"]


def test_shared_module_stays_shared() -> None:
    shared = LiteMLA(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": shared})
    report = accelerate(model)
    assert [swap.name for swap in report.swapped] == ["a", "c", "b.0"]
    assert model["a"] is model["b"][0] is model["c"]
    assert isinstance(model["a"], FusedLiteMLA)
    restore(model)
    assert model["a"] is model["b"][0] is model["c"] is shared


def test_copies_and_pickles_of_an_accelerated_model() -> None:
    model = own_model().eval()
    expected = model(image())
    accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(other(image()), expected, rtol=1e-4, atol=1e-5)
        other[1].qkv.conv.weight.data.zero_()
        assert not torch.allclose(other(image()), expected, rtol=1e-4, atol=1e-5)
        restore(other)
        assert type(other[1]) is LiteMLA
        assert not other[1].qkv.conv.weight.any()
    assert torch.allclose(model(image()), expected, rtol=1e-4, atol=1e-5)


def test_optimizer_and_casts_reach_both() -> None:
    model = own_model()
    original = model[1]
    accelerate(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = original.qkv.conv.weight.clone()
    model(image()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(original.qkv.conv.weight, before)
    model.double()
    restore(model)
    assert model[1] is original
    assert original.qkv.conv.weight.dtype == torch.float64
    model(image().double())


def test_left_alone_and_named() -> None:
    patched, compiled = LiteMLA(32, 32), LiteMLA(32, 32)
    patched.forward = nn.Identity().forward  # type: ignore[method-assign]
    compiled.compile()
    model = nn.ModuleDict(
        {
            "subclass": Subclass(32, 32),
            "look_alike": LookAlikeLiteMLA(),
            "gelu": LiteMLA(32, 32, kernel_func="gelu"),
            "patched": patched,
            "compiled": compiled,
            "fused": FusedLiteMLA(32, 32),
            "good": LiteMLA(32, 32),
        }
    )
    before = dict(model.items())
    report = accelerate(model)
    reasons = {left.name: left.reason for left in report.left}
    assert [swap.name for swap in report.swapped] == ["good"]
    assert all(model[name] is before[name] for name in reasons)
    assert "a subclass of efficientvit_kernels.nn.lite_mla.LiteMLA" in reasons["subclass"]
    assert "none of the known" in reasons["look_alike"]
    assert "kernel function GELU" in reasons["gelu"]
    assert "forward of its own" in reasons["patched"]
    assert "compiled in place" in reasons["compiled"]
    assert "FusedLiteMLA already" in reasons["fused"]
    text = str(report)
    assert "1 module(s) fused, 6 left" in text
    assert all(name in text for name in before)


def test_a_model_without_attention() -> None:
    report = accelerate(nn.Sequential(nn.Conv2d(3, 3, 1)))
    assert report == Report((), ())


def test_from_module_shares_everything() -> None:
    module = LiteMLA(32, 32).eval()
    fused = FusedLiteMLA.from_module(module, "cpu")
    x = torch.randn(2, 32, 6, 5)
    assert torch.allclose(fused(x), module(x), rtol=1e-4, atol=1e-5)
    assert list(fused.state_dict()) == list(module.state_dict())
    assert all(a is b for a, b in zip(fused.parameters(), module.parameters(), strict=True))
    assert not fused.training
    assert FusedLiteMLA.from_module(fused, "reference").backend == "reference"


def test_compile_after_accelerate(fresh_compiler: None) -> None:
    model = own_model().eval()
    accelerate(model)
    expected = model(image())
    compiled = torch.compile(model, fullgraph=True)
    calls = native_calls()
    with torch.no_grad():
        out = compiled(image())
    assert native_calls() - calls == 2
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5)


ERRORS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    *((repr(what), lambda w=what: accelerate(w), TypeError, f"accelerate: model must be a torch.nn.Module, got {type(what).__name__}") for what in (None, 3, "b1", [], {}, object, torch.zeros(1))),
    *((f"restore {what!r}", lambda w=what: restore(w), TypeError, f"restore: model must be a torch.nn.Module, got {type(what).__name__}") for what in (None, 3, "b1", [], {})),
    ("class, not module", lambda: accelerate(LiteMLA), TypeError, "accelerate: model must be a torch.nn.Module, got type"),  # type: ignore[arg-type]
    ("a single LiteMLA", lambda: accelerate(LiteMLA(32, 32)), ValueError, "accelerate: model must be a module that contains LiteMLA modules, got a efficientvit_kernels.nn.lite_mla.LiteMLA; use FusedLiteMLA.from_module for a single one"),
    ("a single fused one", lambda: accelerate(FusedLiteMLA(32, 32)), ValueError, "accelerate: model must be a module that contains LiteMLA modules"),
    ("a single official one", lambda: accelerate(OfficialStandIn(32, 8)), ValueError, "accelerate: model must be a module that contains LiteMLA modules, got a efficientvit.models.nn.ops.LiteMLA"),
    ("unknown backend", lambda: accelerate(own_model(), "gpu"), ValueError, "accelerate: backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'gpu'"),
    ("backend of a wrong type", lambda: accelerate(own_model(), None), ValueError, "accelerate: backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got None"),  # type: ignore[arg-type]
    ("recompute", lambda: accelerate(own_model(), recompute="yes"), TypeError, "accelerate: recompute must be a bool, got str"),  # type: ignore[arg-type]
    ("cuda", lambda: accelerate(own_model(), "cuda"), NotImplementedError, "accelerate: backend must be one that can run here, got 'cuda': it was left out"),
    ("restore of a fused one", lambda: restore(accelerated()[1]), ValueError, "restore: model must be the model that was accelerated, got one of its fused modules"),
]  # fmt: skip


def accelerated() -> nn.Sequential:
    model = own_model()
    accelerate(model)
    return model


@pytest.mark.parametrize(("call", "error", "text"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])
@pytest.mark.usefixtures("without_cuda")
def test_bad_input(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="^" + re.escape(text)) as caught:
        call()
    assert caught.type is error


def test_nothing_changes_when_it_fails(monkeypatch: pytest.MonkeyPatch, without_cuda: None) -> None:
    """An error in the middle of the plan leaves every module in its place."""
    model = own_model()
    before = dict(model.named_modules())
    made = []

    def second_fails(module: nn.Module, backend: str, *, recompute: bool) -> nn.Module:
        made.append(module)
        if len(made) == 2:
            raise MemoryError("in the middle")
        return FusedLiteMLA(32, 32)

    monkeypatch.setattr(FusedLiteMLA, "from_module", second_fails)
    with pytest.raises(MemoryError):
        accelerate(model)
    assert all(module is before[name] for name, module in model.named_modules())
    for backend in ("gpu", "cuda"):
        with pytest.raises((ValueError, NotImplementedError)):
            accelerate(model, backend)
    assert all(module is before[name] for name, module in model.named_modules())


def test_host_libraries_are_not_imported() -> None:
    """Recognition is by name: timm, which is installed here, stays out of a process that accelerates another model."""
    code = """
import sys, torch
from efficientvit_kernels import LiteMLA, accelerate
assert len(accelerate(torch.nn.Sequential(LiteMLA(32, 32))).swapped) == 1
sys.exit("timm" in sys.modules)
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
