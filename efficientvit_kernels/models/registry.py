"""All models by their official names."""

from __future__ import annotations

import difflib
import importlib
import os
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

# name -> (module beside this one, its function (name, attention, **options) -> model); imported when it is asked for.
MODELS: dict[str, tuple[str, str]] = {
    **{f"efficientvit-{size}": ("classification", "create_cls") for size in ("b0", "b1", "b2", "b3", "l1", "l2", "l3")},
    **{
        f"efficientvit-seg-{size}-cityscapes": ("segmentation", "create_seg")
        for size in ("b0", "b1", "b2", "b3", "l1", "l2")
    },
    **{f"efficientvit-seg-{size}-ade20k": ("segmentation", "create_seg") for size in ("b1", "b2", "b3", "l1", "l2")},
    **{f"efficientvit-sam-{size}": ("sam.build", "create_sam") for size in ("l0", "l1", "l2", "xl0", "xl1")},
    **{
        f"dc-ae-{latent}-{data}-1.0": ("dc_ae", "create_dc_ae")
        for latent in ("f32c32", "f64c128", "f128c512")
        for data in ("in", "mix")
    },
    "dc-ae-f32c32-sana-1.0": ("dc_ae", "create_dc_ae"),
    **{f"efficientvit-sr-{width}": ("super_resolution", "create_sr") for width in ("w0.75", "w1.0")},
}

# Resolutions that there are official checkpoints of; "efficientvit-b1-r288" is the model "efficientvit-b1".
RESOLUTIONS: dict[str, tuple[int, ...]] = {
    "efficientvit-b0": (224,),
    "efficientvit-b1": (224, 256, 288),
    "efficientvit-b2": (224, 256, 288),
    "efficientvit-b3": (224, 256, 288),
    "efficientvit-l1": (224,),
    "efficientvit-l2": (224, 256, 288, 320, 384),
    "efficientvit-l3": (224, 256, 288, 320, 384),
}
_WITH_RESOLUTION = {f"{name}-r{side}": name for name, sides in RESOLUTIONS.items() for side in sides}


def create_model(
    name: str, weights: str | os.PathLike[str] | None = None, attention: str = "fused", **options: Any
) -> nn.Module:
    """A model by its official name, in training mode as torch makes it; call `.eval()` for inference.

    Args:
        name: one of `list_models()`; for classifiers also with the resolution of a checkpoint ("efficientvit-b1-r288"),
            which makes the same model.
        weights: a checkpoint to load strictly: the path of a .pt or .safetensors file, or
            "hf://organisation/repository/file". Without it torch's default initialisation.
        attention: "fused" (the kernels) or "reference" (plain torch); both have the same state-dict keys.
        options: of the kind of model, such as n_classes of classifiers and segmentation models.

    Raises:
        ValueError: unknown name (with those that are close) or attention.
        CheckpointError: the checkpoint is not one of this model.
    """
    if not isinstance(name, str):
        raise TypeError(f"create_model: name must be a str, got {type(name).__name__}")
    base = _WITH_RESOLUTION.get(name, name)
    if base not in MODELS:
        raise ValueError(f"create_model: name must be one of list_models(), got {name!r}{_close_to(name)}")
    module, builder = MODELS[base]
    model: nn.Module = getattr(importlib.import_module(f".{module}", __package__), builder)(base, attention, **options)
    if weights is not None:
        from .checkpoint import load_weights

        load_weights(model, weights)
    return model


def _close_to(name: str) -> str:
    base = name.lower().rpartition("-r")[0]
    if base in RESOLUTIONS:
        close = [f"{base}-r{side}" for side in RESOLUTIONS[base]]
    else:
        close = difflib.get_close_matches(name.lower(), [*MODELS, *_WITH_RESOLUTION], n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` takes and that match the shell-style `pattern`, such as "efficientvit-seg-*"."""
    return [name for name in MODELS if fnmatchcase(name, pattern)]
