"""Every op and backend on the device against float64, under rule T, T3, T4, T5 and the large magnitudes of E4.

The base of rule T is whichever errs more of the official formula and the specification in the same dtype: for N <= D
official gradients may cancel to no error at all. What misses it is judged on two more inputs: a q or k within a
rounding of 0 decides a whole term of a gradient, and of few numbers the base's error is luck; a fault fails on every
input. NaN or inf in the wrong places, and outputs beyond FORGIVEN times the budget, are not judged again. Products of
float32 are IEEE float32.
"""

from __future__ import annotations

import importlib.util
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import device
from benchmarks.gpu.calls import (
    DTYPES,
    LAYOUTS,
    OPS,
    Arguments,
    Results,
    Sample,
    mapped,
    of_shape,
    proof_of_native,
    results,
    runnable,
    served,
)
from benchmarks.gpu.edges import edge_cases, integer_cases, zero_cases
from benchmarks.gpu.parts import Context, FailedError, NotRunError, Step
from benchmarks.gpu.store import ROOT
from benchmarks.shapes import GPU_FIRST, REGISTRY
from efficientvit_kernels.reference.relu_linear_attention import output_format
from efficientvit_kernels.testing import Verdict, rule_t

HEAD_DIMS = (8, 16, 32, 40, 64, 112, 128, 160)
TRIES = 3
FORGIVEN = 3.0
LARGEST_IMAGES = 8  # of the shapes with many: float64 truths of the rest would take the whole limit
FUZZ_S = 45.0
PYTEST_S = 240.0


def steps(context: Context) -> list[Step]:
    backends = [*runnable(context.device), "reference"]
    groups: dict[str, Callable[..., dict[str, Any]]] = {
        "head dims": partial(judged, head_dim_samples),
        "layouts": partial(judged, layout_samples),
        "edges": edges,
        "official layers": partial(judged, official_samples),
    }
    found = []
    for group, run in groups.items():
        for backend in backends:
            for op in OPS:
                for dtype in (*DTYPES, torch.float64):
                    if backend == "reference" and (group not in ("head dims", "edges") or dtype not in DTYPES[::2]):
                        continue  # plain torch: enough to see that the harness and the device agree
                    name = f"{group}: {op}, {backend}, {name_of(dtype)}"
                    found.append(Step(name, partial(run, op, backend, dtype)))
    fuzzed = [backend for backend in backends if backend != "reference"] or ["reference"]
    found.append(Step("pytest -m gpu", run_pytest, 30.0))
    return found + [
        Step(f"fuzz: {op}, {backend}", partial(fuzz, op, backend), 10.0) for op in OPS for backend in fuzzed
    ]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def head_dim_samples(op: str, context: Context) -> Iterator[Sample]:
    for dim in HEAD_DIMS[:2] if context.quick else HEAD_DIMS:
        yield Sample(op, head_dim=dim, extras=True)
        yield Sample(op, 1, 3, dim, 1, 1)
        yield Sample(op, 1, 2, dim, 17, 19, kernels=(3, 5))
        if not context.quick:
            yield Sample(op, 2, 1, dim, 33, 65, layout="channels_last")
            yield Sample(op, 1, 2, dim, 4, 5, kernels=() if op != "multiscale_aggregate" else (7,))


def layout_samples(op: str, context: Context) -> Iterator[Sample]:
    for layout in LAYOUTS[:3] if context.quick else LAYOUTS:
        for dim in (16,) if context.quick else (16, 32):
            yield Sample(op, 2, 3, dim, 14, 13, kernels=(3, 5), layout=layout, extras=True)
    if context.quick:
        return
    for height, width in ((1, 700), (700, 1), (3, 300), (31, 33), (64, 64), (1, 5000)):
        yield Sample(op, 1, 2, 16, height, width)
    for batch in (5, 33):
        yield Sample(op, batch, 1, 8, 7, 7)


def official_samples(op: str, context: Context) -> Iterator[Sample]:
    shapes = REGISTRY[:1] if context.quick else dict.fromkeys((*GPU_FIRST, *REGISTRY))
    for shape in shapes:
        if op == "multiscale_aggregate" and not shape.scales:
            continue
        for layout in ("nchw",) if context.quick else ("nchw", "channels_last"):
            yield of_shape(op, shape, layout=layout, batch=min(shape.batch, LARGEST_IMAGES))


