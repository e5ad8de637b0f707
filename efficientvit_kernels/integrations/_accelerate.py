"""accelerate and restore: one line that puts the fused modules into a model, and one that takes them out again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..nn import FusedLiteMLA
from ..nn.hosts import LITE_MLA_CLASSES, class_name, why_not_lite_mla
from ..ops._backends import check_backend
from ..ops._checks import check_bool

# A plain attribute, not a registered submodule: the original must not show up in keys, parameters or modules().
ORIGINAL = "_original_module"
ADDED = (ORIGINAL, "backend", "recompute")


@dataclass(frozen=True)
class Swapped:
    """A module that now runs fused: its name in the model, the class that it had, and how much of it is fused (as
    `FusedLiteMLA.fusion_plan` says at this moment)."""

    name: str
    source: str
    plan: str


@dataclass(frozen=True)
class Left:
    """A module that looks like attention of ours and was left as it is: its name, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `accelerate` did to a model."""

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} module(s) fused, {len(self.left)} left as they are"]
        lines += [f"  fused  {swap.name}  {swap.plan}  (was {swap.source})" for swap in self.swapped]
        lines += [f"  left   {left.name}  (it {left.reason})" for left in self.left]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Place:
    """One entry of a parent's submodules. A module shared by two parents has two places."""

    parent: nn.Module
    key: str
    name: str
    module: nn.Module


def accelerate(model: nn.Module, backend: str = "auto", *, recompute: bool = False) -> Report:
    """Replaces every LiteMLA in `model` by a `FusedLiteMLA` over the same parameters, in place.

    Known are the LiteMLA of this package, of the official repository and of timm (whose eps of 1e-5 is kept).
    Parameters, state-dict keys, hooks, train or eval mode and the order of submodules stay as they are; optimizers
    stay valid. Calling it again changes nothing but the backend and recompute. Call it before torch.compile.

    Args:
        model: the model that contains the modules. For a model that is itself a LiteMLA: `FusedLiteMLA.from_module`.
        backend: of the fused modules; see `efficientvit_kernels.relu_linear_attention`.
        recompute: of the fused modules: save their input alone for the backward.

    Returns:
        A `Report`: what was swapped, and how much of each is fused; what was left, and why (subclasses, look-alikes,
        other kernel functions).

    Raises:
        TypeError: `model` is no module, or recompute no bool.
        ValueError: `model` is itself a LiteMLA, which has no parent to be replaced in; or an unknown backend.
        NotImplementedError: the named backend cannot run here.
        Whenever it raises, nothing has been changed.
    """
    _check_model("accelerate", model)
    check_backend("accelerate", backend)
    check_bool("accelerate", "recompute", recompute)
    if class_name(model) in LITE_MLA_CLASSES:
        raise ValueError(
            f"accelerate: model must be a module that contains LiteMLA modules, got a {class_name(model)}; "
            "use FusedLiteMLA.from_module for a single one"
        )
    fused: dict[nn.Module, FusedLiteMLA] = {}
    swaps: list[_Place] = []
    swapped: list[Swapped] = []
    left: list[Left] = []
    for place in _places(model):
        module = place.module
        if ORIGINAL in module.__dict__:
            fused[module] = module  # type: ignore[assignment]  # one of ours from an earlier call
            swapped.append(_swapped(place, fused[module], module.__dict__[ORIGINAL]))
        elif isinstance(module, FusedLiteMLA) and type(module) is FusedLiteMLA:
            left.append(Left(place.name, "is a FusedLiteMLA already"))
        elif (reason := why_not_lite_mla(module)) is None:
            if module not in fused:
                fused[module] = FusedLiteMLA.from_module(module, backend, recompute=recompute)
                fused[module].__dict__[ORIGINAL] = module
            swaps.append(place)
            swapped.append(_swapped(place, fused[module], module))
        elif _looks_like_lite_mla(module):
            left.append(Left(place.name, reason))
    for place in swaps:  # nothing above has changed the model, nothing below can fail
        place.parent._modules[place.key] = fused[place.module]
    for replacement in fused.values():
        replacement.backend, replacement.recompute = backend, recompute
    return Report(tuple(swapped), tuple(left))


def restore(model: nn.Module) -> list[str]:
    """Puts the modules back that `accelerate` replaced, the very objects, and returns their names.

    Train or eval mode, hooks and submodules that changed in the meantime stay changed.

    Raises:
        TypeError: `model` is no module.
        ValueError: `model` is itself a module that `accelerate` put into a larger model.
    """
    _check_model("restore", model)
    if ORIGINAL in model.__dict__:
        raise ValueError("restore: model must be the model that was accelerated, got one of its fused modules")
    names = []
    for place in _places(model):
        original = place.module.__dict__.get(ORIGINAL)
        if original is None:
            continue
        changed = {key: value for key, value in place.module.__dict__.items() if key not in ADDED}
        original.__dict__.update(changed)
        place.parent._modules[place.key] = original
        names.append(place.name)
    return names


def _swapped(place: _Place, fused: FusedLiteMLA, original: nn.Module) -> Swapped:
    return Swapped(place.name, class_name(original), str(fused.fusion_plan()))


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _places(model: nn.Module) -> Iterator[_Place]:
    """Every registered submodule with its parent, once per parent. The caller may replace them meanwhile."""
    parents = list(model.named_modules())  # each parent once, even if it is shared
    for prefix, parent in parents:
        for key, module in list(parent._modules.items()):
            if module is not None:
                yield _Place(parent, key, f"{prefix}.{key}" if prefix else key, module)


def _looks_like_lite_mla(module: nn.Module) -> bool:
    """By class name, base class or the name that TorchScript keeps: worth a line in the report."""
    names = [cls.__name__ for cls in type(module).__mro__] + [str(getattr(module, "original_name", ""))]
    return any("LiteMLA" in name for name in names)
