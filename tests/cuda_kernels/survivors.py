"""Mutants of the CUDA kernels that no test finds, with the reasons."""

from __future__ import annotations

SURVIVORS: dict[str, dict[str, str]] = {}
