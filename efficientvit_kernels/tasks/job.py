"""What the commands have in common: the model, the images, the folder of the results, the exit status."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._files import written_whole
from ..models import create_model, list_models
from ..models.registry import RESOLUTIONS
from ..nn import FusedLiteMLA
from ..ops._backends import check_backend
from .files import find_images
from .images import shown
from .options import MODELS, UsageError

RANDOM_WEIGHTS = "random weights: the output means nothing"


class Job:
    """One call of a command.

    Attributes:
        model: in eval mode, with its device, dtype and backend.
        model_name, resolution: of `--model`; "efficientvit-b1-r288" has the resolution 288, most have None.
        paths, problems: the images, and what could not be done so far.
    """

    def __init__(self, arguments: argparse.Namespace, **options: Any) -> None:
        self.arguments = arguments
        self.model_name, self.resolution = _check_model(arguments.command, arguments.model)
        self.out = Path(arguments.out)
        files, self.problems = find_images(arguments.images, self.out)
        self.names = {file.path: file.name for file in files}
        self.paths = [file.path for file in files]
        self._inputs = {os.path.realpath(path) for path in self.paths}
        for problem in self.problems:
            print(f"skipped: {problem}", file=sys.stderr)
        if self.paths:  # otherwise nothing is done, and what is wrong has been said
            self.out.mkdir(parents=True, exist_ok=True)
            self.model = load_model(arguments, self.model_name, **options)

    def path(self, image: Path, suffix: str) -> Path:
        """Where a result of that image goes: <out>/<the image's name>_<suffix>.

        Names are unique, and no suffix of a command ends in another with "_" before it, so neither are results of two
        images the same file.

        Raises:
            FileExistsError: it is one of the images.
        """
        path = self.out / f"{self.names[image]}_{suffix}"
        if os.path.realpath(path) in self._inputs:
            raise FileExistsError(f"{shown(path)} is an image to be read: --out must be another folder")
        return path

    def finish(self, records: Sequence[Mapping[str, Any]]) -> int:
        """Writes <command>.json, says how it went; the exit status."""
        settings = ("model", "weights", "dtype", "backend", "attention")
        content = {
            "command": self.arguments.command,
            **{name: getattr(self.arguments, name) for name in settings},
            "images": list(records),
            "skipped": [{"image": shown(problem.path), "cause": problem.cause} for problem in self.problems],
        }
        if self.paths:
            with written_whole(self.out / f"{self.arguments.command}.json") as temporary:
                temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        count, skipped = len(records), len(self.problems)
        print(f"{count} image{'' if count == 1 else 's'} done{f', results in {shown(self.out)}' if self.paths else ''}")
        if skipped:
            print(f"efficientvit_kernels {self.arguments.command}: {skipped} skipped, see above", file=sys.stderr)
        return 1 if skipped else 0

    def record(self, image: Path, size: tuple[int, ...], files: Sequence[Path], **facts: Any) -> dict[str, Any]:
        """What the JSON file says of an image."""
        head = {"image": shown(image), "width": size[1], "height": size[0]}
        return {**head, "files": [shown(file.name) for file in files], **facts}


def _check_model(command: str, name: str) -> tuple[str, int | None]:
    """The model's name without a resolution, and the resolution."""
    known = list_models(MODELS[command])
    match = re.fullmatch(r"(.+)-r(\d+)", name)
    base, resolution = (match[1], int(match[2])) if match else (name, None)
    if base not in known or (match and resolution not in RESOLUTIONS.get(base, ())):
        raise UsageError(f"--model must be one of {', '.join(known)}, got {name!r}")
    return base, resolution


def load_model(arguments: argparse.Namespace, name: str, **options: Any) -> nn.Module:
    """The model of the arguments, ready for inference; without --weights the same random ones every time.

    Raises:
        UsageError: options that exclude each other. ValueError: no such device. NotImplementedError: the backend cannot
            run there. CheckpointError: the weights cannot be read, or are not this model's.
    """
    if arguments.attention == "reference" and arguments.backend not in ("auto", "reference"):
        raise UsageError(f"--backend must be auto with --attention reference, got {arguments.backend!r}")
    device = torch.device(_device(arguments.device))
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    check_backend(arguments.command, arguments.backend, device.type, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(name, arguments.weights, arguments.attention, **options)
    if arguments.weights is None:
        print(f"warning: {RANDOM_WEIGHTS}", file=sys.stderr)
    model = model.to(device, dtype).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, FusedLiteMLA):
            module.backend = arguments.backend
    return model


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be one that torch can use, got 'cuda', and torch finds no CUDA device")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
