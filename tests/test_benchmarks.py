"""The benchmark measures what it says; its timings themselves are never asserted."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers, run
from benchmarks.memory import saved_bytes
from benchmarks.peers import PEERS, CannotRunError, OfficialLiteMLA, fold, make_peers
from benchmarks.providers import Provider, Settings, random_tensors, tensors, torch_provider
from benchmarks.registry import OPS, make_layer, make_workload, stage_flops
from benchmarks.report import format_table, summary
from benchmarks.shapes import CASES, REGISTRY, SETS, SMOKE, Shape
from benchmarks.timing import geometric_mean, median_seconds, ratios, shuffled_blocks
from efficientvit_kernels.__main__ import parser
from efficientvit_kernels._build import ROOT
from tests.processes import python

FLOAT64 = Settings(torch.float64)


def test_shapes_are_well_formed() -> None:
    for shapes in (CASES, REGISTRY):
        assert len({shape.name for shape in shapes}) == len(shapes)
        assert len({shape.geometry for shape in shapes}) == len(shapes), "a shape would be timed twice"
    assert len(REGISTRY) >= 40
    for shape in (*CASES, *REGISTRY, *SMOKE):
        assert shape.channels % shape.dim == 0, shape
        assert OPS["lite_mla"].flops(shape) < 15e9, f"{shape} is too large for a machine of two cores"
    assert {op for entries in SETS.values() for op, _ in entries} == set(OPS)


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("shape", [CASES[0], REGISTRY[-1], Shape("two scales", 2, 64, 16, 9, 7, (3, 5))], ids=str)
def test_flops_are_those_that_torch_counts(op: str, shape: Shape) -> None:
    entry = OPS[op]
    module = entry.official(make_layer(shape, FLOAT64)).to("meta")
    inputs = [torch.empty(dims, device="meta", dtype=torch.float64) for dims in entry.inputs(shape)]
    with FlopCounterMode(display=False) as counter:
        outs = tensors(module(*inputs))
    assert entry.flops(shape) == counter.get_total_flops()
    assert [tuple(out.shape) for out in outs] == entry.outputs(shape)
    assert entry.weights(shape) == sum(weight.numel() for weight in module.parameters())


def test_stages_sum_up_to_the_whole() -> None:
    flops = stage_flops(CASES[1])
    assert flops["depthwise"] + flops["grouped 1x1"] == flops["aggregation"]
    parts = ("qkv product", "aggregation", "attention", "proj product")
    assert sum(flops[part] for part in parts) == flops["whole module"] == OPS["lite_mla"].flops(CASES[1])


def test_fewest_bytes() -> None:
    """x and y of 2 x 32 x 9 x 11; weights of qkv, 5 x 5, grouped 1 x 1, proj, norm."""
    x, weights = 2 * 32 * 99, 96 * 32 + 96 * 25 + 96 * 16 + 32 * 64 + 64
    entry = OPS["lite_mla"]
    assert entry.fewest_bytes(SMOKE[0], Settings()) == 4 * (2 * x + weights)
    assert entry.fewest_bytes(SMOKE[0], Settings(torch.bfloat16, training=True)) == 2 * (5 * x + 3 * weights)


@pytest.mark.parametrize("shape", [*SMOKE, Shape("quadratic", 1, 64, 32, 4, 5, (3, 5))], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_official_peers_equal_lite_mla(shape: Shape, training: bool) -> None:
    layer = make_layer(shape, Settings(torch.float64, training=training))
    (x,) = random_tensors(OPS["lite_mla"].inputs(shape), torch.float64, "nchw", 0)
    expected = layer(x)
    peers_of = [OfficialLiteMLA(layer)] if training else [OfficialLiteMLA(layer), fold(OfficialLiteMLA(layer))]
    for peer in peers_of:
        assert (peer(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
    if not training:
        assert "proj.norm.weight" not in dict(peers_of[1].named_parameters())
        assert "proj.norm.weight" in dict(peers_of[0].named_parameters()), "folding must not change the module itself"


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_providers_agree_with_the_truth(op: str, training: bool) -> None:
    """Every eager provider in float64, inputs in both layouts; the runtimes are judged by each run."""
    if OPS[op].why_not() is not None:
        pytest.skip(f"{op}: {OPS[op].why_not()}")
    settings = Settings(torch.float64, "channels_last", training=training)
    wanted = ("eager", "eager_folded", "eager_other_layout")
    work = make_workload(OPS[op], SMOKE[0], settings, wanted)
    missing = ["eager_folded"] if training or op != "lite_mla" else []
    assert list(work.left_out) == missing
    result = run.check(work)
    assert "failed" not in result, result["failed"]
    assert set(result["relative_errors"]) == {"ours", *wanted} - set(missing)
    assert max(result["relative_errors"].values()) < 1e-9
    assert len(result["checks"]) == (
        1 + training * (len(OPS[op].inputs(SMOKE[0])) + len([*work.modules["eager"].parameters()]))
    )


def test_wrong_results_get_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that computes something else is left out by name; ours fails the row."""
    work = make_workload(OPS["lite_mla"], SMOKE[0], Settings(), ("eager",))
    right = work.providers["eager"].bind

    def wrong(inputs: list[torch.Tensor], grad_outs: list[torch.Tensor]) -> run.Step:
        return lambda: 1.1 * tensors(right(inputs, grad_outs)())[0]

    work.providers["peer"] = Provider(wrong)
    assert "failed" not in run.check(work)
    assert "peer" not in work.providers
    assert work.left_out["peer"].startswith("its results are wrong: relative error 0.1")
    work.providers["ours"] = Provider(wrong)
    result = run.check(work)
    assert result["failed"].startswith("output 0: error")
    monkeypatch.setattr(run, "make_workload", lambda *_: work)
    roofs = {"mm_gflops": 1.0, "copy_gb_per_s": 1.0}
    row = run.measure_row(OPS["lite_mla"], SMOKE[0], Settings(), ("eager",), 1, False, roofs)
    assert "failed" in row
    assert "median_ms" not in row
    assert summary([row]) is None


