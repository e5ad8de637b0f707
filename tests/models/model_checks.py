"""Checks that hold for every model on a backbone: goldens, sizes, 16 bits, autocast, layouts, training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from efficientvit_kernels import LiteMLA
from efficientvit_kernels.testing import native_calls
from tests.models.golden_models import (
    compare,
    golden_image,
    golden_sizes,
    load_golden,
    manifest,
    state_entries,
    summary,
)

Build = Callable[[str], nn.Module]  # of the attention's name
ATTENTIONS = ("fused", "reference")

# float64 against the float64 of the official code: it catches what the float32 tolerance lets pass, such as an eps of
# 1e-6 in place of 1e-7. Up to a few hundred roundings of 1e-16 in a row.
TOLERANCE_64 = 1e-12
# Root mean square of the error over the tensor's standard deviation. A rounding is off by up to eps / 2 of the value,
# and those of the 20 to 60 layers add up like their square root: 4 eps, 3.9e-3 and 3.1e-2. The most that was measured
# is 1.8e-3 and 1.2e-2.
RMS_16_BITS = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def on_meta(build: Build, attention: str = "fused") -> nn.Module:
    """Without memory, and without the time that initialisation takes."""
    with torch.device("meta"):
        return build(attention)


def golden_model(build: Build, name: str, attention: str = "fused") -> nn.Module:
    return load_golden(on_meta(build, attention), name)


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What one forward gives: the features of all stages, and "out" where the model is more than a backbone."""
    seen: dict[str, Tensor] = {}
    backbone: Any = getattr(model, "backbone", model)
    hook = backbone.register_forward_hook(lambda module, inputs, features: seen.update(features))
    with torch.no_grad():
        out = model(x)
    hook.remove()
    assert seen.pop("input") is x
    last = seen.pop("stage_final")
    assert last is seen[f"stage{len(seen) - 1}"]
    return seen if isinstance(out, dict) else {**seen, "out": out}


def final(model: nn.Module, x: Tensor) -> Tensor:
    """The output, or the deepest feature of a backbone."""
    out = model(x)
    return out["stage_final"] if isinstance(out, dict) else out  # type: ignore[no-any-return]


def check_state_and_size(build: Build, name: str) -> None:
    """Keys, shapes and dtypes in the official order; parameters, buffers and eps as in the official model."""
    norms = (nn.BatchNorm2d, nn.LayerNorm)
    for attention in ATTENTIONS:
        model, facts = on_meta(build, attention), summary(name)
        assert state_entries(model) == manifest(name)
        assert sum(p.numel() for p in model.parameters()) == facts["params"]
        assert sum(b.numel() for b in model.buffers()) == facts["buffers"]
        assert {type(m).__name__: m.eps for m in model.modules() if isinstance(m, norms)} == facts["norm_eps"]
        assert {m.eps for m in model.modules() if isinstance(m, LiteMLA)} == {1e-15}


def check_macs(build: Build, name: str) -> None:
    """Multiply-accumulates of convolutions and matrix products, on the reference attention, where they are counted.

    The official attention has sum_m k_m as a further row of its product v k^T, where ours is a plain sum: that many are
    added here, N for each of its D * heads * (1 + S) channels.
    """
    model = on_meta(build, "reference").eval()
    sums = []
    for module in model.modules():
        if isinstance(module, LiteMLA):
            module.register_forward_hook(lambda m, x, y: sums.append(m.proj.conv.in_channels * y[0, 0].numel()))
    sizes = summary(name)["macs"]
    for size in dict.fromkeys((min(sizes), max(sizes))):
        height, width = map(int, size.split("x"))
        sums.clear()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, height, width, device="meta"))
        assert counter.get_total_flops() // 2 + sum(sums) == sizes[size], size


def check_golden(build: Build, name: str, dtype: torch.dtype = torch.float32) -> None:
    """Every stored tensor for every input size (float64: the first), with both attentions, and on the kernels."""
    fused = golden_model(build, name).to(dtype)
    reference = on_meta(build, "reference").eval()
    reference.load_state_dict(fused.state_dict(), assign=True)
    count = sum(isinstance(module, LiteMLA) for module in fused.modules())
    sizes = golden_sizes(name)[: 1 if dtype == torch.float64 else None]
    for attention, model in (("fused", fused), ("reference", reference)):
        for height, width in sizes:
            before = native_calls()
            results = outputs(model, golden_image(height, width).to(dtype))
            assert native_calls() - before == (count if attention == "fused" else 0)
            tolerance = {"tolerance": TOLERANCE_64} if dtype == torch.float64 else {}
            compare(name, f"{height}x{width}", results, **tolerance)


def check_16_bits(build: Build, name: str, dtype: torch.dtype) -> None:
    """Pure 16 bits (weights and input) and CPU autocast against float32; the outputs have the 16-bit dtype."""
    x = golden_image(96, 160, batch=2)
    model, reference = golden_model(build, name), golden_model(build, name, "reference")
    expected = outputs(model, x)
    with torch.autocast("cpu", dtype):
        autocast, autocast_reference = outputs(model, x), outputs(reference, x)
    pure = outputs(model.to(dtype), x.to(dtype))
    for key, value in expected.items():
        kinds = {"autocast": autocast[key], "autocast, reference": autocast_reference[key], "pure": pure[key]}
        for kind, result in kinds.items():
            assert result.dtype == dtype
            error = (result.double() - value.double()).square().mean().sqrt() / value.double().std()
            assert error <= RMS_16_BITS[dtype], f"{kind} {key}: {error:.2e}"


def check_channels_last(build: Build, name: str) -> None:
    """No convolution or norm sees another layout, no feature has one, and the numbers are those of NCHW."""
    x = golden_image(96, 160, batch=2)
    model = golden_model(build, name)
    expected = outputs(model, x)
    model.to(memory_format=torch.channels_last)
    copies: list[str] = []

    def look(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for tensor in (inputs[0], output):
                if not is_channels_last(tensor):
                    copies.append(path)

        return hook

    for path, module in model.named_modules():
        # Not inside a LiteMLA: a hook there would keep the block from being fused.
        inside = ".context_module.main." in path
        if not inside and isinstance(module, (nn.Conv2d, nn.BatchNorm2d, LiteMLA)):
            module.register_forward_hook(look(path))
    results = outputs(model, x.to(memory_format=torch.channels_last))
    assert not copies
    for key, value in results.items():
        assert value.dim() != 4 or is_channels_last(value), key
        # Two float32 runs, each as near to float64 as the golden tolerance says.
        torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-5 * float(expected[key].std()))


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def check_batch_0(build: Build, name: str) -> None:
    model = golden_model(build, name)
    some, none = outputs(model, golden_image(64, 32, batch=2)), outputs(model, golden_image(64, 32, batch=0))
    assert {key: value.shape for key, value in none.items()} == {
        key: torch.Size([0, *value.shape[1:]]) for key, value in some.items()
    }


def check_training(build: Build, name: str) -> None:
    """One step in training mode: both attentions give the same finite gradients for all parameters."""
    x = golden_image(64, 96, batch=2)
    gradients = []
    for attention in ATTENTIONS:
        model = golden_model(build, name, attention).double().train()
        final(model, x.double()).square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        assert all(bool(b.isfinite().all()) for b in model.buffers())
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    fused, reference = gradients
    scale = max(float(g.abs().max()) for g in reference.values() if g is not None)
    for key, gradient in reference.items():
        # float64: sums of up to 1e5 products in another order, through a hundred layers.
        assert torch.allclose(fused[key], gradient, rtol=1e-6, atol=1e-10 * scale), key
