"""What the parts of the GPU script do, on a CPU: quick runs, planted mistakes, reports, plans."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bench, calls, correctness, facts, large, parts, repeats, rows, runtime, sanitize, tune
from benchmarks.gpu.parts import PARTS, Context, FailedError, Step
from benchmarks.shapes import GPU_FIRST, GPU_REST, REGISTRY, SMOKE
from tests.gpu_stand_in import stand_in
from tests.processes import python


@pytest.fixture
def context() -> Context:
    return Context("cpu", quick=True)


def run_quick(part: str, folder: Path) -> dict[str, Any]:
    assert command.main([part, "--device", "cpu", "--quick", "--out", str(folder)]) == 0
    content: dict[str, Any] = json.loads((folder / f"{part}.json").read_text())
    assert content["part"] == part
    assert len(content["sources"]) == 16
    assert content["left"] == []
    assert content["running"] is None
    reasons = {entry["reason"] for entry in content["steps"].values() if entry["status"] == "not_run"}
    assert all(reasons), "what cannot run here says why"
    return content["steps"]  # type: ignore[no-any-return]


def results_of(steps: dict[str, Any]) -> dict[str, Any]:
    return {name: entry["result"] for name, entry in steps.items() if entry["status"] == "ok"}


def test_facts_on_the_cpu(tmp_path: Path, fresh_compiler: None) -> None:
    found = results_of(run_quick("facts", tmp_path))
    assert all(entry["gb_per_s"] > 0 for entry in found["copy"].values())
    assert all(entry["tflops"] > 0 for entry in found["matrix products"].values())
    assert found["launch costs"]["torch add_: in a stream"] > 0
    eager = found["eager inference bfloat16, smoke"]
    expected = {f"{kind} {layout} | stream" for kind in ("eager", "folded") for layout in ("nchw", "channels_last")}
    assert set(eager["median_us"]) == set(eager["samples_us"]) == expected
    assert eager["flops"] > 0
    compiled = found["compiled inference"]
    assert compiled["left_out"] == {}
    assert set(compiled["median_us"]) == {"compile nchw | stream", "compile channels_last | stream"}
    assert compiled["relative_errors"]["compile nchw"] < 1e-4


def test_correctness_on_the_cpu(tmp_path: Path) -> None:
    found = results_of(run_quick("correctness", tmp_path))
    groups = {name.split(":")[0] for name in found}
    assert groups == {"head dims", "layouts", "edges", "official layers", "fuzz"}
    for op in calls.OPS:
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            row = found[f"head dims: {op}, cpu, {dtype}"]
            assert 0 <= max(row["worst_share_of_budget"].values()) <= 1
            assert row["samples"] >= 6
    assert found["edges: relu_linear_attention, cpu, float16"]["T5: integer state"] == "ok"
    assert found["edges: relu_linear_attention, cpu, float16"]["T3: NaN in k"] == "ok"


def test_other_parts_on_the_cpu(tmp_path: Path, fresh_compiler: None) -> None:
    repeats = results_of(run_quick("repeats", tmp_path))
    assert {row["repeats"] for row in repeats.values()} == {2}
    assert len(repeats) == 2 * len(calls.OPS)
    large = results_of(run_quick("large", tmp_path))
    assert all(row["beyond"] for row in large.values())
    assert len(large) == 10
    runtime = run_quick("runtime", tmp_path)
    assert set(results_of(runtime)) == {f"torch.compile: {op}, cpu" for op in calls.OPS}
    assert set(run_quick("tune", tmp_path)) == {"launches, b0-224-stage3, batch 1"}


def test_bench_on_the_cpu(tmp_path: Path) -> None:
    found = results_of(run_quick("bench", tmp_path))
    assert len(found) == 4
    for row in found.values():
        assert row["median_us"]["ours cpu | stream"] > 0
        assert row["ratios"]["eager over ours | stream"] > 0
        assert row["worst_share_of_budget"]["ours cpu"] <= 1
        assert row["rates"]["ours cpu | stream"]["share_of_copy"] > 0
        assert len(row["samples_us"]["ours cpu | stream"]) >= 4
    summary = json.loads((tmp_path / "bench.json").read_text())["summary"]
    assert summary["lite_mla training float32 nchw"]["eager over ours | stream"]["layers"] == 1


def test_best_peer_over_best_of_ours() -> None:
    times = {
        "ours a | graph": 2.0,
        "ours b | graph": 4.0,
        "eager nchw | graph": 10.0,
        "eager channels_last | graph": 6.0,
    }
    assert bench.ratios(times | {"ours a | stream": 5.0}) == {"ratios": {"eager over ours | graph": 3.0}}
    row = {"op": "o", "shape": "s", "dtype": "d", "layout": "l", "training": False}
    steps = {
        str(value): {"status": "ok", "result": row | {"shape": str(value), "ratios": {"r": value}}}
        for value in (2.0, 8.0)
    }
    expected = {"geometric_mean": pytest.approx(4.0), "least": 2.0, "least_at": "2.0", "layers": 2}
    assert bench.summary({"steps": steps}) == {"o inference d l": {"r": expected}}


def wrong(monkeypatch: pytest.MonkeyPatch, op: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The op's results go through `change`."""
    right = calls.OPS[op].public

    def public(**arguments: Any) -> Any:
        result = right(**arguments)
        return change(result) if isinstance(result, torch.Tensor) else [change(out) for out in result]

    monkeypatch.setitem(calls.OPS, op, dataclasses.replace(calls.OPS[op], public=public))


