"""Fresh interpreters that find the package in the source folder, or in a copy of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from efficientvit_kernels._build import ROOT


def python(*arguments: str, path: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` in `path`, with its words captured; nothing is raised for a failure."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        cwd=path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
