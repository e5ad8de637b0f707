"""When FusedLiteMLA fuses: the plan for every kind of submodule, and that each path computes what the modules would."""

# ruff: noqa: E501  (a table: one case, one line)
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from efficientvit_kernels import FusedLiteMLA, LiteMLA
from efficientvit_kernels.nn.conv import ConvLayer
from efficientvit_kernels.testing import native_calls
from tests.nn.test_lite_mla import image, pair

pytestmark = pytest.mark.usefixtures("one_thread")
timm_layers = pytest.importorskip("timm.models.efficientvit_mit", reason="timm is in the development extras")


class LoRA(nn.Module):
    """An adapter around a convolution: its output plus that of a low-rank one."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base = conv
        self.down = nn.Conv2d(conv.in_channels, 2, 1, bias=False, dtype=conv.weight.dtype)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False, dtype=conv.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Conv2dSubclass(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OfficialConvLayer(nn.Module):
    """The official ConvLayer's attributes and forward, filed under its name."""

    def __init__(self, layer: ConvLayer, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout, inplace=False) if dropout > 0 else None
        self.conv, self.norm, self.act = layer.conv, layer.norm, layer.act

    def forward(self, x: Tensor) -> Tensor:
        for module in (self.dropout, self.conv, self.norm, self.act):
            x = x if module is None else module(x)
        return x


OfficialConvLayer.__module__, OfficialConvLayer.__qualname__ = "efficientvit.models.nn.ops", "ConvLayer"


def set_official(m: Any, dropout: float = 0.0) -> None:
    m.qkv, m.proj = OfficialConvLayer(m.qkv, dropout), OfficialConvLayer(m.proj)


def set_timm(m: Any, dropout: float = 0.0) -> None:
    """timm's layers over the same parameters."""
    for name in ("qkv", "proj"):
        old = getattr(m, name)
        new = timm_layers.ConvNormAct(4, 4, 1, dropout=dropout, norm_layer=None, act_layer=None)
        new.conv = old.conv
        new.norm = nn.Identity() if old.norm is None else old.norm
        setattr(m, name, new)


def replace_conv(make: Callable[[nn.Conv2d], nn.Module], place: str) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        parent, _, key = place.rpartition(".")
        old = m.get_submodule(place)
        m.get_submodule(parent)._modules[key] = make(old)

    return change


def as_subclass(conv: nn.Conv2d) -> nn.Conv2d:
    new = Conv2dSubclass(conv.in_channels, conv.out_channels, 1, bias=False)
    new.weight = conv.weight
    return new


def dilated(conv: nn.Conv2d) -> nn.Conv2d:
    new = nn.Conv2d(conv.in_channels, conv.out_channels, 5, padding=4, dilation=2, groups=conv.groups, bias=False)
    new.weight = conv.weight
    return new


def reflecting(conv: nn.Conv2d) -> nn.Conv2d:
    new = copy.copy(conv)
    new.padding_mode = "reflect"
    return new


def own_forward(place: str) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        module = m.get_submodule(place)
        original = type(module).forward
        module.forward = lambda x: original(module, x) * 2

    return change


def hooked(place: str, kind: str = "forward") -> Callable[[Any], None]:
    def change(m: Any) -> None:
        module = m.get_submodule(place)
        if kind == "forward":
            module.register_forward_hook(lambda module, x, y: 2 * y)
        elif kind == "pre":
            module.register_forward_pre_hook(lambda module, x: (2 * x[0],))
        elif kind == "backward":
            module.register_full_backward_hook(lambda module, grad_in, grad_out: (2 * grad_in[0],))
        else:
            module.register_full_backward_pre_hook(lambda module, grad_out: (2 * grad_out[0],))

    return change


def parametrized(place: str) -> Callable[[Any], None]:
    return lambda m: torch.nn.utils.parametrizations.weight_norm(m.get_submodule(place))  # type: ignore[return-value]


def old_weight_norm(m: Any) -> None:
    torch.nn.utils.weight_norm(m.qkv.conv)


def pruned(m: Any) -> None:
    torch.manual_seed(3)
    prune.random_unstructured(m.aggreg[0][0], "weight", amount=0.5)


def one_bias(m: Any) -> None:
    m.aggreg[0][1].bias = nn.Parameter(torch.ones(m.aggreg[0][1].out_channels, dtype=m.qkv.conv.weight.dtype))


def nothing(m: Any) -> None:
    pass