def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch, context: Context) -> None:
    samples = correctness.head_dim_samples
    with monkeypatch.context() as patch:
        wrong(patch, "lite_mla", lambda out: out * 1.01)
        with pytest.raises(FailedError, match="out: error"):
            correctness.judged(samples, "lite_mla", "cpu", torch.float32, context)
    with monkeypatch.context() as patch:
        wrong(patch, "relu_linear_attention", torch.nan_to_num)
        with pytest.raises(FailedError, match="T3: NaN in v"):
            correctness.edges("relu_linear_attention", "cpu", torch.float16, context)
    with monkeypatch.context() as patch:
        wrong(patch, "multiscale_aggregate", lambda out: out.contiguous(memory_format=torch.contiguous_format))
        with pytest.raises(FailedError, match="memory format"):
            correctness.judged(correctness.layout_samples, "multiscale_aggregate", "cpu", torch.float32, context)
    with monkeypatch.context() as patch:
        wrong(patch, "multiscale_aggregate", lambda out: out + torch.randn_like(out))
        with pytest.raises(FailedError, match="differed from the first run"):
            repeats.repeat("multiscale_aggregate", "cpu", torch.float16, "forward", context)
    with monkeypatch.context() as patch:
        last = torch.ones(1)
        wrong(patch, "relu_linear_attention", lambda out: torch.cat([out[:-1], out[-1:] + last.to(out.dtype)]))
        with pytest.raises(FailedError, match="out, images"):
            large.compare("relu_linear_attention", "cpu", "images", False, "cpu", 2**14)


def test_the_reference_does_not_pass_for_a_backend(monkeypatch: pytest.MonkeyPatch, context: Context) -> None:
    op = "relu_linear_attention"

    def public(backend: str, **arguments: Any) -> Any:
        return calls.OPS[op].reference(**arguments)

    monkeypatch.setitem(calls.OPS, op, dataclasses.replace(calls.OPS[op], public=public))
    with pytest.raises(FailedError, match="the reference ran in its place"):
        correctness.judged(correctness.head_dim_samples, op, "cpu", torch.float32, context)


