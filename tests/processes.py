"""Fresh interpreters that find the package in the source folder, or in a copy of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from efficientvit_kernels._build import ROOT


def python(
    *arguments: str, path: Path = ROOT, timeout: int = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` in `path`, with its words captured; nothing is raised for a failure.

    Triton is not the interpreter there, as it is in the tests' own process, unless `environment` says so.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "PYTHONPATH": str(path), **environment},
        cwd=path,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