AGGREGATION, ATTENTION = "aggregation and attention", "attention"
# What is done to a module (of constructor arguments), the path that is left, and the reason that is given.
CASES: list[tuple[str, dict[str, Any], Callable[[Any], None], str, str]] = [
    ("plain", {}, nothing, "whole", ""),
    ("no scales", {"scales": ()}, nothing, "whole", ""),
    ("scales", {"scales": (3, 5, 7)}, nothing, "whole", ""),
    ("biases", {"use_bias": True}, nothing, "whole", ""),
    ("bias in proj", {"use_bias": (False, True), "norm": None}, nothing, "whole", ""),
    ("proj_norm ln2d", {"norm": (None, "ln2d")}, nothing, "whole", ""),
    ("proj_act", {"act_func": (None, "hswish")}, nothing, "whole", ""),
    ("official layers", {}, set_official, "whole", ""),
    ("official layers with a dropout in eval mode", {}, lambda m: set_official(m, 0.5), "whole", ""),
    ("timm's layers", {}, set_timm, "whole", ""),
    ("timm's layers with a dropout in eval mode", {}, lambda m: set_timm(m, 0.5), "whole", ""),
    ("hook on proj.norm, which is called", {}, hooked("proj.norm"), "whole", ""),
    ("norm without an affine map", {}, lambda m: setattr(m.proj, "norm", nn.BatchNorm2d(32, affine=False).double()), "whole", ""),
    ("norm without running statistics", {}, lambda m: setattr(m.proj, "norm", nn.BatchNorm2d(32, track_running_stats=False).double()), "whole", ""),
    ("GroupNorm", {}, lambda m: setattr(m.proj, "norm", nn.GroupNorm(4, 32).double()), "whole", ""),
    ("qkv norm", {"norm": "bn2d"}, nothing, AGGREGATION, "qkv has a norm"),
    ("qkv act", {"act_func": ("silu", None)}, nothing, AGGREGATION, "qkv has an activation"),
    ("hook on qkv", {}, hooked("qkv"), AGGREGATION, "qkv has a forward hook"),
    ("hook on qkv.conv", {}, hooked("qkv.conv"), AGGREGATION, "qkv.conv has a forward hook"),
    ("pre-hook on proj", {}, hooked("proj", "pre"), AGGREGATION, "proj has a forward pre hook"),
    ("backward hook on proj.conv", {}, hooked("proj.conv", "backward"), AGGREGATION, "proj.conv has a backward hook"),
    ("backward pre-hook on qkv.conv", {}, hooked("qkv.conv", "backward pre"), AGGREGATION, "qkv.conv has a backward pre hook"),
    ("forward on qkv", {}, own_forward("qkv"), AGGREGATION, "qkv has a forward of its own"),
    ("forward on proj.conv", {}, own_forward("proj.conv"), AGGREGATION, "proj.conv has a forward of its own"),
    ("LoRA on qkv.conv", {}, replace_conv(LoRA, "qkv.conv"), AGGREGATION, "qkv.conv is a LoRA"),
    ("LoRA on proj", {}, replace_conv(lambda layer: nn.Sequential(layer, nn.Identity()), "proj"), AGGREGATION, "proj is a Sequential"),
    ("weight norm on proj.conv", {}, parametrized("proj.conv"), AGGREGATION, "proj.conv is a ParametrizedConv2d"),
    ("old weight norm", {}, old_weight_norm, AGGREGATION, "qkv.conv has a forward pre hook"),
    ("subclass of Conv2d", {}, replace_conv(as_subclass, "qkv.conv"), AGGREGATION, "qkv.conv is a Conv2dSubclass"),
    ("one submodule more in qkv", {}, lambda m: setattr(m.qkv, "gate", nn.Identity()), AGGREGATION, "qkv has submodules or parameters of its own"),
    ("hook on aggreg", {}, hooked("aggreg.0"), ATTENTION, "aggreg.0 has a forward hook"),
    ("hook on a depthwise conv", {}, hooked("aggreg.0.0"), ATTENTION, "aggreg.0.0 has a forward hook"),
    ("pre-hook on a pointwise conv", {"scales": (3, 5)}, hooked("aggreg.1.1", "pre"), ATTENTION, "aggreg.1.1 has a forward pre hook"),
    ("LoRA on aggreg", {}, replace_conv(LoRA, "aggreg.0.1"), ATTENTION, "aggreg.0.1 is a LoRA"),
    ("weight norm on aggreg", {}, parametrized("aggreg.0.0"), ATTENTION, "aggreg.0.0 is a ParametrizedConv2d"),
    ("pruned", {}, pruned, ATTENTION, "aggreg.0.0 has a forward pre hook"),
    ("dilated", {}, replace_conv(dilated, "aggreg.0.0"), ATTENTION, "aggreg.0.0 has a stride, dilation or padding mode of its own"),
    ("reflecting", {}, replace_conv(reflecting, "aggreg.0.0"), ATTENTION, "aggreg.0.0 has a stride, dilation or padding mode of its own"),
    ("dense pointwise conv", {}, replace_conv(lambda c: nn.Conv2d(96, 96, 1, bias=False).double(), "aggreg.0.1"), ATTENTION, "aggreg.0.1 is no 1 x 1 convolution in groups of dim"),
    ("dense spatial conv", {}, replace_conv(lambda c: nn.Conv2d(96, 96, 3, padding=1, bias=False).double(), "aggreg.0.0"), ATTENTION, "aggreg.0.0 is no depthwise convolution that keeps the size"),
    ("a third step in aggreg", {}, lambda m: m.aggreg[0].append(nn.ReLU()), ATTENTION, "aggreg.0 is no nn.Sequential of two convolutions"),
    ("one bias of two", {}, one_bias, ATTENTION, "aggreg.0 has a bias where another convolution of aggreg has none"),
    ("another kernel function", {"kernel_func": "gelu"}, nothing, "none", "the kernel function is GELU"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_plan_and_numbers(case: tuple[str, dict[str, Any], Callable[[Any], None], str, str], train: bool) -> None:
    """The plan that is expected, and, on that path, the outputs and gradients of the submodules when called."""
    name, kwargs, change, path, reason = case
    if train and "dropout in eval mode" in name:
        pytest.skip("an active dropout draws random numbers; test_active_dropout looks at it")
    results = []
    for module in pair(**kwargs):
        module.double()
        torch.manual_seed(1)
        change(module)
        module.train(train)
        x = image().double().requires_grad_()
        before = native_calls()
        y = module(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
        calls = native_calls() - before
        results.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    plan = module.fusion_plan()
    assert (plan.path, plan.reason) == (path, reason)
    assert calls == {"whole": 2, AGGREGATION: 4, ATTENTION: 2, "none": 0}[path]
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours.double(), theirs.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("set_layers", [set_official, set_timm])
def test_active_dropout(set_layers: Callable[[Any, float], None]) -> None:
    _, fused = pair()
    set_layers(fused, 0.5)
    fused.train()
    assert str(fused.fusion_plan()) == "aggregation and attention only: qkv has a dropout"
    fused.qkv.dropout.eval()
    fused.proj.dropout = None
    assert str(fused.fusion_plan()) == "whole"


def test_hooks_come_and_go() -> None:
    """The plan is made at every call."""
    _, fused = pair()
    seen: list[str] = []
    handle = fused.qkv.conv.register_forward_hook(lambda *_: seen.append("qkv"))
    before = native_calls()
    fused(image())
    assert seen == ["qkv"]
    assert native_calls() - before == 2
    handle.remove()
    fused(image())
    assert seen == ["qkv"]
    assert native_calls() - before == 3


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_for_all_modules(register: str) -> None:
    _, fused = pair()
    seen: list[str] = []
    handle = getattr(nn.modules.module, f"register_module_{register}")(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        assert str(fused.fusion_plan()) == "attention only: a hook is registered for all modules"
        fused(image().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 4
    assert str(fused.fusion_plan()) == "whole"


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_sync_batch_norm_is_called(train: bool) -> None:
    """It is no nn.BatchNorm2d, so it is never folded."""
    _, fused = pair()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(fused))
    assert type(converted.proj.norm) is nn.SyncBatchNorm
    called: list[nn.Module] = []
    converted.proj.norm.register_forward_hook(lambda module, *_: called.append(module))
    assert torch.allclose(converted.train(train)(image()), fused.train(train)(image()), rtol=1e-5, atol=1e-6)
    assert called == [converted.proj.norm]


def test_quantised_weights_are_not_read() -> None:
    """A tensor subclass computes its own convolution."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    _, fused = pair()
    weight = fused.qkv.conv.weight.detach()
    fused.qkv.conv.weight = nn.Parameter(two_tensor(weight, weight.clone()), requires_grad=False)
    assert fused.fusion_plan().reason == "qkv.conv has a weight of type TwoTensor"


def test_shared_aggregation() -> None:
    """One aggregation module in two places is two scales."""
    module, fused = pair(scales=(5, 5))
    for m in (module, fused):
        m.aggreg[1] = m.aggreg[0]
    assert fused.fusion_plan().path == "whole"
    assert torch.allclose(fused(image()), module(image()), rtol=1e-4, atol=1e-5)


def test_own_forward_of_the_reference_module_is_untouched() -> None:
    """LiteMLA itself calls its submodules, whatever they are."""
    module, _ = pair()
    before = native_calls()
    module(image())
    assert native_calls() == before
    assert type(module) is LiteMLA
    assert not hasattr(module, "fusion_plan")


def test_backend_reference_takes_the_same_path() -> None:
    _, fused = pair()
    expected = fused(image())
    slow = FusedLiteMLA.from_module(fused, "reference")
    before = native_calls()
    assert torch.allclose(slow(image()), expected, rtol=1e-4, atol=1e-5)
    assert native_calls() == before
    assert str(slow.fusion_plan()) == "whole"