def test_a_backend_without_the_op_is_no_failure(monkeypatch: pytest.MonkeyPatch, context: Context) -> None:
    def public(**arguments: Any) -> Any:
        raise NotImplementedError("lite_mla: backend must be one that can run here")

    monkeypatch.setitem(calls.OPS, "lite_mla", dataclasses.replace(calls.OPS["lite_mla"], public=public))
    entry = parts.run_step(
        Step("x", lambda context: correctness.edges("lite_mla", "cpu", torch.float16, context)), context
    )
    assert (entry["status"], entry["reason"]) == ("not_run", "lite_mla: backend must be one that can run here")


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at out_of_bounds_kernel+0x70 in triton_probes.py:84
=========     by thread (0,0,0) in block (0,0,0)
=========     Host Frame: cuLaunchKernelEx [0x2f0] in libcuda.so.1
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """========= Error: Race reported between Write access at kv_state_kernel+0x1a0 in x.py:1
=========     and Read access at kv_state_kernel+0x250 in x.py:2 [16 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_reports_of_the_sanitizer() -> None:
    found = sanitize.parse(MEMCHECK)
    assert (found["errors"], found["kernels"]) == (2, {"out_of_bounds_kernel": 1})
    assert sanitize.parse(RACECHECK)["kernels"] == {"kv_state_kernel": 2}
    assert sanitize.parse(RACECHECK)["errors"] == 1
    clean = sanitize.parse("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")
    assert clean == {"errors": 0, "kernels": {}, "report": []}
    ended = subprocess.CompletedProcess([], 0, "", "")
    assert sanitize.judge(clean, {"ran": ["a"]}, ended)["ran"] == ["a"]
    with pytest.raises(FailedError, match="2 errors, in out_of_bounds_kernel"):
        sanitize.judge(sanitize.parse(MEMCHECK), {"ran": ["a"]}, ended)
    with pytest.raises(FailedError, match="did not end"):
        sanitize.judge(sanitize.parse(""), None, ended)
    foreign = sanitize.parse(MEMCHECK.replace("out_of_bounds_kernel", "void at::native::fill"))
    assert sanitize.judge(foreign, {"ran": ["a"]}, ended)["errors"] == 2
    assert all(len(sanitize.samples_of(op)) == 12 for op in calls.OPS)


def test_plans_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would run, with both backends: names are unique, and everything that is promised is among them."""
    names: dict[str, list[str]] = {}
    for part in PARTS:
        module = importlib.import_module(f"benchmarks.gpu.{part}")
        if hasattr(module, "runnable"):
            monkeypatch.setattr(module, "runnable", lambda device: ["triton", "cuda"])
        names[part] = [step.name for step in parts.steps_of(part, Context("cuda"))]
        assert len(set(names[part])) == len(names[part]) > 0, part
    for op in calls.OPS:
        for backend in ("triton", "cuda"):
            for dtype in ("float16", "bfloat16", "float32"):
                for group in ("head dims", "layouts", "edges", "official layers"):
                    assert f"{group}: {op}, {backend}, {dtype}" in names["correctness"]
            for what in ("graph", "stream", "no host synchronisation", "torch.compile", "stream sanitizer"):
                assert f"{what}: {op}, {backend}" in names["runtime"]
            for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
                assert f"{tool}: {op}, {backend}" in names["sanitize"]
            assert f"backward: {op}, {backend}, float16" in names["repeats"]
            assert f"images: {op}, {backend}, backward" in names["large"]
    official = {shape.name for shape in (*GPU_FIRST, *GPU_REST)}
    for kind in ("eager", "compiled"):
        measured = {name.split(", ")[1] for name in names["facts"] if name.startswith(f"{kind} inference float16")}
        assert measured == official
    assert {shape.name for shape in REGISTRY} <= official
    assert [f"mma.sync against cuBLAS, C {c}" for c in (128, 256, 512, 1024)] == [
        name for name in names["facts"] if name.startswith("mma.sync")
    ]


def test_which_matrix_instruction_a_probe_uses() -> None:
    """Compiled for sm_90 without a GPU: what the probe calls mma.sync is mma.sync, and the default is not."""
    pytest.importorskip("triton", reason="the probes are Triton kernels")
    code = (
        "import triton; from triton.compiler import ASTSource; from triton.backends.compiler import GPUTarget;"
        "from benchmarks.gpu import triton_probes as t; k = t.matmul_kernel;"
        "s = {n: 'constexpr' for n in k.arg_names} | dict(a='*fp16', b='*fp16', c='*fp16', M='i32', N='i32', K='i32');"
        "m, n, d, w, g = t.MATMUL_CONFIGS[0];"
        "c = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=d, MMA_SYNC=True);"
        "source = ASTSource(k, s, c, {(i,): [['tt.divisibility', 16]] for i in range(6)});"
        "print(t.instructions(triton.compile(source, target=GPUTarget('cuda', 90, 32),"
        " options=dict(num_warps=w, num_stages=g))))"
    )
    for variable, expected in (("1", "['mma.sync']"), ("0", "['wgmma.mma_async']")):
        result = python("-c", code, DISABLE_MMA_V3=variable)
        assert result.stdout.strip() == expected, result.stderr