@dataclass
class Tally:
    """The worst of many verdicts, per result; and the failures."""

    share: dict[str, float] = field(default_factory=dict)  # of the budget of rule T
    where: dict[str, str] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)  # error over the base's, for T2
    failed: list[str] = field(default_factory=list)
    retried: list[str] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)  # samples that the backend does not serve
    samples: int = 0
    left: int = 0

    def add(self, sample: Sample, verdicts: dict[str, Verdict]) -> None:
        self.samples += 1
        for name, verdict in verdicts.items():
            kind = name.split("[")[0]
            share = verdict.error / verdict.budget if verdict.budget else float(verdict.error != 0)
            if not share <= self.share.get(kind, -1.0):
                self.share[kind], self.where[kind] = share, str(sample)
            if verdict.baseline_error:
                self.ratios.setdefault(kind, []).append(verdict.ratio)
            if not verdict.ok:
                self.failed.append(f"{sample}: {name}: {verdict}")

    def result(self) -> dict[str, Any]:
        if self.not_run and not self.samples:
            raise NotRunError(next(iter(self.not_run.values())))
        found: dict[str, Any] = {
            "samples": self.samples,
            "worst_share_of_budget": self.share,
            "worst_at": self.where,
            "median_ratio": {kind: sorted(values)[len(values) // 2] for kind, values in self.ratios.items()},
            "retried": self.retried[:20],
        } | ({"samples_left": self.left} if self.left else {})
        found |= {"not_run": self.not_run} if self.not_run else {}
        if self.failed:
            raise FailedError(f"{len(self.failed)} results; {self.failed[0]}", found | {"failed": self.failed[:20]})
        return found


Samples = Callable[[str, Context], Iterator[Sample]]


def judged(samples: Samples, op: str, backend: str, dtype: torch.dtype, context: Context) -> dict[str, Any]:
    """Rule T, forward and backward, on every sample; those for which no time is left are counted."""
    tally = Tally()
    with device.tf32(False):
        for sample in samples(op, context):
            if context.left() < 0:
                tally.left += 1
                continue
            judge_into(tally, sample, backend, dtype, context)
    return tally.result()


def judge_into(tally: Tally, sample: Sample, backend: str, dtype: torch.dtype, context: Context) -> None:
    for seed in range(TRIES):
        try:
            verdicts = judge(sample, backend, dtype, context, seed)
        except NotRunError as reason:
            tally.not_run[f"{sample}, {name_of(dtype)}"] = str(reason)
            return
        wrong = [name for name, verdict in verdicts.items() if not verdict.ok]
        if not wrong or seed == TRIES - 1 or not all(forgivable(name, verdicts[name]) for name in wrong):
            break
        tally.retried.append(f"{sample}, seed {seed}: {', '.join(wrong)}")
    tally.add(sample, verdicts)


def forgivable(name: str, verdict: Verdict) -> bool:
    small = verdict.error <= FORGIVEN * verdict.budget
    return verdict.masks_agree and (small or (name.startswith("grad_") and math.isfinite(verdict.error)))


def judge(sample: Sample, backend: str, dtype: torch.dtype, context: Context, seed: int = 0) -> dict[str, Verdict]:
    arguments = sample.make(dtype, context.device, seed)
    with proof_of_native(backend):
        ours = results(served(sample.op, backend), arguments, True, dtype)
    check_form(sample, ours, arguments, dtype)
    return verdicts_of(sample.op, ours, arguments, dtype)


def verdicts_of(
    op: str, ours: Results, arguments: Arguments, dtype: torch.dtype, grad_scale: float = 1.0
) -> dict[str, Verdict]:
    def evaluate(function: Callable[..., Any], wide: torch.dtype) -> Results:
        return results(function, mapped(arguments, lambda x: x.to(wide)), True, dtype, grad_scale)

    functions = OPS[op]
    truth = evaluate(functions.reference, torch.float64)
    # Not `evaluate`: the epilogue's vectors keep their float32.
    bases = [results(f, arguments, True, dtype, grad_scale) for f in (functions.official, functions.reference)]
    if not all(bool(torch.isfinite(base).all()) for base in bases[0].values()):
        bases.append(evaluate(functions.official, torch.float32))
    verdicts = {}
    for name, result in ours.items():
        finite = [base[name] for base in bases if bool(torch.isfinite(base[name]).all())]
        base = max(finite, key=lambda x, name=name: largest_error(x, truth[name])) if finite else bases[0][name]  # type: ignore[misc]
        verdicts[name] = rule_t(result, truth[name], base)
    return verdicts


def largest_error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).abs().max()) if truth.numel() else 0.0


def check_form(sample: Sample, ours: Results, arguments: Arguments, dtype: torch.dtype) -> None:
    """Dtypes, and the memory format of the outputs."""
    first = arguments["x"] if "x" in arguments else arguments["qkv"]
    like = first[0] if isinstance(first, list) else first
    for name, result in ours.items():
        vectors = ("grad_proj_scale", "grad_proj_shift")
        expected = torch.promote_types(dtype, torch.float32) if name in vectors else dtype
        if result.dtype != expected:
            raise FailedError(f"{sample}: {name} must be of dtype {expected}, got {result.dtype}")
        if name.startswith("out") and not result.is_contiguous(memory_format=output_format(like)):
            raise FailedError(f"{sample}: {name} must be in memory format {output_format(like)}, got {result.stride()}")


