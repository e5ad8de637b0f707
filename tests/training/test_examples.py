"""The examples: fused and reference runs coincide; they take data of the user's own; what they measure is right."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from efficientvit_kernels import FusedLiteMLA
from efficientvit_kernels._build import ROOT
from efficientvit_kernels.models import create_model
from efficientvit_kernels.testing import native_calls
from efficientvit_kernels.training import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-5
NAMES = ("classification", "segmentation", "super_resolution")
SMALL = {
    "classification": ["--size", "32", "--batch", "16"],
    "segmentation": ["--size", "64", "--batch", "4", "--test-scenes", "2"],
    "super_resolution": ["--crop", "16", "--batch", "2", "--model", "efficientvit-sr-w0.75"],
}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"train_{name}", ROOT / "examples" / f"train_{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, list[float]]:
    """One column per figure of train.csv and eval.csv."""
    monkeypatch.setattr(sys, "argv", [module.__name__, "--out", str(out), "--device", "cpu", *arguments])
    module.main()
    columns: dict[str, list[float]] = {}
    for name in ("train", "eval"):
        with open(out / f"{name}.csv", newline="") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    columns.setdefault(f"{name} {key}", []).append(float(value))
    assert (out / "weights.pt").exists()
    return columns


def small_pictures(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """The test photographs of super-resolution, cut to a corner: the time is not spent on them."""
    if hasattr(module, "load_photos"):
        load = module.load_photos
        monkeypatch.setattr(
            module,
            "load_photos",
            lambda data, test: (load(data, test)[0], {k: p[:, :48, :64] for k, p in load(data, test)[1].items()}),
        )


def losses(module: ModuleType, name: str, out: Path, monkeypatch: pytest.MonkeyPatch, attention: str) -> dict[str, Any]:
    """The figures of four small steps, without warm-up."""
    steps = ["--steps=4", "--lr=2e-4", "--warmup=0", "--log-every=1", f"--attention={attention}"]
    found = run(module, out, monkeypatch, *SMALL[name], *steps)
    del found["train images_per_second"]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_fused_and_reference_coincide(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of every step and the evaluation, in float32; and a gradient that the attention lost is seen.

    The two differ by roundings of 1e-7, which AdamW amplifies, since it divides gradients by their size: up to 3e-6 of
    a figure was measured, and 4e-4 for the lost gradient.
    """
    module = example(name)
    small_pictures(monkeypatch, module)
    before = native_calls()
    reference = losses(module, name, tmp_path / "reference", monkeypatch, "reference")
    assert native_calls() == before
    fused = losses(module, name, tmp_path / "fused", monkeypatch, "fused")
    assert native_calls() > before
    assert len(fused["train loss"]) == 4
    for key, values in reference.items():
        assert fused[key] == pytest.approx(values, rel=TOLERANCE), key
    forward = FusedLiteMLA.forward
    monkeypatch.setattr(FusedLiteMLA, "forward", lambda self, x: forward(self, x.detach()))
    wrong = losses(module, name, tmp_path / "wrong", monkeypatch, "fused")
    assert wrong["train loss"] != pytest.approx(reference["train loss"], rel=3 * TOLERANCE)


def test_stop_and_resume_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("classification")
    arguments = [*SMALL["classification"], "--steps", "4", "--amp", "bf16"]
    run(module, tmp_path / "whole", monkeypatch, *arguments)
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path / "parts"), *arguments, "--stop-after", "2"])
    module.main()
    run(module, tmp_path / "parts", monkeypatch, *arguments, "--resume")
    weights = [torch.load(tmp_path / part / "weights.pt", weights_only=True) for part in ("whole", "parts")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    create_model("efficientvit-b0", weights=tmp_path / "parts" / "weights.pt", n_classes=10)


def write_picture(path: Path, height: int, width: int, seed: int, mask: bool = False) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 3 if mask else 256, (height, width, 1 if mask else 3), generator=generator).byte()
    Image.fromarray(pixels.squeeze(2).numpy() if mask else pixels.numpy()).save(path)


