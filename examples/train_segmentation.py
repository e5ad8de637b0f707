"""Trains an EfficientViT segmentation model, on scenes made of real digits and photographs or on a folder of yours.

    python examples/train_segmentation.py                           # a few minutes on a CPU
    python examples/train_segmentation.py --data DIR --classes 19 --size 512 --model efficientvit-seg-b1-cityscapes
    torchrun --nproc-per-node 2 examples/train_segmentation.py --amp bf16

Without --data, the scenes are made up of real parts: one to three cards with scikit-learn's handwritten digits, in
random colours, on crops of its two photographs. A card's pixels have the class of its digit, 1 to 10; the photograph is
class 0. The test scenes have digits and parts of the photographs that no training scene has.

DIR has images/NAME.* and masks/NAME.png, grey or palette pictures whose values are the classes; 255 is ignored. Every
tenth pair, by name, is for testing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import Dataset

from efficientvit_kernels.models import create_model, list_models
from efficientvit_kernels.models.segmentation import STRIDE
from efficientvit_kernels.models.training import init_weights
from efficientvit_kernels.training import Ranks, Settings, Trainer, start_run
from efficientvit_kernels.training.data import Seeded
from efficientvit_kernels.training.settings import add_arguments

IGNORED = 255
MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Image [3, size, size], normalised, and mask [size, size] of classes; drawn from torch's generator."""

    def __init__(self, size: int, train: bool, length: int) -> None:
        try:
            from sklearn.datasets import load_digits, load_sample_images
        except ImportError as error:
            raise SystemExit("train_segmentation: needs --data DIR, or pip install scikit-learn pillow") from error
        content = load_digits()
        order = torch.randperm(len(content.target), generator=torch.Generator().manual_seed(0))
        chosen = order[400:] if train else order[:400]
        self.digits = torch.from_numpy(content.images).float()[chosen] / 16
        self.labels = torch.from_numpy(content.target)[chosen]
        photos = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
        cut = photos[0].shape[2] * 3 // 4
        self.photos = [photo[:, :, :cut] if train else photo[:, :, cut:] for photo in photos]
        self.size, self.length = size, length
        if size > min(photo.shape[2] for photo in self.photos):
            raise SystemExit(f"train_segmentation: --size must be at most {self.photos[0].shape[2]}, got {size}")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        photo = self.photos[index % len(self.photos)]
        y, x = (_draw(0, side - self.size) for side in photo.shape[1:])
        image = photo[:, y : y + self.size, x : x + self.size].clone()
        mask = torch.zeros(self.size, self.size, dtype=torch.int64)
        for _ in range(_draw(1, 3)):
            side = _draw(self.size // 3, self.size // 2)
            chosen = _draw(0, len(self.labels) - 1)
            ink = F.interpolate(self.digits[chosen][None, None], size=(side, side), mode="bicubic")[0, 0].clamp(0, 1)
            y, x = _draw(0, self.size - side), _draw(0, self.size - side)
            card, pen = 0.6 + 0.4 * torch.rand(3, 1, 1), 0.4 * torch.rand(3, 1, 1)
            place = (slice(y, y + side), slice(x, x + side))
            image[:, *place] = card * (1 - ink) + pen * ink
            mask[place] = 1 + self.labels[chosen]
        return (image - MEAN) / STD, mask


class Folder(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of images/ and masks/: to train on, random crops of size x size; to test with, whole images."""

    def __init__(self, folder: Path, size: int, train: bool) -> None:
        masks = {path.stem: path for path in (folder / "masks").glob("*.png")}
        images = sorted(path for path in (folder / "images").glob("*") if path.stem in masks)
        self.pairs = [(path, masks[path.stem]) for i, path in enumerate(images) if (i % 10 != 9) == train]
        if not self.pairs:
            raise SystemExit(f"train_segmentation: {folder} must have 10 pairs images/NAME.*, masks/NAME.png at least")
        self.size = size if train else None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        with Image.open(self.pairs[index][0]) as file:
            image = (_pixels(file.convert("RGB"), 3).permute(2, 0, 1) / 255 - MEAN) / STD
        with Image.open(self.pairs[index][1]) as file:
            mask = _pixels(file if file.mode in ("P", "L") else file.convert("L"), 1)[..., 0].long()
        if image.shape[1:] != mask.shape:
            raise ValueError(f"{self.pairs[index][1]} must be of its image's size {tuple(image.shape[1:])}")
        if self.size is None:
            return image, mask
        image, mask = padded(image, mask, max(self.size, image.shape[1]), max(self.size, image.shape[2]))
        y, x = (_draw(0, side - self.size) for side in mask.shape)
        crop = (slice(y, y + self.size), slice(x, x + self.size))
        image, mask = image[:, *crop], mask[crop]
        return (image.flip(2), mask.flip(1)) if _draw(0, 1) else (image.contiguous(), mask.contiguous())


def padded(image: Tensor, mask: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Continued to height x width by the mean colour, which is ignored."""
    edges = (0, width - mask.shape[1], 0, height - mask.shape[0])
    return F.pad(image, edges), F.pad(mask, edges, value=IGNORED)


def _pixels(picture: Any, channels: int) -> Tensor:
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(
        picture.height, picture.width, channels
    )


def _draw(low: int, high: int) -> int:
    """From low to high, both included."""
    return int(torch.randint(low, high + 1, ()))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Of every pixel: the model's, of an eighth of the resolution, enlarged."""
    return F.interpolate(model(images).float(), size=images.shape[-2:], mode="bilinear")


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    images, masks = batch
    return F.cross_entropy(logits_of(model, images), masks, ignore_index=IGNORED)


def mean_iou(model: nn.Module, data: Any, n_classes: int, ranks: Ranks) -> dict[str, float]:
    """The mean over the classes of intersection / union, and the share of right pixels; each rank looks at its own.

    Random scenes are drawn from a seed of their index, so that they are the same at every evaluation.
    """
    seeded = Seeded(data)
    counts = torch.zeros(n_classes * n_classes, dtype=torch.float64, device=ranks.device)
    for index in range(ranks.rank, len(data), ranks.world):
        image, mask = seeded[index, index]
        height, width = (-(-side // STRIDE) * STRIDE for side in mask.shape)
        image, mask = (tensor.to(ranks.device) for tensor in padded(image, mask, height, width))
        found, known = logits_of(model, image[None]).argmax(1)[0], mask != IGNORED
        counts += torch.bincount(mask[known] * n_classes + found[known], minlength=n_classes * n_classes)
    matrix = ranks.sum(counts).view(n_classes, n_classes)
    right = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - right
    seen = union > 0
    return {"miou": float((right[seen] / union[seen]).mean()), "accuracy": float(right.sum() / matrix.sum())}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list_models("efficientvit-seg-*")
    parser.add_argument("--model", choices=names, default=names[0], help="(%(default)s)", metavar="NAME")
    parser.add_argument("--data", type=Path, help="folder with images/ and masks/")
    parser.add_argument("--classes", type=int, help="in the masks of --data")
    parser.add_argument("--size", type=int, default=128, help="side of the crops (%(default)s)")
    parser.add_argument("--test-scenes", type=int, default=64, help="made without --data (%(default)s)")
    parser.add_argument("--init", choices=("torch", "official"), default="torch", help="official: for long runs")
    add_arguments(parser, out=Path("runs/segmentation"), steps=400, batch=16, lr=4e-3, warmup=50, ema=0.99)
    options = parser.parse_args()
    if (options.data is None) != (options.classes is None):
        parser.error("--data and --classes go together")
    if options.size % STRIDE:
        parser.error(f"--size must be a multiple of {STRIDE}, got {options.size}")
    return options


@record
def main() -> None:
    options = parse()
    with start_run(options) as ranks:
        size, n_classes = options.size, options.classes or 11
        train: Any
        test: Any
        if options.data is None:
            train, test = Scenes(size, train=True, length=4096), Scenes(size, train=False, length=options.test_scenes)
        else:
            train, test = (Folder(options.data, size, train=train) for train in (True, False))
        model = create_model(options.model, attention=options.attention, n_classes=n_classes)
        if options.init == "official":
            init_weights(model)
        identity = {
            "model": options.model,
            "size": size,
            "data": str(options.data),
            "classes": n_classes,
            "init": options.init,
        }
        trainer = Trainer(model, loss_of, Settings.of(options), ranks, identity)
        trainer.fit(train, lambda model: mean_iou(model, test, n_classes, ranks))


if __name__ == "__main__":
    main()