def edges(op: str, backend: str, dtype: torch.dtype, context: Context) -> dict[str, Any]:
    """T3, T4, T5, E4, empty batches: each by name; all are tried before the step fails."""
    cases: dict[str, Callable[[], str | None]] = {}
    with device.tf32(False):
        for maker in (edge_cases, zero_cases, integer_cases):
            cases |= maker(op, backend, dtype, context)
        cases["E4: magnitudes up to 3e4"] = partial(large_magnitudes, op, backend, dtype, context)
        outcome = {name: outcome_of(case) for name, case in cases.items()}
    if all(text.startswith("not run: ") for text in outcome.values()):
        raise NotRunError(next(iter(outcome.values())).removeprefix("not run: "))
    wrong = {name: text for name, text in outcome.items() if text != "ok" and not text.startswith("not run")}
    if wrong:
        raise FailedError("; ".join(f"{name}: {text}" for name, text in wrong.items())[:500], outcome)
    return outcome


def outcome_of(case: Callable[[], str | None]) -> str:
    try:
        return case() or "ok"
    except NotRunError as reason:
        return f"not run: {reason}"


def large_magnitudes(op: str, backend: str, dtype: torch.dtype, context: Context) -> str | None:
    """Rule T for inputs as large as float16 holds, where the official formula in float16 may not be finite."""
    if op == "lite_mla":
        return "not run: qkv overflows in float16, in the official module as well"
    sample = Sample(op, 2, 2, 16, 13, 11, scale=7e3)
    arguments = mapped(sample.make(dtype, context.device), lambda x: x.clamp(-3e4, 3e4))
    if op == "multiscale_aggregate":
        # Sums of 25 x 16 terms stay inside float16's range with weights that are small enough.
        for name in ("depthwise_weights", "pointwise_weights"):
            arguments[name] = [weight * 0.25 for weight in arguments[name]]
    ours = results(served(op, backend), arguments, True, dtype, 2.0**-6)
    verdicts = verdicts_of(op, ours, arguments, dtype, 2.0**-6)
    wrong = [f"{name}: {verdict}" for name, verdict in verdicts.items() if not verdict.ok]
    return "; ".join(wrong) or None


def fuzz(op: str, backend: str, context: Context) -> dict[str, Any]:
    """Random small samples under rule T, as many as the time allows; 16-bit dtypes twice as often as float32."""
    tally, chosen, counts = Tally(), random.Random(0), {name_of(dtype): 0 for dtype in DTYPES}
    end = time.monotonic() + context.budget(FUZZ_S)
    with device.tf32(False):
        while time.monotonic() < end or not (tally.samples or tally.not_run):
            dtype = chosen.choice((torch.float16, torch.float16, torch.bfloat16, torch.bfloat16, torch.float32))
            judge_into(tally, random_sample(op, chosen), backend, dtype, context)
            counts[name_of(dtype)] += 1
    return tally.result() | {"counts": counts}


def random_sample(op: str, chosen: random.Random) -> Sample:
    dim = chosen.choice((1, 4, 5, 8, 12, 16, 16, 24, 32, 32, 33, 40, 64))
    side = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65]
    sizes = [(1, 2, 5), (3,), (5,), (3, 5), (1, 3), (7,)]
    return Sample(
        op,
        chosen.choice((1, 1, 2, 3, 5, 33)),
        chosen.choice((1, 2, 3)),
        dim,
        chosen.choice(side),
        chosen.choice(side[:11]),
        chosen.choice(sizes[1:]),
        chosen.choice(LAYOUTS),
        extras=chosen.random() < 0.5,
    )


def run_pytest(context: Context) -> dict[str, Any]:
    """The tests that are marked gpu, in a process of its own, where pytest is installed."""
    if importlib.util.find_spec("pytest") is None:
        raise NotRunError("pytest is not installed")
    if not context.on_gpu:
        raise NotRunError("needs a GPU")
    # Without the CPU library the package warns at import, which the tests' own settings make an error.
    words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    process = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=max(1.0, min(PYTEST_S, context.left())),
        check=False,
    )
    lines = (process.stdout + process.stderr).strip().splitlines()
    result = {"status": process.returncode, "summary": lines[-1:] and lines[-1]}
    if process.returncode == 5:
        raise NotRunError("no test is marked gpu")
    if process.returncode:
        raise FailedError(str(result["summary"]), result | {"output": lines[-60:]})
    return result
