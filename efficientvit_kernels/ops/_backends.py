"""Which backend serves a call. `why_not` is the only judge: "auto" skips on its answer, a named backend raises it, and
`info()` prints it."""

from __future__ import annotations

from typing import Any

import torch

from .. import _library
from ..triton_kernels.configs import MAX_HEAD_DIM  # numbers alone: Triton is not imported

# The fastest first. "auto" takes the first that can run; interpreted Triton is never among them.
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
DEVICE_OF_BACKEND = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


def why_not(
    backend: str, device_type: str | None, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> str | None:
    """Why `backend` cannot serve such tensors; None if it can. What is None is not asked about."""
    if backend == "reference":
        return None
    missing = {"cpu": _library.WHY_NOT_CPU, "triton": _library.WHY_NOT_TRITON, "cuda": _library.WHY_NOT_CUDA}[backend]
    if missing is not None:
        return missing
    interpreted = backend == "triton" and device_type == "cpu" and _library.TRITON_INTERPRETED
    if device_type not in (None, DEVICE_OF_BACKEND[backend]) and not interpreted:
        return f"it needs {DEVICE_OF_BACKEND[backend].upper()} tensors, these are on {device_type}"
    return _why_not_triton(device_type, dtype, head_dim) if backend == "triton" else None


def _why_not_triton(device_type: str | None, dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    if dtype == torch.float64:
        return "it has no float64 kernels"
    if head_dim is not None and head_dim > MAX_HEAD_DIM:
        return f"it serves head_dim up to {MAX_HEAD_DIM}, got {head_dim}"
    return None if device_type is None else _library.why_not_run_triton(device_type)


def check_backend(
    op: str,
    backend: str,
    device_type: str | None = None,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> None:
    """Raises unless `backend` is "auto" or one that can serve such tensors; see `why_not`."""
    if backend == "auto":
        return
    if backend not in _library.BACKENDS:
        expected = ", ".join(repr(name) for name in ("auto", *_library.BACKENDS))
        raise ValueError(f"{op}: backend must be one of {expected}, got {backend!r}")
    reason = why_not(backend, device_type, dtype, head_dim)
    if reason is not None:
        raise NotImplementedError(f"{op}: backend must be one that can run here, got {backend!r}: {reason}")


def choose(
    op: str, backend: str, device_type: str, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> str:
    """The backend that runs, from metadata alone. A named backend runs or raises; it never falls back."""
    if backend == "auto":
        backend = _library.DEFAULT_BACKEND
    if backend == "auto":
        for candidate in PREFERENCE.get(device_type, ()):
            if why_not(candidate, device_type, dtype, head_dim) is None:
                return candidate
        return "reference"
    check_backend(op, backend, device_type, dtype, head_dim)
    return backend


def registered(op: str, stage: str, backend: str) -> Any:
    """The registered op behind a backend: the native one for "cpu" and "cuda", where torch's dispatcher picks by
    device, or Triton's. `stage`: "fwd" or "bwd"."""
    suffix = "_triton" if backend == "triton" else ""
    return getattr(torch.ops.efficientvit_kernels, f"{op}_{stage}{suffix}").default
