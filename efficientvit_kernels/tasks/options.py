"""The tasks' commands: their options, and the way to the modules that do them. Light: `--help` loads no torch."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from typing import Any

from .._optional import require

COMMANDS = ("classify", "segment", "sam", "reconstruct", "upscale")
MODELS = {  # shell-style patterns for list_models
    "classify": "efficientvit-[bl][0-9]",
    "segment": "efficientvit-seg-*",
    "sam": "efficientvit-sam-*",
    "reconstruct": "dc-ae-*",
    "upscale": "efficientvit-sr-*",
}
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")


class UsageError(Exception):
    """What only the user's words can mend; exit status 2."""


def add_tasks(commands: Any) -> None:
    """Adds the tasks to argparse's sub-commands."""
    classify = _add(commands, "classify", "the classes of images", "efficientvit-b1-r288")
    classify.add_argument("--top", type=_positive, default=5, help="classes per image; default %(default)s")
    classify.add_argument("--size", type=_positive, help="side of the input; default that in the model's name, or 224")
    classify.add_argument("--names", metavar="FILE", help="class names, one a line; default those of ImageNet")

    segment = _add(commands, "segment", "the class of every pixel", "efficientvit-seg-b2-ade20k")
    segment.add_argument(
        "--resize",
        choices=("official", "none"),
        default="official",
        help="the input's size: as in the official evaluation, or the image's own, padded; default %(default)s",
    )

    sam = _add(commands, "sam", "masks at points, in a box, or of everything", "efficientvit-sam-l0")
    sam.add_argument(
        "--point",
        type=_point,
        action="append",
        default=[],
        metavar="X,Y[,LABEL]",
        help="a pixel on the object, or off it with label 0; may be repeated",
    )
    sam.add_argument("--box", type=_box, metavar="X0,Y0,X1,Y1", help="around the object, in pixels")
    sam.add_argument("--points-per-side", type=_positive, default=32, help="of the grid for everything; default 32")
    sam.add_argument("--iou", type=float, default=0.88, help="least predicted IoU, for everything; default %(default)s")
    sam.add_argument("--stability", type=float, default=0.95, help="least stability, likewise; default %(default)s")
    sam.add_argument("--format", choices=("png", "npz"), default="png", help="a file per mask, or one of all")

    _add(commands, "reconstruct", "images through an autoencoder and back, with PSNR", "dc-ae-f32c32-in-1.0")

    upscale = _add(commands, "upscale", "images of twice the size", "efficientvit-sr-w1.0")
    upscale.add_argument("--tile", type=_positive, default=512, help="largest side done at once; default %(default)s")
    upscale.add_argument("--overlap", type=int, default=32, help="of neighbouring tiles; default %(default)s")


def _add(commands: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, and folders to search")
    parser.add_argument("--model", required=True, metavar="NAME", help=f"such as {example}")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint (.pt, .safetensors, hf://...); default random")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results; made if it is missing")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the fused attention")
    parser.add_argument("--attention", choices=("fused", "reference"), default="fused")
    return parser


def run_task(arguments: argparse.Namespace) -> int:
    """Exit status 0: all images done; 1: some could not be done, as told; 2: wrong usage."""
    try:
        for module in ("numpy", "PIL.Image"):
            require(module, arguments.command)
        status: int = importlib.import_module(f".{arguments.command}", __package__).run(arguments)
        return status
    except UsageError as error:
        print(f"efficientvit_kernels {arguments.command}: {error}", file=sys.stderr)
        return 2


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _numbers(text: str, counts: tuple[int, ...], expected: str) -> list[float]:
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts or not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return numbers


def _point(text: str) -> tuple[float, float, int]:
    x, y, *label = _numbers(text, (2, 3), "x,y or x,y,label")
    if label and label[0] not in (0, 1):
        raise argparse.ArgumentTypeError(f"label must be 1 (on the object) or 0 (off it), got {text!r}")
    return x, y, int(label[0]) if label else 1


def _box(text: str) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = _numbers(text, (4,), "x0,y0,x1,y1")
    if x1 <= x0 or y1 <= y0:
        raise argparse.ArgumentTypeError(f"must have x0 < x1 and y0 < y1, got {text!r}")
    return x0, y0, x1, y1
