"""What `python -m efficientvit_kernels bench` does: every row judged against float64, then timed; JSON, table, picture.

A row whose numbers fail gets no figures, and a run with such a row no summary.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.model_run import run_models
from benchmarks.peers import PEERS
from benchmarks.providers import Settings, Step, random_tensors, tensors
from benchmarks.registry import OPS, Op, Workload, make_workload, stage_flops
from benchmarks.shapes import SETS, Shape
from benchmarks.stages import official_stages, our_stages
from benchmarks.timing import ROUNDS, Samples, measure_roofs, median_seconds, ratios, rounds_for, shuffled_blocks
from efficientvit_kernels import LiteMLA, info
from efficientvit_kernels._info import _version
from efficientvit_kernels.testing import Verdict, native_calls, rule_t

RESULTS = Path(__file__).parent / "results"
PASSES = {"inference": (False,), "training": (True,), "both": (False, True)}
DEFAULT_PEERS = {"registry": ("eager", "eager_folded")}  # of the other sets: all
RUNTIMES = ("onnxruntime", "onnx", "onnxscript", "openvino")
AGAIN = "eager_again"  # the same module once more: its ratio to "eager" must be near 1
# A peer computes something else when it is beyond this relative error, and beyond four times that of eager.
PEER_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


def run_bench(arguments: argparse.Namespace) -> int:
    """0 when every row was right and ran natively, else 1."""
    for name in ("threads", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"bench: {name} must be positive, got {value}")
    if arguments.set == "models":
        return run_models(arguments, facts)
    if arguments.device != "cpu":
        raise ValueError(f"bench: device must be cpu for the set {arguments.set}, got {arguments.device}")
    sets, peers = _sets(arguments), _peers(arguments)
    output = _output(arguments)
    torch.set_num_threads(arguments.threads)
    content = facts(arguments, peers, f"{ROUNDS} or more") | {
        "left_out": {name: reason for name, _ in sets if (reason := OPS[name].why_not()) is not None},
        "rows": [],
    }
    report.print_head(content)
    for op_name, shapes in sets:
        if op_name in content["left_out"]:
            continue
        for shape in shapes:
            for training in PASSES[arguments.passes]:
                settings = Settings(getattr(torch, arguments.dtype), arguments.layout, arguments.threads, training)
                row = measure_row(
                    OPS[op_name], shape, settings, peers, arguments.rounds, arguments.stages, content["roofs"]
                )
                content["rows"].append(row)
                report.print_progress(row)
    content["summary"] = report.summary(content["rows"])
    report.print_report(content, arguments.markdown)
    report.write(content, output)
    return 1 if any("failed" in row for row in content["rows"]) else 0


def facts(arguments: argparse.Namespace, peers: tuple[str, ...], rounds: str) -> dict[str, Any]:
    """What was asked for, and on what it runs; `rounds` says how many where the options do not."""
    return {
        "set": arguments.set,
        "settings": {name: getattr(arguments, name) for name in ("threads", "dtype", "layout")}
        | {"rounds": arguments.rounds or rounds, "peers": peers},
        "environment": info().as_dict() | {"peers": {name: _version(name) for name in RUNTIMES}},
        "commit": commit(),
        "roofs": measure_roofs(arguments.rounds or ROUNDS),
    }


def measure_row(
    op: Op,
    shape: Shape,
    settings: Settings,
    peers: tuple[str, ...],
    rounds: int | None,
    stages: bool,
    roofs: dict[str, float],
) -> dict[str, Any]:
    work = make_workload(op, shape, settings, peers)
    flops, fewest = op.flops_of(shape, settings.training), op.fewest_bytes(shape, settings)
    floor = max(flops / roofs["mm_gflops"], fewest / roofs["copy_gb_per_s"]) / 1e9
    row: dict[str, Any] = {
        "op": op.name,
        "shape": asdict(shape),
        "pass": "training" if settings.training else "inference",
        "flops": flops,
        "fewest_bytes": fewest,
        "floor_ms": 1e3 * floor,
    }
    row |= check(work)
    row["left_out"] = work.left_out
    row["notes"] = {name: provider.note for name, provider in work.providers.items() if provider.note}
    if "failed" in row:
        return row
    rounds = rounds or rounds_for(work.providers["eager"].bind(*_fresh(work, 0)), settings.training)
    row["rounds"] = rounds
    row |= figures(_sample(work, rounds), flops)
    row["memory"] = memory(work)
    if stages and op.name == "lite_mla" and not settings.training:
        ours, eager = work.modules["ours"], work.modules["eager"]
        assert isinstance(ours, LiteMLA)
        row["stages"] = {
            "ours": our_stages(ours, shape, settings, stage_flops(shape), rounds),
            "eager": official_stages(eager, shape, settings, stage_flops(shape), rounds),
        }
    return row


def check(work: Workload) -> dict[str, Any]:
    """As `check_on`, for training on up to three inputs; what the earlier ones failed by is kept under "retried".

    Of the millions of q and k of a large layer, some lie within a rounding of 0, where relu has no derivative: the side
    that a rounding takes decides a whole term of a gradient, of ours or of eager's. A fault fails on every input.
    """
    retried: list[str] = []
    while True:
        result = check_on(work, -1 - len(retried)) | {"retried": retried}
        if "failed" not in result or not work.settings.training or len(retried) == 2:
            return result
        retried.append(result["failed"])


def check_on(work: Workload, number: int) -> dict[str, Any]:
    """Every output and gradient against float64: ours under rule T, with eager as its baseline; peers that compute
    something else are dropped from `work`."""
    training = work.settings.training
    inputs, grad_outs = _fresh(work, number)
    wide = [tensor.double() for tensor in inputs], [tensor.double() for tensor in grad_outs]
    with torch.set_grad_enabled(training):
        truth = tensors(work.truth.bind(*wide)())
        before = native_calls()
        ours = tensors(work.providers["ours"].bind(inputs, grad_outs)())
        native = native_calls() > before
        base = tensors(work.providers["eager"].bind(inputs, grad_outs)())
        errors = {"ours": _relative_error(ours, truth), "eager": _relative_error(base, truth)}
        for name in [name for name in work.providers if name not in errors]:
            try:
                errors[name] = _relative_error(tensors(work.providers[name].bind(inputs, grad_outs)()), truth)
            except Exception as error:  # torch.compile compiles here; whatever it raises, the other rows go on
                work.left_out[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
                del work.providers[name]
                continue
            if not errors[name] <= max(PEER_TOLERANCE[work.settings.dtype], 4 * errors["eager"]):
                work.left_out[name] = f"its results are wrong: relative error {errors[name]:.3g}"
                del work.providers[name]
    verdicts = dict(zip(_names(work), map(rule_t, ours, truth, base), strict=True))
    result: dict[str, Any] = {
        "checks": {name: asdict(verdict) | {"ok": verdict.ok} for name, verdict in verdicts.items()},
        "relative_errors": errors,
        "ran_natively": native,
    }
    wrong: dict[str, Verdict] = {name: verdict for name, verdict in verdicts.items() if not verdict.ok}
    if wrong:
        result["failed"] = "; ".join(f"{name}: {verdict}" for name, verdict in wrong.items())
    elif not native:
        result["failed"] = "ours did not run in native kernels"
    return result


def figures(samples: Samples, flops: float) -> dict[str, Any]:
    """Medians over all counted calls, and per peer the median over rounds of its time over ours; the best is the peer
    with the least of these."""
    medians = {name: median_seconds(blocks) for name, blocks in samples.items()}
    over = {name: ratios(samples[name], samples["ours"]) for name in samples if name not in ("ours", AGAIN)}
    speed_up = {name: statistics.median(values) for name, values in over.items()}
    return {
        "median_ms": {name: 1e3 * seconds for name, seconds in medians.items()},
        "best_ms": {name: 1e3 * min(map(min, blocks)) for name, blocks in samples.items()},
        "gflops": flops / medians["ours"] / 1e9,
        "speed_up_over": speed_up,
        "best_peer": min(speed_up, key=lambda name: speed_up[name]),
        "self_check": statistics.median(ratios(samples[AGAIN], samples["eager"])),
        "ratios": over,
        "samples_ms": {name: [[1e3 * value for value in block] for block in samples[name]] for name in samples},
    }


def memory(work: Workload) -> dict[str, Any]:
    inputs, grad_outs = _fresh(work, 0)
    given = sum(tensor.nbytes for tensor in inputs)
    result: dict[str, Any] = {"input_bytes": given}
    for name, module in work.modules.items():
        step = work.providers[name].bind(inputs, grad_outs)
        result[name] = {"peak_bytes": peak_bytes(step, work.settings.training)}
        if work.settings.training:
            saved = saved_bytes(module, inputs)
            result[name] |= {"saved_bytes": saved, "saved_over_input": saved / given}
    return result


def _sample(work: Workload, rounds: int) -> Samples:
    def bind(number: int) -> dict[str, Step]:
        inputs, grad_outs = _fresh(work, number)
        steps = {name: provider.bind(inputs, grad_outs) for name, provider in work.providers.items()}
        return steps | {AGAIN: work.providers["eager"].bind(inputs, grad_outs)}

    return shuffled_blocks(bind, rounds, work.settings.training)


def _fresh(work: Workload, number: int) -> tuple[list[Tensor], list[Tensor]]:
    """Random inputs and gradients of the outputs, other ones for each round."""
    dtype, layout = work.settings.dtype, work.settings.layout
    inputs = random_tensors(work.op.inputs(work.shape), dtype, layout, 2 * number + 2)
    if not work.settings.training:
        return inputs, []
    return inputs, random_tensors(work.op.outputs(work.shape), dtype, layout, 2 * number + 3)


def _names(work: Workload) -> list[str]:
    """Of what a step returns."""
    outputs = [f"output {i}" for i in range(len(work.op.outputs(work.shape)))]
    if not work.settings.training:
        return outputs
    inputs = [f"gradient of input {i}" for i in range(len(work.op.inputs(work.shape)))]
    return [*outputs, *inputs, *(f"gradient of {name}" for name, _ in work.modules["eager"].named_parameters())]


def _relative_error(results: list[Tensor], truth: list[Tensor]) -> float:
    pairs = zip(results, truth, strict=True)
    errors = [(result.double() - exact).abs().max() / exact.abs().max() for result, exact in pairs]
    return float(torch.stack(errors).detach().max())  # NaN if one is


def _sets(arguments: argparse.Namespace) -> list[tuple[str, list[Shape]]]:
    wanted = arguments.shape or []
    known = {shape.name for _, shapes in SETS[arguments.set] for shape in shapes}
    for name in wanted:
        if name not in known:
            raise ValueError(f"bench: shape must be one of {', '.join(sorted(known))}, got {name!r}")
    return [(op, [s for s in shapes if not wanted or s.name in wanted]) for op, shapes in SETS[arguments.set]]


def _peers(arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.peers is None:
        return DEFAULT_PEERS.get(arguments.set, PEERS)
    if arguments.peers == "all":
        return PEERS
    names = tuple(arguments.peers.split(","))
    for name in names:
        if name not in PEERS:
            raise ValueError(f"bench: peers must be all or some of {','.join(PEERS)}, got {name!r}")
    return names


def _output(arguments: argparse.Namespace) -> Path | None:
    """Only a whole set with all its peers and rounds is written without being asked for: it replaces such figures."""
    if arguments.output is not None:
        return Path(arguments.output)
    if arguments.shape or arguments.peers or arguments.rounds or arguments.set == "smoke":
        return None
    name = f"cpu_{arguments.set}_{arguments.passes}_{arguments.dtype}_{arguments.layout}_{arguments.threads}t.json"
    return RESULTS / name


def commit() -> str:
    """Of the source tree; "-dirty" when files differ from it."""
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
