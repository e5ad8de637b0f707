"""One JSON per part, rewritten after every step, so that a part that is cut off keeps what it has."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import RESULTS, commit
from efficientvit_kernels._info import _version
from efficientvit_kernels.ops._backends import why_not

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ("efficientvit_kernels/**/*.py", "csrc/**/*.*", "benchmarks/**/*.py")
# What must agree before new steps may stand beside old ones.
IDENTITY = ("part", "quick", "commit", "sources", "gpu", "driver", "torch", "triton")
CRASHED = "the process ended during this step"

Entry = dict[str, Any]


class Store:
    """The file of one part: a header, and per step its status, seconds and result.

    Status: "ok", "failed" (a check did not hold), "error" (it raised), "not_run" (it cannot run here, with the reason).
    A step that is under way stands in "running": a process that ends there leaves that as its trace.
    """

    def __init__(self, path: Path, header: dict[str, Any], resume: bool = False) -> None:
        self.path, self.note = path, ""
        self.content: dict[str, Any] = header | {"steps": {}, "left": [], "running": None}
        if resume and path.exists():
            self._take_over(json.loads(path.read_text()), header)

    def _take_over(self, old: dict[str, Any], header: dict[str, Any]) -> None:
        # Results that are under version control make the tree dirty; `sources` tells whether the code changed.
        differs = [key for key in IDENTITY if _clean(old.get(key)) != _clean(header.get(key))]
        if differs:
            key = differs[0]
            self.note = f"not resumed: {key} is {header.get(key)!r}, that of the results is {old.get(key)!r}"
            return
        self.content["steps"] = old["steps"]
        if old.get("running"):
            self.finish(old["running"], {"status": "error", "reason": CRASHED})

    @property
    def steps(self) -> dict[str, Entry]:
        steps: dict[str, Entry] = self.content["steps"]
        return steps

    def begin(self, name: str) -> None:
        self.content["running"] = name
        self.write()

    def finish(self, name: str, entry: Entry) -> None:
        self.steps[name] = entry
        self.content["running"] = None
        self.write()

    def leave(self, names: list[str]) -> None:
        """The steps for which no time was left."""
        self.content["left"] = names
        self.write()

    def write(self) -> None:
        """Atomic: a reader, or a process that is killed here, finds the old file or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(as_text(self.content))
        os.replace(partial, self.path)


def _clean(value: object) -> object:
    return value.removesuffix("-dirty") if isinstance(value, str) else value


def as_text(content: object) -> str:
    """Indented, but lists of numbers in one line; floats with six significant digits."""
    text = json.dumps(_rounded(content), indent=1, allow_nan=True)
    return re.sub(r"\[\s+([-+.,\s\deE]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def header(part: str, device: str, quick: bool, commit_name: str | None = None) -> dict[str, Any]:
    return {
        "part": part,
        "quick": quick,
        "commit": commit_name or commit(),
        "sources": source_digest(),
        "gpu": device_name(device),
        "driver": driver() if device == "cuda" else None,
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,  # type: ignore[no-untyped-call]
        "python": platform.python_version(),
        "backends": {name: why_not(name, device) or "can run" for name in ("cpu", "triton", "cuda")},
    }


def source_digest() -> str:
    """Of the code that ran: a copy of the tree may have no history that names its commit."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100": the folder of the results."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word not in ("", "nvidia", "amd", "geforce")]
    named = [word for word in words if re.fullmatch(r"[a-z]+\d+[a-z]*", word)]
    return named[0] if named else "".join(words) or "gpu"


def folder() -> Path:
    return RESULTS / slug(device_name("cuda"))


def driver() -> str | None:
    state = smi("driver_version")
    return state.get("driver_version") if state else None


def smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first device; nothing where it is not there. Only read, never set."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    values = [value.strip() for value in result.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if result.returncode == 0 and len(values) == len(fields) else {}


def clocks() -> dict[str, str]:
    """Clocks, temperature and power, beside every step: a throttled card explains an odd figure."""
    return smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
