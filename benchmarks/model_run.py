"""What `bench --set models` prints and writes; the measuring is in `models.py`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import LEAST_ROUNDS, MOST_ROUNDS, PEERS, cases_of, check_options, measure_model
from benchmarks.providers import Settings
from benchmarks.report import format_table, print_head, write_json
from benchmarks.timing import geometric_mean

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Facts = Callable[[argparse.Namespace, tuple[str, ...], str], dict[str, Any]]


def run_models(arguments: argparse.Namespace, facts: Facts) -> int:
    """0 when every model was right and ran natively, else 1. What is measured is on disk after every model."""
    peers, cases = check_options(arguments), cases_of(arguments.device, arguments.shape)
    torch.set_num_threads(arguments.threads)
    settings = Settings(getattr(torch, arguments.dtype), arguments.layout, arguments.threads)
    output = _output(arguments)
    content = facts(arguments, peers, f"{LEAST_ROUNDS} to {MOST_ROUNDS}") | {"left_out": {}, "rows": []}
    print_head(content)
    for case in cases:
        row = measure_model(case, settings, arguments.device, peers, arguments.rounds)
        content["rows"].append(row)
        print_progress(row)
        content["summary"] = summary(content["rows"])
        if output is not None:
            write_json(content, output)
    print_tables(content["rows"], arguments.markdown)
    print(f"\nWritten: {output}" if output else "\nNot written: name a file with --output.")
    return 1 if any("failed" in row for row in content["rows"]) else 0


def _output(arguments: argparse.Namespace) -> Path | None:
    """Only the whole set with all its peers and rounds is written without being asked for."""
    if arguments.output is not None:
        return Path(arguments.output)
    if arguments.shape or arguments.rounds or arguments.peers not in (None, "all"):
        return None
    name = f"{arguments.device}_models_inference_{arguments.dtype}_{arguments.layout}_{arguments.threads}t.json"
    return RESULTS / name


def print_progress(row: Row) -> None:
    name = row["case"]["name"]
    if "failed" in row:
        print(f"{name}: FAILED: {row['failed']}", flush=True)
        return
    print(
        f"{name}: ours {row['median_ms']['ours']:.1f} ms, {row['measured']:.3f}x eager, predicted "
        f"{row['predicted']:.3f}x; eager against itself {row['self_check']:.2f}",
        flush=True,
    )


def summary(rows: list[Row]) -> dict[str, Any] | None:
    """None when a row failed."""
    if any("failed" in row for row in rows):
        return None
    measured = {row["case"]["name"]: row["measured"] for row in rows}
    slowest = min(measured, key=lambda name: measured[name])
    return {
        "rows": len(rows),
        "over_eager": geometric_mean(list(measured.values())),
        "least_over_eager": measured[slowest],
        "least_at": slowest,
        "predicted": geometric_mean([row["predicted"] for row in rows]),
        "best_of_ours_over_best_peer": geometric_mean([row["best_of_ours_over_best_peer"] for row in rows]),
    }


def print_tables(rows: list[Row], markdown: bool) -> None:
    here = [row for row in rows if "failed" not in row]
    for title, lines in (
        ("medians in ms", time_lines(here)),
        ("what LiteMLA's share and speed-up predict, and what came of it", prediction_lines(here)),
        (
            "the same in processor time",
            prediction_lines([r | r["processor_time"] for r in here if "processor_time" in r]),
        ),
        ("peak memory in MiB, beside weights and input", memory_lines(here)),
    ):
        if len(lines) > 1:
            print(f"\n{title}\n")
            print("\n".join(format_table(lines, markdown)))
    left_out = {f"{name}: {reason}" for row in rows for name, reason in row["left_out"].items()}
    notes = {f"{name}: {note}" for row in rows for name, note in row.get("notes", {}).items()}
    for word, texts in (("left out", left_out), ("note", notes)):
        for text in sorted(texts):
            print(f"\n{word}: {text}", end="")
    print()


def time_lines(rows: list[Row]) -> list[list[str]]:
    names = [*PEERS, "ours", "ours_folded", "ours_compiled"]
    names = [name for name in names if any(name in row["median_ms"] for row in rows)]
    lines = [["model", *names, "itself", "best of ours / best peer"]]
    for row in rows:
        times = row["median_ms"]
        line = [row["case"]["name"], *(f"{times[name]:.1f}" if name in times else "-" for name in names)]
        best = f"{row['best_of_ours_over_best_peer']:.2f}x ({row['fastest_of_ours']}, {row['best_peer']})"
        lines.append([*line, f"{row['self_check']:.2f}", best])
    return lines


def prediction_lines(rows: list[Row]) -> list[list[str]]:
    heads = ["model", "LiteMLAs", "share", "their speed-up", "predicted", "measured", "gain reached", "5 to 95 %"]
    lines = [[*heads, "in the model: speed-up", "predicted", "rest, eager / ours"]]
    for row in rows:
        low, high = row["gain_reached_interval"]
        line = [row["case"]["name"], str(row["lite_mlas"]), f"{row['share']:.1%}", f"{row['layers_speed_up']:.2f}x"]
        line += [f"{row['predicted']:.3f}x", f"{row['measured']:.3f}x", f"{row['gain_reached']:.0%}"]
        line.append(f"{low:.0%} to {high:.0%}")
        within = row.get("inside")
        line += (
            [
                f"{within['layers_speed_up']:.2f}x",
                f"{within['predicted']:.3f}x",
                f"{within['rest_eager_over_ours']:.3f}",
            ]
            if within
            else ["-"] * 3
        )
        lines.append(line)
    return lines


def memory_lines(rows: list[Row]) -> list[list[str]]:
    names = list(dict.fromkeys(name for row in rows for name in row["memory"]))
    return [["model", *names]] + [
        [row["case"]["name"], *(f"{row['memory'][n] / 2**20:.1f}" if n in row["memory"] else "-" for n in names)]
        for row in rows
    ]
