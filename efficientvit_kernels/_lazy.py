"""Public names that are imported on first use, so that importing a package costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], needs: str | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public names live in its submodules.

    Args:
        package: the package's `__name__`.
        homes: name -> submodule, such as ".registry"; a name that is its submodule's, as in {"models": ".models"}, is
            the submodule itself. Type checkers read the same from imports under TYPE_CHECKING.
        needs: an optional package that the submodules import at their top; where it is missing the error says how to
            install it.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if needs is not None:
            from ._optional import require

            require(needs, name)
        module = importlib.import_module(homes[name], package)
        value = module if homes[name] == f".{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
