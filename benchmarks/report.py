"""What a run shows: progress, tables as text or Markdown, a summary, and beside the JSON a picture of the speed-ups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.timing import geometric_mean

Row = dict[str, Any]

OURS_COLOUR, EAGER_COLOUR = "#d9480f", "#9aa5b1"


def print_head(content: dict[str, Any]) -> None:
    here, roofs = content["environment"], content["roofs"]
    isa = here["cpu_instruction_set"] or "no native kernels"
    settings = ", ".join(f"{name} {value}" for name, value in content["settings"].items() if name != "peers")
    print(f"{here['devices']['cpu']}, {isa}; torch {here['versions']['torch']}; commit {content['commit']}; {settings}")
    print(f"roofs: torch.mm {roofs['mm_gflops']:.1f} GFLOP/s, copy {roofs['copy_gb_per_s']:.1f} GB/s")
    for op, reason in content["left_out"].items():
        print(f"left out: {op}: {reason}")
    print(flush=True)


def print_progress(row: Row) -> None:
    name = f"{row['op']} {row['shape']['name']} {row['pass']}"
    if "failed" in row:
        print(f"{name}: FAILED: {row['failed']}", flush=True)
        return
    over_eager, over_best = row["speed_up_over"]["eager"], row["speed_up_over"][row["best_peer"]]
    print(
        f"{name}: ours {row['median_ms']['ours']:.3f} ms, {over_eager:.2f}x eager, "
        f"{over_best:.2f}x {row['best_peer']}; eager against itself {row['self_check']:.2f}",
        flush=True,
    )


def print_report(content: dict[str, Any], markdown: bool) -> None:
    rows = [row for row in content["rows"] if "failed" not in row]
    for op, of_pass in _groups(content["rows"]):
        here = [row for row in rows if (row["op"], row["pass"]) == (op, of_pass)]
        print(f"\n{op}, {of_pass}; medians in ms\n" if here else "", end="")
        print("\n".join(format_table(_lines(here), markdown)) if here else "", end="\n" if here else "")
        for row in here:
            if "stages" in row:
                _print_stages(row, markdown)
    for reason, names in _left_out(content["rows"]).items():
        print(f"\nleft out: {reason} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})", end="")
    print()
    for note in sorted({f"{name}: {note}" for row in rows for name, note in row["notes"].items()}):
        print(f"note: {note}")
    _print_summary(content["summary"])


def _print_summary(summary: list[Row] | None) -> None:
    if summary is None:
        print("\nNo summary: a row failed.")
        return
    for entry in summary:
        print(f"\n{entry['op']}, {entry['pass']}: geometric means over {entry['rows']} shape(s)")
        for what in ("best_peer", "eager"):
            over = entry[f"over_{what}"]
            least = f"least {over['minimum']:.3f} at {over['minimum_at']}"
            print(f"  over {what.replace('_', ' ')}: {over['geometric_mean']:.3f}; {least}")
        peers = ", ".join(f"{name} {value:.3f}" for name, value in entry["over_each_peer"].items())
        print(f"  over each peer: {peers}")
        own = entry["self_check"]
        print(f"  eager against itself: {own['geometric_mean']:.3f} ({own['minimum']:.3f} to {own['maximum']:.3f})")


def summary(rows: list[Row]) -> list[Row] | None:
    """Geometric means per op and pass, and the least; None when a row failed."""
    if any("failed" in row for row in rows):
        return None
    entries = []
    for op, of_pass in _groups(rows):
        here = [row for row in rows if (row["op"], row["pass"]) == (op, of_pass)]
        names = dict.fromkeys(name for row in here for name in row["speed_up_over"])
        own = [row["self_check"] for row in here]
        entries.append(
            {
                "op": op,
                "pass": of_pass,
                "rows": len(here),
                "over_best_peer": _over({_name(row): row["speed_up_over"][row["best_peer"]] for row in here}),
                "over_eager": _over({_name(row): row["speed_up_over"]["eager"] for row in here}),
                "over_each_peer": {
                    name: geometric_mean([r["speed_up_over"][name] for r in here if name in r["speed_up_over"]])
                    for name in names
                },
                "self_check": {"geometric_mean": geometric_mean(own), "minimum": min(own), "maximum": max(own)},
            }
        )
    return entries


def _over(by_shape: dict[str, float]) -> Row:
    least = min(by_shape, key=lambda name: by_shape[name])
    return {
        "geometric_mean": geometric_mean(list(by_shape.values())),
        "minimum": by_shape[least],
        "minimum_at": least,
    }


def _name(row: Row) -> str:
    return str(row["shape"]["name"])


def _groups(rows: list[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["op"], row["pass"]) for row in rows))


def _left_out(rows: list[Row]) -> dict[str, list[str]]:
    """ "peer: reason" -> the rows that lack it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for peer, reason in row["left_out"].items():
            found.setdefault(f"{peer}: {reason}", []).append(f"{row['op']} {_name(row)} {row['pass']}")
    return found


