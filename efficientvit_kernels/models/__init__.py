"""The EfficientViT family: backbones and models with the official names, keys and numbers; imported on first use.

`registry`: names to models. `backbones`: B0-B3, L0-L3, XL0, XL1. `blocks`: every block that they and the heads share.
`classification`, `segmentation`, `sam`, `dc_ae`, `super_resolution`: heads, configurations, one builder each.
`checkpoint`, `convert`: weights in files, keys of other libraries. `training`: initialisation and stochastic depth.
LiteMLA and its fused form, ConvLayer, norms and activations are in `efficientvit_kernels.nn`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .backbones import create_backbone as create_backbone
    from .checkpoint import CheckpointError as CheckpointError
    from .checkpoint import load_weights as load_weights
    from .checkpoint import read_state_dict as read_state_dict
    from .checkpoint import save_weights as save_weights
    from .registry import create_model as create_model
    from .registry import list_models as list_models

_HOMES = {
    "CheckpointError": ".checkpoint",
    "create_backbone": ".backbones",
    "create_model": ".registry",
    "list_models": ".registry",
    "load_weights": ".checkpoint",
    "read_state_dict": ".checkpoint",
    "save_weights": ".checkpoint",
}
__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
