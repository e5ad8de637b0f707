"""`bench --set models` measures what it says; its timings themselves are never asserted."""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import model_run, models, run
from benchmarks.model_cases import CASES, ModelCase, fused_copy, lite_mla_paths, make_reference
from benchmarks.providers import Provider, Settings, torch_provider
from efficientvit_kernels import FusedLiteMLA, LiteMLA
from efficientvit_kernels.__main__ import parser
from efficientvit_kernels.models import create_model, list_models

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ModelCase("tiny", "efficientvit-b0", 32, 64)
EAGER = ("eager", "eager_folded")


def options(*more: str) -> argparse.Namespace:
    return parser().parse_args(["bench", "--set", "models", *more])


def tiny_work(peers: tuple[str, ...] = EAGER) -> models.ModelWork:
    return models.make_work(TINY, Settings(layout="channels_last"), torch.device("cpu"), peers)


def samples_of(**seconds: list[float]) -> dict[str, list[list[float]]]:
    """One counted call a round."""
    return {name: [[value] for value in values] for name, values in seconds.items()}


@pytest.mark.parametrize("device", list(CASES))
def test_cases_are_models_with_lite_mla(device: str) -> None:
    cases = CASES[device]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.model in list_models()
        with torch.device("meta"):
            part = create_model(case.model).get_submodule(case.part)
        assert lite_mla_paths(part), case
    assert models.cases_of(device, [cases[-1].name]) == [cases[-1]]


def test_ours_is_the_fused_model_of_the_same_weights() -> None:
    reference = make_reference(TINY, Settings())
    fused = fused_copy(reference)
    expected = create_model(TINY.model, attention="fused").eval()
    assert [type(module) for module in fused.modules()] == [type(module) for module in expected.modules()]
    assert not any(isinstance(module, FusedLiteMLA) for module in reference.modules())
    for key, value in reference.state_dict().items():
        assert torch.equal(fused.state_dict()[key], value), key
    deep = [module for module in reference.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    assert deep.running_var is not None
    assert not torch.equal(deep.running_var, torch.ones_like(deep.running_var)), "the norms must be calibrated"


def test_prediction_by_hand() -> None:
    """Half of 8 s are LiteMLAs, twice as fast: 1 / (1/2 + 1/4) = 4/3 predicted; 6.4 s are 1.25, 3/4 of that gain."""
    rounds = 3
    seconds = {"eager": 8.0, "ours": 6.4, "layers_eager": 4.0, "layers_ours": 2.0}
    found = models.prediction(samples_of(**{name: [value] * rounds for name, value in seconds.items()}))
    assert found["share"] == 0.5
    assert found["layers_speed_up"] == 2
    assert found["predicted"] == pytest.approx(4 / 3)
    assert found["measured"] == 1.25
    assert found["measured_over_predicted"] == pytest.approx(1.25 * 3 / 4)
    assert found["gain_reached"] == pytest.approx(0.75)
    assert found["gain_reached_interval"] == pytest.approx([0.75, 0.75])


def test_interval_holds_the_value_and_shows_the_noise() -> None:
    seconds = {"eager": [8.0, 9.0, 7.0, 8.0, 10.0, 6.0], "ours": [6.4] * 6}
    found = models.prediction(samples_of(**seconds, layers_eager=[4.0] * 6, layers_ours=[2.0] * 6))
    low, high = found["gain_reached_interval"]
    assert low < found["gain_reached"] < high


def test_first_calls_of_blocks_do_not_count() -> None:
    assert models.counted({"a": [9.0, 1.0, 2.0, 9.0, 3.0, 4.0]}) == {"a": [[1.0, 2.0], [3.0, 4.0]]}


def test_figures_by_hand() -> None:
    seconds = {"eager": 8.0, "eager_again": 8.0, "torch.compile": 6.0, "ours": 6.4, "ours_compiled": 4.0}
    layers = {"layers_eager": 4.0, "layers_ours": 2.0}
    found = models.figures(samples_of(**{name: [value, value] for name, value in (seconds | layers).items()}))
    assert found["speed_up_over"] == pytest.approx({"eager": 1.25, "torch.compile": 6 / 6.4})
    assert (found["best_peer"], found["fastest_of_ours"]) == ("torch.compile", "ours_compiled")
    assert found["best_of_ours_over_best_peer"] == 1.5
    assert found["self_check"] == 1


def test_wrong_results_get_no_figures() -> None:
    work = tiny_work()
    found = models.check(work)
    assert found["ran_natively"]
    assert "failed" not in found
    assert max(found["relative_errors"].values()) < 1e-4
    right = work.providers["ours"].bind

    def wrong(inputs: Any, grad_outs: Any) -> Any:
        return lambda: 1.1 * right(inputs, grad_outs)()  # type: ignore[operator]

    work.providers["peer"] = Provider(wrong)
    assert "failed" not in models.check(work)
    assert "peer" not in work.providers
    assert work.left_out["peer"].startswith("its results are wrong: relative error 0.1")
    work.providers["ours"] = Provider(wrong)
    assert models.check(work)["failed"].startswith("error ")
    work.providers["ours"] = torch_provider(work.models["eager"], work.settings)
    assert models.check(work)["failed"] == "ours did not run in native kernels"


def test_inside_times_every_lite_mla() -> None:
    work = tiny_work()
    with torch.no_grad():
        found = models.inside(work, 2)
    for name, model in work.models.items():
        assert list(found[name]["layers_ms"]) == lite_mla_paths(model)
        assert min(found[name]["layers_ms"].values()) > 0
        assert found[name]["rest_ms"] > 0
        assert found[name]["whole_ms"] > found[name]["lite_mla_ms"] > 0
        assert not any(module._forward_hooks for module in model.modules()), "hooks belong to the copy alone"
    assert found["predicted"] == models.predicted_gain(found["share"], found["layers_speed_up"])
    assert models.predicted_gain(0.5, 2.0) == pytest.approx(4 / 3)
    twin, _ = models._timed_copy(work.models["ours"], time.perf_counter)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in work.models["ours"].parameters()}
    assert all(m.fusion_plan().path == "whole" for m in twin.modules() if isinstance(m, FusedLiteMLA))