def _lines(rows: list[Row]) -> list[list[str]]:
    peers = list(dict.fromkeys(name for row in rows for name in row["speed_up_over"]))
    training = rows[0]["pass"] == "training"
    heads = ["shape", "ours", "GFLOP/s", "floor", *peers, "best peer", "over it", "over eager", "itself"]
    heads += ["peak MiB", *(["saved / input"] if training else [])]
    lines = [heads]
    for row in rows:
        times, memory = row["median_ms"], row["memory"]
        line = [_name(row), f"{times['ours']:.3f}", f"{row['gflops']:.1f}", f"{row['floor_ms']:.3f}"]
        line += [f"{times[name]:.3f}" if name in times else "-" for name in peers]
        line += [row["best_peer"], f"{row['speed_up_over'][row['best_peer']]:.2f}x"]
        line += [f"{row['speed_up_over']['eager']:.2f}x", f"{row['self_check']:.2f}"]
        ours, eager = memory["ours"], memory["eager"]
        line.append(f"{ours['peak_bytes'] / 2**20:.1f} / {eager['peak_bytes'] / 2**20:.1f}")
        if training:
            line.append(f"{ours['saved_over_input']:.1f} / {eager['saved_over_input']:.1f}")
        lines.append(line)
    return lines


def _print_stages(row: Row, markdown: bool) -> None:
    for who, stages in row["stages"].items():
        print(f"\nstages of {_name(row)}, {who}\n")
        lines = [["stage", "ms", "GFLOP/s", "share"]]
        for stage in stages:
            gflops = "-" if stage["gflops"] is None else f"{stage['gflops']:.1f}"
            lines.append([stage["stage"], f"{stage['ms']:.3f}", gflops, f"{stage['share']:.0%}"])
        print("\n".join(format_table(lines, markdown)))


def format_table(lines: list[list[str]], markdown: bool) -> list[str]:
    """The first line holds the heads. As text the first column is aligned left, the others right."""
    if markdown:
        rule = ["---", *["---:"] * (len(lines[0]) - 1)]
        return [f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        texts.append("  ".join([line[0].ljust(widths[0]), *cells]))
    return [texts[0], "-" * len(texts[0]), *texts[1:]]


def write(content: dict[str, Any], output: Path | None) -> None:
    if output is None:
        print("\nNot written: name a file with --output (a whole set with all its peers and rounds needs none).")
        return
    write_json(content, output)
    print(f"\nWritten: {output}")
    if content["summary"]:
        try:
            draw(output.with_suffix(".png"), content)
        except ImportError:
            print("No picture: matplotlib is not installed.")


def write_json(content: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(_rounded(content), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Six significant digits are more than a timer has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def draw(path: Path, content: dict[str, Any]) -> None:
    """Bars per row: ours over eager, and over the best peer where that is another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    groups = _groups(content["rows"])
    figure = Figure(figsize=(14, 4.5 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    here = content["environment"]
    figure.suptitle(
        f"{here['devices']['cpu']}, {content['settings']['threads']} thread(s), {content['settings']['dtype']}"
    )
    for axes, (op, of_pass) in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups, strict=True):
        rows = [row for row in content["rows"] if (row["op"], row["pass"]) == (op, of_pass)]
        places = range(len(rows))
        eager = [row["speed_up_over"]["eager"] for row in rows]
        best = [row["speed_up_over"][row["best_peer"]] for row in rows]
        axes.bar([place - 0.2 for place in places], eager, 0.4, color=EAGER_COLOUR, label="over eager")
        axes.bar([place + 0.2 for place in places], best, 0.4, color=OURS_COLOUR, label="over the best peer")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(list(places), [_name(row) for row in rows], rotation=30, ha="right", fontsize=8)
        axes.set_ylabel("speed-up")
        axes.set_title(f"{op}, {of_pass}")
        axes.legend()
    figure.savefig(path, dpi=110)
    print(f"Written: {path}")
