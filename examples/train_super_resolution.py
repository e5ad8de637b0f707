"""Trains super-resolution by 2 and compares it with bicubic interpolation on photographs that it has not seen.

    python examples/train_super_resolution.py                       # photographs that come with Python packages
    python examples/train_super_resolution.py --data DIR --test DIR # yours
    torchrun --nproc-per-node 2 examples/train_super_resolution.py

Without --data: the left three quarters of scikit-learn's two photographs are trained on. Tested are their right
quarters, matplotlib's one, and those of scikit-image where it is installed. The small images are made of the large ones
by bicubic reduction (a = -0.5, with antialiasing) and rounding to 8 bits. Bicubic enlargement is measured with a = -0.5
(Pillow, MATLAB) and with a = -0.75 (torch, OpenCV); the report names the stronger one.

--report also measures the latency, and beside it that of Restormer where the package spandrel-extra-arches is installed
(some of its architectures have non-commercial licences; nothing of it is part of this package).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from efficientvit_kernels._info import info
from efficientvit_kernels.models import create_model
from efficientvit_kernels.models.super_resolution import SCALE, bicubic
from efficientvit_kernels.training import Ranks, Settings, Trainer, luma, psnr, ssim, start_run
from efficientvit_kernels.training.settings import add_arguments

# Of the model and of two bicubic interpolations; one name per column of `table`.
COLUMNS = tuple(f"{who}{what}" for who in ("", "bicubic_a0.5_", "bicubic_a0.75_") for what in ("psnr", "ssim"))
LATENCY_SIZES = ((160, 240), (512, 512))  # of the small image, as in the paper
LATENCY_CALLS = 6
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
TRAIN = {"sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"]}
TEST = {
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
    "skimage": [f"data/{name}" for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")],
}
PHOTO_PACKAGES = ("scikit-learn", "matplotlib", "scikit-image")
# Figures of the paper (arXiv 2205.14756), for orientation: other images, and an NVIDIA A100 with TensorRT in fp16.
PAPER = {
    "source": "arXiv 2205.14756; latency on an A100 with TensorRT fp16, batch 1; not comparable with a CPU's",
    "BSD100 160x240 -> 320x480": {
        "Restormer": {"psnr": 32.31, "ssim": 0.9021, "ms": 15.1},
        "EfficientViT w0.75": {"psnr": 32.31, "ssim": 0.9016, "ms": 2.8},
        "EfficientViT w1.0": {"psnr": 32.33, "ssim": 0.9019, "ms": 3.2},
    },
    "FFHQ 512x512 -> 1024x1024": {
        "Restormer": {"psnr": 43.43, "ssim": 0.9806, "ms": 92.0},
        "EfficientViT w0.75": {"psnr": 43.54, "ssim": 0.9809, "ms": 14.3},
        "EfficientViT w1.0": {"psnr": 43.58, "ssim": 0.9810, "ms": 17.8},
    },
}


def read_photo(path: Path) -> Tensor:
    """RGB [3, H, W] in [0, 1]; H and W even, a last odd row or column is left out."""
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file).convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    image = pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 255
    return image[:, : picture.height // 2 * 2, : picture.width // 2 * 2].contiguous()


def reduced(image: Tensor) -> Tensor:
    """[3, H, W] -> [3, H/2, W/2] by antialiased bicubic reduction, rounded to 8 bits."""
    small = F.interpolate(image[None], scale_factor=1 / SCALE, mode="bicubic", antialias=True)[0]
    return (small.clamp(0, 1) * 255).round() / 255


def package_photos(wanted: dict[str, list[str]]) -> dict[str, Tensor]:
    """The photographs of those packages that are installed."""
    photos = {}
    for package, names in wanted.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            photos.update({f"{package}: {Path(n).name}": read_photo(Path(spec.origin).parent / n) for n in names})
    return photos


def folder_photos(folder: Path) -> dict[str, Tensor]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"train_super_resolution: {folder} must hold images, got none")
    return {path.name: read_photo(path) for path in paths}


def load_photos(data: Path | None, test: Path | None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Photographs to train on, and others, by name, to test with."""
    if data is not None:
        return list(folder_photos(data).values()), folder_photos(test) if test else package_photos(TEST)
    photos = package_photos(TRAIN)
    if not photos:
        raise SystemExit("train_super_resolution: needs --data DIR, or pip install scikit-learn for its photographs")
    cuts = {name: photo.shape[2] * 3 // 4 // 2 * 2 for name, photo in photos.items()}
    tests = {f"{name}, right quarter": photo[:, :, cuts[name] :] for name, photo in photos.items()}
    tests = folder_photos(test) if test else {**tests, **package_photos(TEST)}
    return [photo[:, :, : cuts[name]] for name, photo in photos.items()], tests


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Random crops (small, large) of the photographs, turned and mirrored; drawn from torch's generator."""

    def __init__(self, photos: list[Tensor], crop: int, length: int = 4096) -> None:
        self.pairs = [(reduced(photo), photo) for photo in photos if min(photo.shape[1:]) >= SCALE * crop]
        self.crop, self.length = crop, length
        if not self.pairs:
            raise SystemExit(
                f"train_super_resolution: photographs must be at least {SCALE * crop} pixels wide and high"
            )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        small, large = self.pairs[index % len(self.pairs)]
        y = int(torch.randint(small.shape[1] - self.crop + 1, ()))
        x = int(torch.randint(small.shape[2] - self.crop + 1, ()))
        turns, mirror = int(torch.randint(4, ())), bool(torch.randint(2, ()))
        crops = []
        for image, scale in ((small, 1), (large, SCALE)):
            side = self.crop * scale
            crop = image[:, y * scale : y * scale + side, x * scale : x * scale + side].rot90(turns, (1, 2))
            crops.append((crop.flip(2) if mirror else crop).contiguous())
        return crops[0], crops[1]


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    small, large = batch
    return F.l1_loss(model(small).float(), large)


def quality(enlarged: Tensor, photo: Tensor) -> list[float]:
    """PSNR and SSIM of the luma, without a border of 2 pixels."""
    ours, true = luma(enlarged), luma(photo[None])
    return [float(measure(ours, true, border=SCALE)) for measure in (psnr, ssim)]


def table(model: nn.Module, photos: dict[str, Tensor], ranks: Ranks) -> dict[str, list[float]]:
    """Per photograph PSNR and SSIM of the model, then of bicubic interpolation with a = -0.5 and with a = -0.75."""
    rows = torch.zeros(len(photos), len(COLUMNS), dtype=torch.float64, device=ranks.device)
    for i, photo in enumerate(photos.values()):
        if i % ranks.world != ranks.rank:
            continue
        photo = photo.to(ranks.device)
        small = reduced(photo)[None]
        other = F.interpolate(small, scale_factor=SCALE, mode="bicubic")
        row = [value for image in (model(small), bicubic(small), other) for value in quality(image, photo)]
        rows[i] = torch.tensor(row)
    return dict(zip(photos, ranks.sum(rows).tolist(), strict=True))


def means(rows: dict[str, list[float]]) -> dict[str, float]:
    return {name: sum(row[i] for row in rows.values()) / len(rows) for i, name in enumerate(COLUMNS)}


def stronger_bicubic(found: dict[str, float]) -> str:
    """The kernel with the higher mean PSNR: "a0.5" or "a0.75"."""
    return max(("a0.5", "a0.75"), key=lambda kernel: found[f"bicubic_{kernel}_psnr"])


def restormer() -> tuple[nn.Module | None, str]:
    """Restormer with random weights, and where it is from; None, and why it is not measured."""
    package = "spandrel_extra_arches"
    if importlib.util.find_spec(package) is None:
        return None, "not measured: the package spandrel-extra-arches is not installed"
    model: nn.Module = importlib.import_module(f"{package}.architectures.Restormer").Restormer()
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return model, f"spandrel-extra-arches {version('spandrel-extra-arches')}, {parameters:.1f} M parameters"


def macs(model: nn.Module, height: int, width: int) -> float:
    """Multiply-accumulates of convolutions and matrix products, in 1e9."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, height, width))
    return counter.get_total_flops() / 2e9


def latency(name: str, attention: str) -> dict[str, Any]:
    """The least of a few calls per size, ours and Restormer's in turns, float32 and channels_last.

    Restormer keeps the size of its input. It gets the small image, the cheapest way to enlarge with it: what would have
    to follow, at the large size, is not counted.
    """
    other, source = restormer()
    models = {name: create_model(name, attention=attention)} | ({"Restormer": other} if other is not None else {})
    models = {key: model.eval().to(memory_format=torch.channels_last) for key, model in models.items()}
    counted = {**models, name: create_model(name, attention="reference").eval()}
    sizes = {}
    for height, width in LATENCY_SIZES:
        x = torch.rand(1, 3, height, width).to(memory_format=torch.channels_last)
        times: dict[str, list[float]] = {key: [] for key in models}
        with torch.inference_mode():
            for _ in range(LATENCY_CALLS):
                for key, model in models.items():
                    start = time.perf_counter()
                    model(x)
                    times[key].append(1e3 * (time.perf_counter() - start))
        sizes[f"{height}x{width} -> {SCALE * height}x{SCALE * width}"] = {
            key: {"ms": _rounded(min(values)), "gmacs": _rounded(macs(counted[key], height, width))}
            for key, values in times.items()
        }
    how = {"threads": torch.get_num_threads(), "least_of": LATENCY_CALLS, "layout": "channels_last"}
    return {**how, "Restormer": source, "sizes": sizes}


def write_report(path: Path, options: argparse.Namespace, steps: int, seconds: float, rows: dict[str, Any]) -> None:
    """What was run, on what, and what came of it."""
    found = means(rows)
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": info().as_dict() | {"photographs": {name: _installed(name) for name in PHOTO_PACKAGES}},
        "model": f"{options.model}: this package's own design, not the authors' model",
        "parameters": sum(p.numel() for p in create_model(options.model).parameters()),
        "steps_of_this_call": steps,
        "seconds_of_this_call": round(seconds),
        "held_out": {name: dict(zip(COLUMNS, map(_rounded, row), strict=True)) for name, row in rows.items()},
        "means": {name: _rounded(value) for name, value in found.items()},
        "stronger_bicubic": stronger_bicubic(found),
        "cpu_latency": latency(options.model, options.attention),
        "published": PAPER,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _rounded(value: float) -> float:
    return round(value, 4)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="efficientvit-sr-w1.0", help="or efficientvit-sr-w0.75 (%(default)s)")
    parser.add_argument("--data", type=Path, help="folder of photographs to train on")
    parser.add_argument("--test", type=Path, help="folder of photographs to test with")
    parser.add_argument("--crop", type=int, default=32, help="side of the small crops, in pixels (%(default)s)")
    parser.add_argument("--report", type=Path, help="write a JSON of the results and the latency on this CPU")
    defaults = {"out": Path("runs/super_resolution"), "steps": 1000, "batch": 8, "lr": 1e-3, "warmup": 50}
    add_arguments(parser, **defaults, weight_decay=0.0, clip=0.5, ema=0.995)
    return parser.parse_args()


@record
def main() -> None:
    options = parse()
    with start_run(options) as ranks:
        photos, tests = load_photos(options.data, options.test)
        model = create_model(options.model, attention=options.attention)
        identity = {"model": options.model, "crop": options.crop, "data": str(options.data)}
        trainer = Trainer(model, loss_of, Settings.of(options), ranks, identity)
        first, started = trainer.step, time.perf_counter()
        trainer.fit(Crops(photos, options.crop), lambda model: means(table(model, tests, ranks)))
        seconds = time.perf_counter() - started
        if options.report:
            with torch.no_grad():
                rows = table(trainer.result.eval(), tests, ranks)
            if ranks.main:
                write_report(options.report, options, trainer.step - first, seconds, rows)


if __name__ == "__main__":
    main()
