"""Which backend serves a call. `why_not` is the only judge: "auto" skips on its answer, a named backend raises it, and
`info()` prints it."""

from __future__ import annotations

from .. import _library

# The fastest first. "auto" takes the first that can run; interpreted Triton is never among them.
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
DEVICE_OF_BACKEND = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


def why_not(backend: str, device_type: str | None) -> str | None:
    """Why `backend` cannot serve tensors on a device of this type (None: on any device); None if it can."""
    if backend == "reference":
        return None
    missing = {"cpu": _library.WHY_NOT_CPU, "triton": _library.WHY_NOT_TRITON, "cuda": _library.WHY_NOT_CUDA}[backend]
    if missing is None and device_type not in (None, DEVICE_OF_BACKEND[backend]):
        return f"it needs {DEVICE_OF_BACKEND[backend].upper()} tensors, these are on {device_type}"
    return missing


def check_backend(op: str, backend: str, device_type: str | None = None) -> None:
    """Raises unless `backend` is "auto" or one that can serve tensors on this type of device (None: on any device)."""
    if backend == "auto":
        return
    if backend not in _library.BACKENDS:
        expected = ", ".join(repr(name) for name in ("auto", *_library.BACKENDS))
        raise ValueError(f"{op}: backend must be one of {expected}, got {backend!r}")
    reason = why_not(backend, device_type)
    if reason is not None:
        raise NotImplementedError(f"{op}: backend must be one that can run here, got {backend!r}: {reason}")


def choose(op: str, backend: str, device_type: str) -> str:
    """The backend that runs, from metadata alone. A named backend runs or raises; it never falls back."""
    if backend == "auto":
        backend = _library.DEFAULT_BACKEND
    if backend == "auto":
        for candidate in PREFERENCE.get(device_type, ()):
            if why_not(candidate, device_type) is None:
                return candidate
        return "reference"
    check_backend(op, backend, device_type)
    return backend
