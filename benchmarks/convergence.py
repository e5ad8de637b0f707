"""Does a net train with the fused modules as it does with the reference? python -m benchmarks.convergence

A small EfficientViT learns scikit-learn's digits (1797 real images, 8 x 8, which come with the package) from the same
initialisation and the same batches, once with LiteMLA and once with FusedLiteMLA, for several seeds, in float32 and
under bfloat16 autocast. The smoothed loss curves must lie closer together than those of any two seeds of the reference.
Writes results/convergence.json and a picture beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientvit_kernels import LiteMLA, accelerate
from efficientvit_kernels._info import info
from efficientvit_kernels.nn.conv import ConvLayer
from efficientvit_kernels.testing import native_calls

OUTPUT = Path(__file__).parent / "results" / "convergence.json"
WINDOW = 20  # steps of a moving average
BATCH = 32


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 16, 16] around zero, labels [n]."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    from sklearn.datasets import load_digits as load

    content = load()
    images = torch.from_numpy(content.images).float()[:, None] / 8 - 1  # 0 ... 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear")
    labels = torch.from_numpy(content.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:400], order[400:]
    return Digits(images[train], labels[train], images[test], labels[test])


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y


def mb_conv(channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    wide = 2 * channels
    return [
        ConvLayer(channels, wide, 1, act_func="hswish"),
        ConvLayer(wide, wide, 3, stride, groups=wide, act_func="hswish"),
        ConvLayer(wide, out_channels, 1, act_func=None),
    ]


def small_efficientvit() -> nn.Sequential:
    """Stem, two stages of a LiteMLA and an MBConv with residuals (64 and 16 tokens), pooling and a classifier."""
    return nn.Sequential(
        ConvLayer(1, 16, 3, stride=2, act_func="hswish"),
        *mb_conv(16, 32),
        Residual(LiteMLA(32, 32, dim=8)),
        Residual(*mb_conv(32, 32)),
        *mb_conv(32, 64, 2),
        Residual(LiteMLA(64, 64, dim=16, scales=(3, 5))),
        Residual(*mb_conv(64, 64)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@dataclass(frozen=True)
class Run:
    """One training: the loss of every step, and the share of the test images that is classified rightly."""

    losses: list[float]
    accuracy: float
    native_calls: int


def train(model: nn.Module, data: Digits, seed: int, steps: int, autocast: bool) -> Run:
    """AdamW with a cosine schedule on random batches, which `seed` chooses."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    before = native_calls()
    losses = []
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(data.train), (BATCH,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(data.train[chosen])
        loss = F.cross_entropy(logits.float(), data.train_labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        right = model(data.test).argmax(1) == data.test_labels
    return Run(losses, float(right.float().mean()), native_calls() - before)


@dataclass(frozen=True)
class Comparison:
    """Pairs of trainings that differ in the module's class alone, one pair per seed."""

    reference: list[Run]
    fused: list[Run]

    @property
    def distances(self) -> list[float]:
        """Per seed, how far the two loss curves get from each other."""
        return [distance(a, b) for a, b in zip(self.reference, self.fused, strict=True)]

    @property
    def spread(self) -> float:
        """How far two seeds of the reference get from each other: the least over all pairs."""
        return min(distance(a, b) for a, b in itertools.combinations(self.reference, 2))

    @property
    def agree(self) -> bool:
        return all(found <= self.spread for found in self.distances)  # False for NaN

    @property
    def accuracies(self) -> list[float]:
        return [run.accuracy for run in (*self.reference, *self.fused)]


def smoothed(losses: Sequence[float]) -> Tensor:
    return torch.tensor(losses, dtype=torch.float64).unfold(0, WINDOW, 1).mean(1)


def distance(a: Run, b: Run) -> float:
    """Largest difference of the smoothed losses."""
    return float((smoothed(a.losses) - smoothed(b.losses)).abs().max())


def model_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return small_efficientvit()


def fused(model: nn.Module) -> nn.Module:
    accelerate(model)
    return model


def compare(
    seeds: Sequence[int], steps: int, autocast: bool, changed: Callable[[nn.Module], nn.Module] = fused
) -> Comparison:
    """Trains the reference and what `changed` makes of it, from the same start, for every seed."""
    data = load_digits()
    runs = [[train(make(model_of(seed)), data, seed, steps, autocast) for seed in seeds] for make in (_same, changed)]
    return Comparison(*runs)


def _same(model: nn.Module) -> nn.Module:
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)  # layers so small only wait for each other
    found = {}
    for name, autocast in (("float32", False), ("bfloat16 autocast", True)):
        found[name] = result = compare(range(options.seeds), options.steps, autocast)
        if not all(run.native_calls for run in result.fused):
            raise SystemExit("benchmarks.convergence: the fused modules must run in native kernels, and did not")
        distances = ", ".join(f"{value:.4f}" for value in result.distances)
        accuracies = ", ".join(
            f"{a.accuracy:.1%}/{b.accuracy:.1%}" for a, b in zip(result.reference, result.fused, strict=True)
        )
        print(f"{name}: reference and fused are {distances} apart, two seeds {result.spread:.4f}", end="")
        print(f" ({'they agree' if result.agree else 'they DISAGREE'}); accuracies {accuracies}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(_content(options.steps, found), indent=1) + "\n")
    draw(options.output.with_suffix(".png"), found)
    print(f"Written: {options.output}, {options.output.with_suffix('.png')}")


def _content(steps: int, found: dict[str, Comparison]) -> dict[str, Any]:
    def runs(of: list[Run]) -> list[dict[str, Any]]:
        return [{**asdict(run), "losses": [float(f"{loss:.5g}") for loss in run.losses]} for run in of]

    return {
        "environment": info().as_dict(),
        "settings": {"steps": steps, "batch": BATCH, "window": WINDOW},
        "results": {
            name: {
                "distances": result.distances,
                "spread_of_seeds": result.spread,
                "agree": result.agree,
                "reference": runs(result.reference),
                "fused": runs(result.fused),
            }
            for name, result in found.items()
        },
    }


def draw(path: Path, found: dict[str, Comparison]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, result) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for seed, (reference, ours) in enumerate(zip(result.reference, result.fused, strict=True)):
            axes.plot(
                smoothed(reference.losses), color=f"C{seed}", linewidth=2.5, alpha=0.4, label=f"reference, seed {seed}"
            )
            axes.plot(smoothed(ours.losses), color=f"C{seed}", linewidth=1, linestyle="--", label=f"fused, seed {seed}")
        axes.set(title=name, xlabel="step", ylabel=f"loss, mean over {WINDOW} steps", yscale="log")
        axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
