"""What this installation can do here: versions, devices, and which backend serves which op, or why not."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import __version__, _library
from .ops._backends import DEVICE_OF_BACKEND, OPS, choose, why_not


@dataclass(frozen=True)
class Info:
    """Result of `info()`; print it, or take `as_dict()` for JSON."""

    versions: dict[str, str | None]
    devices: dict[str, str]
    cpu_instruction_set: str | None
    threads: int
    default_backend: str
    ops: dict[str, dict[str, str]]  # op -> device type -> the backend that "auto" takes
    missing: dict[str, str]  # backend -> why it cannot run here

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{name:<22} {version or 'not installed'}" for name, version in self.versions.items()]
        lines += [f"{'device ' + name:<22} {text}" for name, text in self.devices.items()]
        isa = self.cpu_instruction_set or "none (no native library)"
        lines += [f"{'CPU kernels use':<22} {isa}, {self.threads} thread(s)"]
        lines += [f"{'backend by default':<22} {self.default_backend}"]
        for op, served in self.ops.items():
            lines += [f"{op} on {device}: {backend}" for device, backend in served.items()]
        lines += [f"backend {backend} cannot run: {reason}" for backend, reason in self.missing.items()]
        return "\n".join(lines)


def info() -> Info:
    """Versions, devices, the instruction set in use, which backend serves which op, and why the others do not.

    Naming CUDA devices, where there are any, initialises CUDA.
    """
    devices = {"cpu": _cpu_name()}
    if torch.cuda.is_available():
        devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    types = ["cpu", "cuda"] if len(devices) > 1 else ["cpu"]
    return Info(
        versions={
            "efficientvit_kernels": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "triton": _version("triton"),
            "timm": _version("timm"),
        },
        devices=devices,
        cpu_instruction_set=_library.cpu_isa(),
        threads=torch.get_num_threads(),
        default_backend=_library.DEFAULT_BACKEND,
        ops={op: {device: choose(op, "auto", device) for device in types} for op in OPS},
        missing={name: reason for name in _library.BACKENDS if (reason := _why_not_here(name)) is not None},
    )


def _why_not_here(backend: str) -> str | None:
    reason = why_not(backend, None)
    if reason is None and DEVICE_OF_BACKEND.get(backend) == "cuda":
        return why_not(backend, "cuda") if torch.cuda.is_available() else "no CUDA device is available"
    return reason


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)  # from the metadata on disk: nothing is imported
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} ({len(names) or 1} logical cores)"