def test_the_reference_is_not_ours() -> None:
    work = make_workload(OPS["relu_linear_attention"], SMOKE[0], Settings(), ("eager",))
    work.providers["ours"] = torch_provider(work.modules["eager"], work.settings)
    assert run.check(work)["failed"] == "ours did not run in native kernels"


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str) -> object:
        if name in ("onnxruntime", "openvino"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(peers.importlib, "import_module", without)
    inputs = OPS["lite_mla"].inputs(SMOKE[0])
    official = OfficialLiteMLA(make_layer(SMOKE[0], Settings()))
    found, left_out = make_peers(official, Settings(), ("eager", "onnxruntime", "openvino"), inputs)
    assert not found
    for name in ("onnxruntime", "openvino"):
        assert left_out[name] == f"{name} is not installed: pip install 'efficientvit_kernels[bench]'"
    with pytest.raises(CannotRunError, match="inference only"):
        peers.exported(official, Settings(training=True), inputs, lambda model: Provider(lambda *_: lambda: None))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_exported_peers_survive_a_zero_denominator(name: str) -> None:
    """The exporter drops the official eps; the peer says so and gives 0, not NaN, where relu(q) is 0."""
    for module in ("onnx", "onnxscript", name):
        pytest.importorskip(module, reason="in the extra `bench`")
    inputs = OPS["lite_mla"].inputs(SMOKE[0])
    official = OfficialLiteMLA(make_layer(SMOKE[0], Settings()))
    found, left_out = make_peers(official, Settings(), (name,), inputs)
    assert not left_out
    for x in (torch.zeros(inputs[0]), torch.randn(inputs[0])):
        with torch.no_grad():
            torch.testing.assert_close(tensors(found[name].bind([x], [])())[0], official(x), rtol=1e-3, atol=1e-4)
    assert "NCHW" in found[name].note


def test_blocks_are_shuffled_and_every_counted_call_is_kept() -> None:
    calls: list[tuple[int, str]] = []

    def bind(number: int) -> dict[str, run.Step]:
        return {name: lambda name=name: calls.append((number, name)) for name in "abcd"}

    samples = shuffled_blocks(bind, rounds=6, training=False)
    assert list(samples) == list("abcd")
    assert all(len(blocks) == 6 and all(len(block) == 2 for block in blocks) for blocks in samples.values())
    blocks = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert all(len(set(block)) == 1 for block in blocks), "a block is three calls of one provider"
    orders = {"".join(name for (_, name), *_ in blocks[4 * i : 4 * i + 4]) for i in range(6)}
    assert len(orders) > 1
    assert all(sorted(order) == list("abcd") for order in orders)


def test_statistics() -> None:
    assert ratios([[2.0, 4.0], [9.0, 3.0]], [[1.0, 1.0], [2.0, 4.0]]) == [3.0, 2.0]
    assert median_seconds([[1.0, 9.0], [2.0, 3.0]]) == 2.5
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_saved_bytes_counts_storages_once_and_no_parameters() -> None:
    convolution = torch.nn.Conv2d(3, 5, 1)
    x = torch.randn(2, 3, 4, 4)
    assert saved_bytes(convolution, [x]) == x.nbytes

    class Square(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x + (x[:, :1] * 2).exp()  # x twice, and the exponential

    assert saved_bytes(Square(), [x]) == x.nbytes + x[:, :1].nbytes


def test_tables() -> None:
    lines = [["shape", "ms"], ["a", "10.00"]]
    assert format_table(lines, markdown=False) == ["shape     ms", "------------", "a      10.00"]
    assert format_table(lines, markdown=True) == ["| shape | ms |", "| --- | ---: |", "| a | 10.00 |"]


def test_command(tmp_path: Path) -> None:
    """The smoke set in both passes: status 0, every sample in the JSON, a table, a picture."""
    output = tmp_path / "figures" / "bench.json"
    arguments = ("bench", "--set", "smoke", "--rounds", "2", "--peers", "eager,eager_folded", "--stages")
    result = python("-m", "efficientvit_kernels", *arguments, "--output", str(output))
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads(output.read_text())
    assert content["roofs"]["mm_gflops"] > 0
    assert content["roofs"]["copy_gb_per_s"] > 0
    assert content["environment"]["devices"]["cpu"]
    assert content["commit"]
    measured = {(row["op"], row["shape"]["name"], row["pass"]) for row in content["rows"]}
    for op, shapes in SETS["smoke"]:
        if op in content["left_out"]:
            assert f"left out: {op}" in result.stdout
            continue
        assert {(op, shape.name, of_pass) for shape in shapes for of_pass in ("inference", "training")} <= measured
    for row in content["rows"]:
        folded = ["eager_folded"] if (row["op"], row["pass"]) == ("lite_mla", "inference") else []
        assert set(row["samples_ms"]) == {"ours", "eager", "eager_again", *folded}
        for blocks in row["samples_ms"].values():
            assert [len(block) for block in blocks] == [2, 2]
            assert min(map(min, blocks)) > 0
        assert row["self_check"] > 0
        assert all(verdict["ok"] for verdict in row["checks"].values())
        assert row["ran_natively"]
        assert set(row["left_out"]) == {"eager_folded"} - set(folded)
        assert ("stages" in row) == bool(folded)
        assert row["memory"]["ours"]["peak_bytes"] > 0
        if row["pass"] == "training":
            assert 0 < row["memory"]["ours"]["saved_over_input"] <= row["memory"]["eager"]["saved_over_input"]
    assert {(entry["op"], entry["pass"]) for entry in content["summary"]} == {(op, p) for op, _, p in measured}
    assert "left out: eager_folded: for inference only" in result.stdout
    assert "over best peer" in result.stdout
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--shape", "b9"), "bench: shape must be one of smoke, smoke-no-aggregation, got 'b9'"),
        (("--peers", "eager,tvm"), f"bench: peers must be all or some of {','.join(PEERS)}, got 'tvm'"),
        (("--threads", "0"), "bench: threads must be positive, got 0"),
        (("--rounds", "-2"), "bench: rounds must be positive, got -2"),
    ],
    ids=str,
)
def test_bad_usage(arguments: tuple[str, ...], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        run.run_bench(parser().parse_args(["bench", "--set", "smoke", *arguments]))


def test_without_the_source_tree(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "efficientvit_kernels", tmp_path / "efficientvit_kernels")
    result = python("-m", "efficientvit_kernels", "bench", path=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("efficientvit_kernels bench: FileNotFoundError: bench: benchmarks must be beside")
    assert len(result.stderr.splitlines()) == 1