def test_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny model: status 0, every sample in the JSON, three tables; the JSON is that of the command's own content."""
    monkeypatch.setitem(CASES, "cpu", (TINY,))
    monkeypatch.setattr(run, "measure_roofs", lambda repeats: {"mm_gflops": 1.0, "copy_gb_per_s": 1.0})
    output = tmp_path / "figures" / "models.json"
    asked = options("--rounds", "2", "--peers", ",".join(EAGER), "--layout", "channels_last", "--output", str(output))
    assert run.run_bench(asked) == 0
    content = json.loads(output.read_text())
    (row,) = content["rows"]
    assert content["settings"]["layout"] == "channels_last"
    assert row["lite_mlas"] == sum(isinstance(m, LiteMLA) for m in make_reference(TINY, Settings()).modules())
    names = {"eager", "eager_folded", "eager_again", "ours", "ours_folded", "layers_eager", "layers_ours"}
    assert set(row["samples_ms"]) == names
    assert all([len(block) for block in blocks] == [2, 2] for blocks in row["samples_ms"].values())
    processor = row["processor_time"]
    assert set(processor["samples_ms"]) == names
    assert all([len(block) for block in blocks] == [2, 2] for blocks in processor["samples_ms"].values())
    assert processor["median_ms"]["ours"] > 0
    assert row["memory"]["ours"] > 0
    assert content["summary"]["least_at"] == "tiny"
    text = capsys.readouterr().out
    assert text.count("gain reached") == 2
    assert "the same in processor time" in text
    assert "left out: " not in text
    assert model_run.summary([{"failed": "x"}]) is None


def test_only_the_whole_set_names_its_own_file() -> None:
    whole = model_run._output(options("--layout", "channels_last", "--threads", "2"))
    assert whole == model_run.RESULTS / "cpu_models_inference_float32_channels_last_2t.json"
    for part in (("--rounds", "3"), ("--shape", "b1-224"), ("--peers", "eager")):
        assert model_run._output(options(*part)) is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--shape", "b9"), "bench: shape must be one of b1-224, b3-224"),
        (("--peers", "tvm"), f"bench: peers must be all or some of {','.join(models.PEERS)}, got 'tvm'"),
        (("--pass", "training"), "bench: pass must be inference for the set models, got training"),
        (("--set", "smoke", "--device", "cuda"), "bench: device must be cpu for the set smoke, got cuda"),
    ],
    ids=str,
)
def test_bad_usage(arguments: tuple[str, ...], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        run.run_bench(options(*arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_no_gpu() -> None:
    with pytest.raises(ValueError, match="bench: device must be one that is available, got cuda"):
        run.run_bench(options("--device", "cuda"))