def test_ways_of_a_gpu_run_through(monkeypatch: pytest.MonkeyPatch, context: Context) -> None:
    """On a stand-in for torch.cuda: graphs, rotating inputs, streams, memory and launches in the figures."""
    monkeypatch.setattr(repeats, "BUSY_SIZE", 64)
    with stand_in(monkeypatch) as settings:
        row = bench.measure("lite_mla", SMOKE[0], "float32", "nchw", True, False, context)
        assert row["median_us"].keys() == row["samples_us"].keys()
        assert {"ours cpu | graph", "ours cpu | stream", "eager nchw | graph"} <= row["median_us"].keys()
        assert {"eager over ours | graph", "eager over ours | stream"} == row["ratios"].keys()
        assert row["memory"]["ours cpu"] == 2**20
        assert row["launches"]["ours cpu"] == {"launches": 0, "kernels": {}}
        assert row["left_out"] == {}
        for step in facts.steps(context):
            if step.name != "compiled inference":  # slow, and seen without the stand-in
                entry = parts.run_step(step, context)
                assert entry["status"] == "ok" or "no Triton" in entry["reason"], (step.name, entry)
        for op in calls.OPS:
            assert repeats.repeat(op, "cpu", torch.float16, "backward", context)["other_stream_busy"]
            assert runtime.graph(op, "cpu", context)["replays"] == 3
            assert runtime.stream(op, "cpu", context)
            assert runtime.no_synchronisation(op, "cpu", context)
            assert runtime.csan(op, "cpu", "cpu")
            assert len(sanitize.workload(op, "cpu", "cpu")["ran"]) == 12
        assert settings == ["synchronisation error", "synchronisation default"] * 2 * len(calls.OPS)


def test_failed_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in has memory enough, which the check must notice; then an op that runs out of it now and then."""
    op = "relu_linear_attention"
    small = dataclasses.replace(runtime.sample_of(op), height=5)
    monkeypatch.setattr(runtime, "Sample", lambda *sizes: small)
    with stand_in(monkeypatch) as settings:
        with pytest.raises(FailedError, match="no allocation failed"):
            runtime.out_of_memory(op, "cpu", "cpu")
        right = calls.OPS[op].public

        def public(spoil: bool = False, **arguments: Any) -> Any:
            if settings and settings[-1] < "memory 0.00003":
                if spoil:
                    arguments["qkv"][0].detach().zero_()
                raise torch.OutOfMemoryError("out of memory")
            return right(**arguments)

        monkeypatch.setitem(calls.OPS, op, dataclasses.replace(calls.OPS[op], public=public))
        settings.clear()
        assert runtime.out_of_memory(op, "cpu", "cpu")["outcome"] == ["raised"] * 4 + ["ran"] * 4
        spoiling = functools.partial(public, spoil=True)
        monkeypatch.setitem(calls.OPS, op, dataclasses.replace(calls.OPS[op], public=spoiling))
        settings.clear()
        with pytest.raises(FailedError, match="has changed after an allocation that failed"):
            runtime.out_of_memory(op, "cpu", "cpu")


def test_the_launch_plan_beside_the_figures(monkeypatch: pytest.MonkeyPatch, context: Context) -> None:
    """Of this GPU; a library that was built for another Python comes without the module that knows it."""
    pytest.importorskip("efficientvit_kernels._C", reason="the introspection module was not built")
    gpu = types.SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    shape = REGISTRY[0]
    row = rows.make_row("lite_mla", shape, "float16", "nchw", False, context)
    (launches,) = bench.planned(row).values()
    assert any(launch.get("grid", 0) > 0 for launch in launches)

    def absent(*_: Any, **__: Any) -> None:
        raise ImportError("no _C")

    monkeypatch.setattr(bench, "launch_plan", absent)
    assert bench.planned(row) == {"not_known": "ImportError: no _C"}


def test_a_wrong_variant_fails(monkeypatch: pytest.MonkeyPatch, context: Context) -> None:
    """Variants of a backend are held to rule T as the backend is; a step that finds one wrong fails."""
    monkeypatch.setattr(tune, "runnable", lambda device: ["cuda"])
    monkeypatch.setattr(rows, "check", lambda row, context: {"failed": "ours cuda, two launches: too far"})
    with pytest.raises(FailedError, match="two launches: too far"):
        tune.time_launches(REGISTRY[0], context)
