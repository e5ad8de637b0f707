"""Times the candidates of the configuration tables, where the tables offer any; the tables are edited by hand."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.gpu.parts import Context, NotRunError, Step

TABLE = "efficientvit_kernels.triton_kernels.configs"


def steps(context: Context) -> list[Step]:
    return [Step("candidates", time_candidates)]


def time_candidates(context: Context) -> dict[str, Any]:
    try:
        table: Any = importlib.import_module(TABLE)
    except ImportError as error:
        raise NotRunError(f"no configuration table: {error}") from error
    if not hasattr(table, "candidates"):
        raise NotRunError(f"{TABLE} offers no candidates")
    raise NotRunError(f"{TABLE}.candidates is not known to this part, which does not measure it yet")
