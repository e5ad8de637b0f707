"""The state of a training run on disk: it appears whole or not at all, and comes back exactly."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path
from typing import Any

import torch

from .._files import written_whole
from ..models.checkpoint import CheckpointError

FORMAT = "efficientvit_kernels training run 1"


def save_state(state: dict[str, Any], path: Path) -> None:
    """Writes nested dicts and lists of tensors, numbers and strings; what was under `path` stays until all is written.

    Raises: CheckpointError: the file cannot be written.
    """
    try:
        with written_whole(path, durable=True) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
    except OSError as error:
        raise CheckpointError(path, f"cannot be written: {error}") from error


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU; no code of the file's runs.

    Raises: CheckpointError: no such file, a damaged one, or one of another kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch's reader compares no checksums
        if damaged is not None:
            raise CheckpointError(path, f"damaged: the checksum of its record {damaged!r} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever the readers raise on damaged data
        raise CheckpointError(path, f"cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(path, f"is not the state of a training run ({FORMAT!r})")
    return state


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators of this process that a model may draw from: torch's on CPU and device, and Python's."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
