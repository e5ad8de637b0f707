"""Trains an EfficientViT classifier, on scikit-learn's handwritten digits or on a folder of yours.

    python examples/train_classification.py                         # 1797 real digits, a minute or two on a CPU
    python examples/train_classification.py --data DIR --model efficientvit-b1 --size 224 --amp bf16
    torchrun --nproc-per-node 2 examples/train_classification.py --resume

DIR has the layout of torchvision's ImageFolder: DIR/train/<class>/* and DIR/val/<class>/*.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader, Dataset, Subset

from efficientvit_kernels.models import create_model, list_models
from efficientvit_kernels.models.training import apply_drop_path, init_weights
from efficientvit_kernels.training import Ranks, Settings, Trainer, start_run
from efficientvit_kernels.training.settings import add_arguments

TEST_DIGITS = 400


class Digits(Dataset[tuple[Tensor, int]]):
    """scikit-learn's 1797 digits of 8 x 8 grey pixels, enlarged to size x size, as three equal channels around 0.

    400 of them, which a fixed permutation chooses, are for testing. Those to train on are shifted at random, by up to
    an eighth of the side, drawn from torch's generator.
    """

    def __init__(self, size: int, train: bool) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise SystemExit("train_classification: needs --data DIR, or pip install scikit-learn") from error
        content = load_digits()
        order = torch.randperm(len(content.target), generator=torch.Generator().manual_seed(0))
        chosen = order[TEST_DIGITS:] if train else order[:TEST_DIGITS]
        images = torch.from_numpy(content.images).float()[chosen, None] / 8 - 1  # 0 ... 16
        self.images = F.interpolate(images, size=(size, size), mode="bilinear")
        self.labels = torch.from_numpy(content.target)[chosen]
        self.shift = size // 8 if train else 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.shift:
            y, x = (int(torch.randint(2 * self.shift + 1, ())) for _ in range(2))
            padded = F.pad(image, (self.shift,) * 4, value=-1.0)
            image = padded[:, y : y + image.shape[1], x : x + image.shape[2]]
        return image.expand(3, -1, -1).contiguous(), int(self.labels[index])


def image_folder(folder: Path, size: int, train: bool) -> Any:
    """torchvision's ImageFolder with the usual crops, normalised as the official models want it."""
    try:
        from torchvision import datasets, transforms
    except ImportError as error:
        raise SystemExit("train_classification: --data needs pip install torchvision") from error
    if train:
        crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        crop = [transforms.Resize(round(size / 0.95)), transforms.CenterCrop(size)]
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return datasets.ImageFolder(folder, transforms.Compose([*crop, transforms.ToTensor(), normalise]))


def load_data(options: argparse.Namespace) -> tuple[Dataset[Any], Dataset[Any], int]:
    """What to train on, what to test with, and the number of classes."""
    if options.data is None:
        return Digits(options.size, train=True), Digits(options.size, train=False), 10
    train, test = (image_folder(options.data / part, options.size, part == "train") for part in ("train", "val"))
    if train.classes != test.classes:
        raise SystemExit(f"train_classification: {options.data} must have the same classes in train and val")
    return train, test, len(train.classes)


def loss_of(smoothing: float) -> Any:
    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images).float(), labels, label_smoothing=smoothing)

    return loss


def accuracy(model: nn.Module, data: Any, batch: int, ranks: Ranks) -> dict[str, float]:
    """The share of the images that is classified rightly, and the mean cross-entropy; each rank looks at its own."""
    mine = Subset(data, range(ranks.rank, len(data), ranks.world))
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    for images, labels in DataLoader(mine, batch):
        labels = labels.to(ranks.device)
        logits = model(images.to(ranks.device)).double()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(1) == labels).sum()
        sums += torch.stack([right.double(), loss, torch.tensor(len(labels), device=ranks.device).double()])
    right, loss, count = ranks.sum(sums).tolist()
    return {"accuracy": right / count, "loss": loss / count}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list_models("efficientvit-[bl]?")
    parser.add_argument("--model", choices=names, default="efficientvit-b0", help="(%(default)s)")
    parser.add_argument("--data", type=Path, help="folder with train/<class>/* and val/<class>/*")
    parser.add_argument("--size", type=int, default=64, help="side of the images (%(default)s)")
    parser.add_argument("--drop-path", type=float, default=0.05, help="stochastic depth (%(default)s)")
    parser.add_argument("--smoothing", type=float, default=0.1, help="of the labels (%(default)s)")
    parser.add_argument("--init", choices=("torch", "official"), default="torch", help="official: for long runs")
    add_arguments(parser, out=Path("runs/classification"), steps=400, batch=32, lr=2e-3, warmup=20, ema=0.99)
    return parser.parse_args()


@record
def main() -> None:
    options = parse()
    with start_run(options) as ranks:
        train, test, n_classes = load_data(options)
        model = create_model(options.model, attention=options.attention, n_classes=n_classes)
        if options.init == "official":
            init_weights(model)
        apply_drop_path(model, options.drop_path)
        names = ("model", "size", "init", "drop_path", "smoothing")
        identity = {"data": str(options.data), **{name: getattr(options, name) for name in names}}
        trainer = Trainer(model, loss_of(options.smoothing), Settings.of(options), ranks, identity)
        trainer.fit(train, lambda model: accuracy(model, test, options.batch, ranks))


if __name__ == "__main__":
    main()