def test_folder_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    for i in range(8):
        write_picture(tmp_path / "data" / ("train", "val")[i % 2] / "ab"[i // 4] / f"{i}.png", 40, 50, i)
    arguments = ["--data", str(tmp_path / "data"), "--size", "32", "--batch", "4", "--steps", "1"]
    found = run(example("classification"), tmp_path / "out", monkeypatch, *arguments)
    assert 0 <= found["eval accuracy"][0] <= 1
    assert torch.load(tmp_path / "out" / "weights.pt")["head.op_list.3.linear.bias"].shape == (2,)


def test_folder_of_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that differ, smaller than a crop among them, and no multiples of the stride."""
    for i in range(10):
        size = (40 + 9 * i, 50 + i)
        write_picture(tmp_path / "data" / "images" / f"{i}.jpg", *size, i)
        write_picture(tmp_path / "data" / "masks" / f"{i}.png", *size, i, mask=True)
    arguments = ["--data", str(tmp_path / "data"), "--classes", "3", "--size", "64", "--batch", "3", "--steps", "2"]
    found = run(example("segmentation"), tmp_path / "out", monkeypatch, *arguments)
    assert 0 <= found["eval miou"][0] <= 1


def test_mean_iou_by_hand() -> None:
    """Two classes on four pixels of which one is ignored: right 1 of 3; IoU 0 / 2 and 1 / 3."""
    module = example("segmentation")

    class Says(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.0, 1.0])[None, :, None, None].expand(1, 2, *(side // 8 for side in x.shape[2:]))

    mask = torch.tensor([[0, 1, 0, module.IGNORED]])
    figures = module.mean_iou(Says(), [(torch.zeros(3, 1, 4), mask)], 2, Ranks())
    assert figures == pytest.approx({"miou": (0 + 1 / 3) / 2, "accuracy": 1 / 3})


def test_scenes_of_training_and_test_share_nothing() -> None:
    module = example("segmentation")
    train, test = module.Scenes(64, True, 8), module.Scenes(64, False, 8)
    seen = {digit.numpy().tobytes() for digit in train.digits}
    assert not any(digit.numpy().tobytes() in seen for digit in test.digits)
    widths = [(a.shape[2], b.shape[2]) for a, b in zip(train.photos, test.photos, strict=True)]
    assert widths == [(480, 160), (480, 160)]
    image, mask = train[0]
    assert image.shape == (3, 64, 64)
    assert mask.shape == (64, 64)
    assert mask.unique().numel() > 1


def test_photographs_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("super_resolution")
    train, tests = module.load_photos(None, None)
    assert [tuple(photo.shape) for photo in train] == [(3, 426, 480), (3, 426, 480)]
    assert tests["sklearn: china.jpg, right quarter"].shape == (3, 426, 160)
    assert "matplotlib: grace_hopper.jpg" in tests
    for i in range(2):
        write_picture(tmp_path / "photos" / f"{i}.png", 41, 52, i)
    monkeypatch.setattr(module, "LATENCY_SIZES", ((9, 10),))
    monkeypatch.setattr(module, "restormer", lambda: (nn.Conv2d(3, 3, 3, padding=1), "stands in"))
    folder, report = str(tmp_path / "photos"), tmp_path / "report.json"
    arguments = ["--data", folder, "--test", folder, "--report", str(report), *SMALL["super_resolution"]]
    found = run(module, tmp_path / "out", monkeypatch, *arguments, "--steps", "1")
    content = json.loads(report.read_text())
    assert content["means"]["psnr"] == pytest.approx(found["eval psnr"][0], abs=1e-3)
    assert content["steps_of_this_call"] == 1
    assert set(content["held_out"]) == {"0.png", "1.png"}
    stronger = max(content["means"][f"bicubic_{kernel}_psnr"] for kernel in ("a0.5", "a0.75"))
    assert content["means"][f"bicubic_{content['stronger_bicubic']}_psnr"] == stronger
    assert "scikit-image" in content["environment"]["photographs"]
    latency = content["cpu_latency"]
    assert (latency["least_of"], latency["Restormer"]) == (module.LATENCY_CALLS, "stands in")
    sizes = latency["sizes"]["9x10 -> 18x20"]
    assert module.macs(module.restormer()[0], 9, 10) == 3 * 3 * 9 * 90 / 1e9
    assert set(sizes) == {"efficientvit-sr-w0.75", "Restormer"}
    assert all(entry["ms"] > 0 for entry in sizes.values())


def test_bicubic_columns_are_what_they_say() -> None:
    """A model that interpolates with a = -0.5 has the figures of that column; a = -0.75 has others."""
    module = example("super_resolution")
    photo = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))
    row = dict(zip(module.COLUMNS, module.table(module.bicubic, {"a": photo}, Ranks())["a"], strict=True))
    assert (row["psnr"], row["ssim"]) == (row["bicubic_a0.5_psnr"], row["bicubic_a0.5_ssim"])
    assert row["psnr"] != row["bicubic_a0.75_psnr"]
    means = {"bicubic_a0.5_psnr": 30.0, "bicubic_a0.75_psnr": 31.0}
    assert module.stronger_bicubic(means) == "a0.75"
