"""Fused multi-scale linear attention (LiteMLA) for EfficientViT and its relatives.

Everything is imported on first use: importing this package loads neither triton nor a native library and leaves CUDA
untouched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import models as models
    from ._info import info as info
    from .integrations import Report as Report
    from .integrations import accelerate as accelerate
    from .integrations import restore as restore
    from .nn import FusedLiteMLA as FusedLiteMLA
    from .nn import LiteMLA as LiteMLA
    from .ops.lite_mla import lite_mla as lite_mla
    from .ops.multiscale_aggregate import multiscale_aggregate as multiscale_aggregate
    from .ops.relu_linear_attention import relu_linear_attention as relu_linear_attention

__version__ = "0.1.0"

_HOME = {
    "FusedLiteMLA": ".nn",
    "LiteMLA": ".nn",
    "Report": ".integrations",
    "accelerate": ".integrations",
    "info": "._info",
    "lite_mla": ".ops",
    "multiscale_aggregate": ".ops",
    "relu_linear_attention": ".ops",
    "restore": ".integrations",
}
_SUBMODULES = ("models",)
__all__ = sorted([*_HOME, *_SUBMODULES])


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
