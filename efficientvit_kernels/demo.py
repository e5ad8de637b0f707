"""The demo: a timm EfficientViT on a real photograph, reference and fused side by side, judged and timed."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .testing import Verdict
from .verify import Twins, calibrate_batch_norms, load_model, make_twins, verify_twins

# glibc gives large buffers back to the system after every call and takes fresh, zeroed pages for the next: in a short
# run those page faults cost more than the arithmetic. These settings keep the memory, for both sides alike.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "10000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "KINETO_LOG_LEVEL": "99",  # torch's profiler, asked for the memory, reports its own start and stop otherwise
}


@dataclass(frozen=True)
class Row:
    """One LiteMLA layer, or the whole model: reference against fused."""

    name: str
    shape: tuple[int, ...]
    output: Verdict
    grad_input: Verdict | None
    reference_ms: float = 0.0
    fused_ms: float = 0.0
    speed_up: float = 0.0  # median over rounds of the ratio in one round
    reference_mib: float = 0.0
    fused_mib: float = 0.0

    @property
    def ok(self) -> bool:
        return self.output.ok and (self.grad_input is None or self.grad_input.ok)


def run_demo(arguments: argparse.Namespace) -> int:
    """Runs the demo; 0 when every number agrees and the fused path ran natively, else 1."""
    if any(name not in os.environ for name in ENVIRONMENT) and sys.platform == "linux":
        os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
        os.execv(sys.executable, [sys.executable, "-m", "efficientvit_kernels", *sys.argv[1:]])
    for name in ("batch", "rounds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"demo: {name} must be positive, got {getattr(arguments, name)}")
    if arguments.size < 32:
        raise ValueError(f"demo: size must be at least 32, got {arguments.size}")
    from tqdm import tqdm

    from ._demo_report import write_report

    photo, source = load_photo(arguments.image, arguments.size)
    x = normalise(photo).expand(arguments.batch, -1, -1, -1).contiguous()
    model = load_model(arguments.model, pretrained=arguments.pretrained)
    if not arguments.pretrained:
        calibrate_batch_norms(model, x)
    twins = make_twins(model)
    with tqdm(total=2 + 2 * len(twins.report.swapped), unit="step", file=sys.stderr) as bar:

        def step(text: str) -> None:
            bar.set_description(text)
            bar.update()

        rows, native = judge_all(twins, x, arguments.rounds, step)
    write_report(Path(arguments.output), arguments.model, source, photo, rows, native, arguments.pretrained)
    return 0 if native and all(row.ok for row in rows) else 1


def judge_all(twins: Twins, x: Tensor, rounds: int, step: Callable[[str], None]) -> tuple[list[Row], bool]:
    """One row per layer and one for the model; and whether every fused layer ran in a native kernel."""
    result = verify_twins(twins, x, step)
    rows = [Row(layer.name, layer.shape, layer.output, layer.grad_input) for layer in result.layers]
    rows.append(Row("whole model", tuple(x.shape), result.output, None))
    inputs = {**result.inputs, "whole model": x}
    timed = []
    for row in rows:
        step(f"{row.name}: time and memory")
        timed.append(measure(row, *pair_of(twins, row.name), inputs[row.name], rounds))
    return timed, result.ran_natively


def pair_of(twins: Twins, name: str) -> tuple[nn.Module, nn.Module]:
    if name == "whole model":
        return twins.original, twins.fused
    return twins.original.get_submodule(name), twins.fused.get_submodule(name)


def measure(row: Row, reference: nn.Module, fused: nn.Module, x: Tensor, rounds: int) -> Row:
    """Time and peak memory of both, in inference, in turns so that both meet the same disturbances."""
    with torch.no_grad():
        once = min(_seconds(reference, x, 1) for _ in range(3))
        repeats = max(1, min(50, int(0.02 / once)))
        pairs = [(_seconds(reference, x, repeats), _seconds(fused, x, repeats)) for _ in range(rounds)]
        return replace(
            row,
            reference_ms=1e3 * statistics.median(pair[0] for pair in pairs),
            fused_ms=1e3 * statistics.median(pair[1] for pair in pairs),
            speed_up=statistics.median(pair[0] / pair[1] for pair in pairs),
            reference_mib=peak_mib(reference, x),
            fused_mib=peak_mib(fused, x),
        )


def _seconds(module: nn.Module, x: Tensor, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        module(x)
    return (time.perf_counter() - start) / repeats


def peak_mib(module: nn.Module, x: Tensor) -> float:
    """Largest memory allocated at once by one call, beside weights and input, in MiB; kernels' buffers count."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        module(x)
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return float(peak / 2**20)


def load_photo(path: str | None, size: int) -> tuple[Tensor, str]:
    """A photograph as [1, 3, size, size] in [0, 1], its largest central square; and what it is."""
    import numpy as np
    from PIL import Image

    if path is None:
        import matplotlib.cbook

        sample = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
        with Image.open(str(sample)) as opened:
            image = opened.convert("RGB")
        source = "grace_hopper.jpg, the sample photograph of matplotlib"
    else:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        source = Path(path).name
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(square).copy())
    return pixels.permute(2, 0, 1).unsqueeze(0).float() / 255, source


def normalise(photo: Tensor) -> Tensor:
    """ImageNet mean and standard deviation per channel."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return (photo - mean) / std
