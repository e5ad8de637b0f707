"""The EfficientViT family: backbones and models with the official names, keys and numbers; imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbones import create_backbone as create_backbone
    from .registry import create_model as create_model
    from .registry import list_models as list_models

_HOME = {"create_backbone": ".backbones", "create_model": ".registry", "list_models": ".registry"}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
