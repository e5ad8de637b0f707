"""What the demo shows: a table on the terminal, a picture (PNG) and the same figures as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._info import info

if TYPE_CHECKING:
    from .demo import Row

REFERENCE_COLOUR, FUSED_COLOUR = "#9aa5b1", "#d9480f"


def write_report(
    folder: Path, model: str, source: str, photo: Tensor, rows: list[Row], native: bool, pretrained: bool
) -> None:
    """Prints the table and writes demo.png and demo.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = "pretrained weights" if pretrained else "random weights, BatchNorm calibrated on the photograph"
    title = f"{model} ({weights}), input {list(rows[-1].shape)} from {source}"
    here = info()
    print(f"\n{title}\n{device_text(here.as_dict())}\n\n{table(rows)}\n")
    print("error: largest difference from float64. official: that of the original module. Rule T allows the budget.")
    print("peak MiB: most memory allocated at once during one call, beside weights and input.\n")
    if not native:
        reason = here.missing.get("cpu", "the reference served the calls")
        print(f"The fused path did NOT run in native kernels: {reason}")
    failed = [row.name for row in rows if not row.ok]
    print(f"Numbers do NOT agree: {', '.join(failed)}" if failed else "All numbers agree under rule T.")
    content = {
        "title": title,
        "environment": here.as_dict(),
        "ran_natively": native,
        "numbers_agree": not failed,
        "rows": [{**asdict(row), "ok": row.ok} for row in rows],
    }
    (folder / "demo.json").write_text(json.dumps(content, indent=2) + "\n")
    draw(folder / "demo.png", title, device_text(here.as_dict()), photo, rows)
    print(f"Written: {folder / 'demo.png'}, {folder / 'demo.json'}")


def device_text(environment: dict[str, Any]) -> str:
    isa, threads = environment["cpu_instruction_set"] or "no native kernels", environment["threads"]
    return f"{environment['devices']['cpu']}, {threads} thread(s), {isa}; torch {environment['versions']['torch']}"


def table(rows: list[Row]) -> str:
    heads = ("layer", "input", "error", "official", "budget", "grad", "ref ms", "fused ms", "speed-up", "peak MiB")
    lines = [heads]
    for row in rows:
        grad = "" if row.grad_input is None else "ok" if row.grad_input.ok else "FAILED"
        error = f"{row.output.error:.2e}" + ("" if row.output.ok else " FAILED")
        lines.append(
            (
                row.name,
                "x".join(map(str, row.shape)),
                error,
                f"{row.output.baseline_error:.2e}",
                f"{row.output.budget:.2e}",
                grad,
                f"{row.reference_ms:.2f}",
                f"{row.fused_ms:.2f}",
                f"{row.speed_up:.2f}x",
                f"{row.reference_mib:.1f} -> {row.fused_mib:.1f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def draw(path: Path, title: str, device: str, photo: Tensor, rows: list[Row]) -> None:
    """The photograph, times and errors side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(15, 6), layout="constrained")
    FigureCanvasAgg(figure)
    picture, times, errors = figure.subplots(1, 3, width_ratios=[1, 1.4, 1.2])
    picture.imshow(photo[0].permute(1, 2, 0).clamp(0, 1).numpy())
    picture.set_axis_off()
    picture.set_title("input")
    labels = [row.name.replace("context_module.", "") for row in rows]
    places = range(len(rows))
    old = {"color": REFERENCE_COLOUR, "label": "reference"}
    new = {"color": FUSED_COLOUR, "label": "fused"}
    times.barh([p - 0.2 for p in places], [row.reference_ms for row in rows], 0.38, **old)
    bars = times.barh([p + 0.2 for p in places], [row.fused_ms for row in rows], 0.38, **new)
    times.bar_label(bars, [f" {row.speed_up:.2f}x" for row in rows])
    times.set_xscale("log")
    times.set_xlim(min(row.fused_ms for row in rows) / 3, 3 * max(row.reference_ms for row in rows))
    times.xaxis.set_minor_formatter(NullFormatter())
    times.set_xlabel("time per call, ms")
    errors.scatter([max(row.output.baseline_error, 1e-12) for row in rows], places, **old)
    errors.scatter([max(row.output.error, 1e-12) for row in rows], places, marker="x", **new)
    errors.scatter([row.output.budget for row in rows], places, color="black", marker="|", s=200, label="allowed")
    errors.set_xscale("log")
    errors.set_xlabel("largest error against float64")
    for axes in (times, errors):
        axes.set_yticks(list(places), labels if axes is times else [""] * len(rows))
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="best")
    figure.suptitle(f"{title}\n{device}", fontsize=10)
    figure.savefig(path, dpi=110)
