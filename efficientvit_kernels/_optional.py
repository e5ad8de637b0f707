"""Optional packages, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

PACKAGES = {"PIL": "pillow"}  # where the package has another name than its module


def require(module: str, user: str) -> Any:
    """The module, or an ImportError that says what `user` lacks and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.split(".")[0]
        package = PACKAGES.get(top, top)
        raise ImportError(f"{user} needs {package}, which cannot be imported: pip install {package}") from error
