"""Which backend serves a call. `why_not` is the only judge: "auto" skips on its answer, a named backend raises it, and
`info()` prints it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import _library
from ..triton_kernels.configs import MAX_HEAD_DIM  # numbers alone: Triton is not imported

# The fastest first. "auto" takes the first that can run; interpreted Triton is never among them. On a GPU no times are
# known yet: the CUDA kernels take fewer launches (one for all scales).
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
DEVICE_OF_BACKEND = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
OPS = ("relu_linear_attention", "multiscale_aggregate", "lite_mla")
CUDA_HEAD_DIMS = (8, 16, 32, 64)
CUDA_KERNEL_SIZES = (3, 5, 7)


def why_not(
    backend: str,
    device_type: str | None,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    kernel_sizes: Sequence[int] = (),
) -> str | None:
    """Why `backend` cannot serve such tensors; None if it can. What is None is not asked about."""
    if backend == "reference":
        return None
    emulated = {"triton": _library.TRITON_INTERPRETED, "cuda": _library.CUDA_EMULATED}.get(backend, False)
    missing = {"cpu": _library.WHY_NOT_CPU, "triton": _library.WHY_NOT_TRITON, "cuda": _library.WHY_NOT_CUDA}[backend]
    if missing is not None and not (emulated and backend == "cuda"):
        return missing
    if device_type not in (None, DEVICE_OF_BACKEND[backend]) and not (emulated and device_type == "cpu"):
        return f"it needs {DEVICE_OF_BACKEND[backend].upper()} tensors, these are on {device_type}"
    if backend == "cuda":
        return _why_not_cuda(device_type, dtype, head_dim, kernel_sizes)
    return _why_not_triton(device_type, dtype, head_dim) if backend == "triton" else None


def _why_not_cuda(
    device_type: str | None, dtype: torch.dtype | None, head_dim: int | None, kernel_sizes: Sequence[int]
) -> str | None:
    if dtype == torch.float64:
        return "it has no float64 kernels"
    if head_dim is not None and head_dim not in CUDA_HEAD_DIMS:
        return f"it serves head_dim {', '.join(map(str, CUDA_HEAD_DIMS))}, got {head_dim}"
    for size in kernel_sizes:
        if size not in CUDA_KERNEL_SIZES:
            return f"it serves depthwise kernels of size {', '.join(map(str, CUDA_KERNEL_SIZES))}, got {size}"
    return None if device_type is None else _library.why_not_run_cuda(device_type)


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
    kernel_sizes: Sequence[int] = (),
) -> None:
    """Raises unless `backend` is "auto" or one that can serve such tensors; see `why_not`."""
    if backend == "auto":
        return
    if backend not in _library.BACKENDS:
        expected = ", ".join(repr(name) for name in ("auto", *_library.BACKENDS))
        raise ValueError(f"{op}: backend must be one of {expected}, got {backend!r}")
    reason = why_not(backend, device_type, dtype, head_dim, kernel_sizes)
    if reason is not None:
        raise NotImplementedError(f"{op}: backend must be one that can run here, got {backend!r}: {reason}")


def choose(
    op: str,
    backend: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    kernel_sizes: Sequence[int] = (),
) -> str:
    """The backend that runs, from metadata alone. A named backend runs or raises; it never falls back."""
    if backend == "auto":
        backend = _library.DEFAULT_BACKEND
    if backend == "auto":
        for candidate in PREFERENCE.get(device_type, ()):
            if why_not(candidate, device_type, dtype, head_dim, kernel_sizes) is None:
                return candidate
        return "reference"
    check_backend(op, backend, device_type, dtype, head_dim, kernel_sizes)
    return backend


def registered(op: str, stage: str, backend: str) -> Any:
    """The registered op behind a backend: the native one for "cpu" and "cuda", where torch's dispatcher picks by
    device, or one written in Python. `stage`: "fwd" or "bwd"."""
    if backend == "triton" or (backend == "cuda" and op == "lite_mla"):
        return getattr(torch.ops.efficientvit_kernels, f"{op}_{stage}_{backend}").default
    emulated = backend == "cuda" and _library.CUDA_EMULATED
    ops = torch.ops.efficientvit_kernels_emulated if emulated else torch.ops.efficientvit_kernels
    return getattr(ops, f"{op}_{stage}").default
