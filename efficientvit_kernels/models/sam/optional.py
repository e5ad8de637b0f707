"""Optional packages, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, user: str) -> Any:
    """The module, or an ImportError that says what `user` lacks and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"PIL": "pillow"}.get(module.split(".")[0], module.split(".")[0])
        raise ImportError(f"{user} needs {package}, which cannot be imported: pip install {package}") from error
