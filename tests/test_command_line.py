"""The command line, as a user calls it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from efficientvit_kernels import LiteMLA
from tests.processes import python

pytest.importorskip("timm", reason="timm is in the development extras")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "efficientvit_kernels", *arguments, **environment)


def tiny_model() -> torch.nn.Module:
    """What the test of `verify` names as its module."""
    return torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, 2, 1), LiteMLA(32, 32), LiteMLA(32, 16, dim=16))


def test_info() -> None:
    result = command("info")
    assert result.returncode == 0, result.stderr
    assert "relu_linear_attention on cpu: cpu" in result.stdout
    content = json.loads(command("info", "--json").stdout)
    assert content["cpu_instruction_set"] in ("baseline", "avx2", "avx512")


def test_info_of_a_launch_plan() -> None:
    pytest.importorskip("efficientvit_kernels._C", reason="the introspection module was not built")
    result = command("info", "--plan", "1x128x14x14")
    assert result.returncode == 0, result.stderr
    assert "aggregate_kv_state_kernel    threads 128, rows 16, cols 16, tiles 1, shared_bytes" in result.stdout
    content = json.loads(command("info", "--plan", "8x256x32x32", "--head-dim", "32", "--json").stdout)
    assert content["forward"][1]["grid"] == 2 * 8 * 8 * content["forward"][1]["tiles"]
    wrong = command("info", "--plan", "128x14x14")
    assert wrong.returncode == 1
    assert "--plan must be BxCxHxW, got '128x14x14'" in wrong.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_a_timm_model(dtype: str) -> None:
    result = command("verify", "efficientvit_b0", "--shape", "1x3x96x64", "--dtype", dtype)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 module(s) fused" in result.stdout
    assert result.stdout.count("gradient of its input") == 4
    assert result.stdout.endswith("verified\n")


def test_verify_a_module_and_its_checkpoint(tmp_path: Path) -> None:
    model = tiny_model()
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": model.state_dict()}, path)
    arguments = ("verify", "tests.test_command_line:tiny_model", "--shape", "2x3x20x24")
    result = command(*arguments, "--checkpoint", str(path))
    assert result.returncode == 0, result.stdout + result.stderr
    whole = path.read_bytes()
    torch.save({"state_dict": {**model.state_dict(), "other": torch.zeros(1)}}, path)
    for content, cause in ((path.read_bytes(), "1 unexpected: 'other'"), (whole[:100], "not a zip file")):
        path.write_bytes(content)
        result = command(*arguments, "--checkpoint", str(path))
        assert result.returncode == 1
        assert result.stderr.startswith(f"efficientvit_kernels verify: CheckpointError: checkpoint {path}: ")
        assert cause in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ((), 2, "required: info | verify | demo"),
        (("bake",), 2, "invalid choice: 'bake'"),
        (("info", "--yaml"), 2, "unrecognized arguments: --yaml"),
        (("verify",), 2, "required: model"),
        (("verify", "efficientvit_b0", "--shape", "224"), 2, "shape must be BxCxHxW, got '224'"),
        (("verify", "efficientvit_b0", "--dtype", "int8"), 2, "invalid choice: 'int8'"),
        (("verify", "no_such_model_xyz"), 1, "no_such_model_xyz"),
        (("verify", "no_such_module:factory"), 1, "No module named 'no_such_module'"),
        (("verify", "torch:no_such_name"), 1, "no attribute 'no_such_name'"),
        (("verify", "builtins:dict"), 1, "model must be a torch.nn.Module, got dict"),
        (("verify", "efficientvit_b0", "--checkpoint", "nowhere.pt"), 1, "checkpoint nowhere.pt: does not exist"),
        (("verify", "efficientvit_b0", "--backend", "fast"), 1, "accelerate: backend must be one of 'auto'"),
        (("verify", "efficientvit_b0", "--backend", "cuda"), 1, "backend must be one that can run here, got 'cuda'"),
        (("verify", "resnet18", "--shape", "2x3x64x64"), 1, "model must contain a known LiteMLA"),
        (("demo", "--image", "nowhere.jpg"), 1, "nowhere.jpg"),
        (("demo", "--size", "3"), 1, "demo: size must be at least 32, got 3"),
        (("demo", "--rounds", "0"), 1, "demo: rounds must be positive, got 0"),
        (("demo", "--batch", "-1"), 1, "demo: batch must be positive, got -1"),
    ],
    ids=str,
)
def test_bad_usage(arguments: tuple[str, ...], status: int, text: str) -> None:
    result = command(*arguments)
    assert result.returncode == status, result.stderr
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_demo(tmp_path: Path) -> None:
    """The main job on a real photograph, small: status 0, a table, a picture and the figures."""
    result = command("demo", "--model", "efficientvit_b0", "--size", "128", "--rounds", "3", "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "All numbers agree under rule T." in result.stdout
    content = json.loads((tmp_path / "demo.json").read_text())
    assert content["ran_natively"]
    assert content["numbers_agree"]
    assert [row["name"] for row in content["rows"]][-1] == "whole model"
    assert len(content["rows"]) == 5
    for row in content["rows"]:
        assert row["ok"]
        assert row["name"] in result.stdout
        assert row["reference_ms"] > 0
        assert row["fused_ms"] > 0
        assert 0 < row["fused_mib"] <= row["reference_mib"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_on_another_image(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.effect_noise((90, 60), 80).save(path)
    folder = tmp_path / "out"
    result = command(
        *("demo", "--model", "efficientvit_b0", "--size", "64", "--rounds", "1"),
        *("--image", str(path), "--output", str(folder)),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "picture.png" in result.stdout
    assert (folder / "demo.png").exists()


def test_demo_fails_when_the_kernels_did_not_run(tmp_path: Path) -> None:
    result = command(
        *("demo", "--model", "efficientvit_b0", "--size", "64", "--rounds", "1", "--output", str(tmp_path)),
        EFFICIENTVIT_KERNELS_BACKEND="reference",
    )
    assert result.returncode == 1
    assert "did NOT run in native kernels" in result.stdout
