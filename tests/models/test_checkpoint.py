"""Weights from files: what loads, and that anything else is one CheckpointError and leaves the model alone."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficientvit_kernels.models.checkpoint import CheckpointError, load_weights, read_state_dict, save_weights
from tests.models.checkpoint_common import equal, refused, small_model

pytest.importorskip("safetensors", reason="the .safetensors half needs the package safetensors")
from safetensors.torch import load_file, save_file

SUFFIXES = ["pt", "pth", "bin", "safetensors"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    model, other = small_model(), small_model(1)
    model[1].num_batches_tracked.fill_(7)
    path = tmp_path / f"weights.{suffix}"
    save_weights(model, path)
    assert sorted(tmp_path.iterdir()) == [path]
    load_weights(other, str(path))
    assert equal(model.state_dict(), other.state_dict())
    state = read_state_dict(path)
    assert equal({key: state[key] for key in model.state_dict()}, model.state_dict())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensors_outlive_the_file(tmp_path: Path, suffix: str) -> None:
    """read_state_dict's tensors are not pages of the file: overwriting it in place must not reach them."""
    path = tmp_path / f"weights.{suffix}"
    save_weights(small_model(), path)
    state = read_state_dict(path)
    path.write_bytes(b"")
    assert equal({key: state[key] for key in small_model().state_dict()}, small_model().state_dict())


def test_saving_is_atomic_and_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pt"
    save_weights(small_model(), path)
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(CheckpointError, match=r"cannot be written: OSError: .*No space left"):
            save_weights(small_model(1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    save_weights(small_model(1), path)
    assert path.read_bytes() != before
    save_weights(small_model(), path)
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_weights(small_model(), tmp_path / "nowhere" / "weights.pt")
    with pytest.raises(ValueError, match=r"path must end in one of \.pt, \.pth, \.bin, \.safetensors, got 'a\.txt'"):
        save_weights(small_model(), tmp_path / "a.txt")


def test_tied_weights_and_channels_last_are_saved(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(8, 8, 3)
            self.b = nn.Conv2d(8, 8, 3)
            self.b.weight = self.a.weight

    model = Tied().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for suffix in ("pt", "safetensors"):
        save_weights(model, tmp_path / f"tied.{suffix}")
        other = Tied()
        load_weights(other, tmp_path / f"tied.{suffix}")
        assert torch.equal(other.a.weight, model.a.weight)
        assert other.b.weight is other.a.weight


@pytest.mark.parametrize("container", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_containers_and_prefixes(tmp_path: Path, container: str | None, prefix: str) -> None:
    state = {prefix + key: value for key, value in small_model().state_dict().items()}
    content = state if container is None else {"epoch": 3, "optimizer": {"lr": 0.1}, container: state}
    torch.save(content, tmp_path / "weights.pt")
    for model in (small_model(1), nn.DataParallel(small_model(1))):
        load_weights(model, tmp_path / "weights.pt")
        assert next(iter(model.state_dict().values())).equal(small_model()[0].weight)


def test_a_prefix_that_only_some_keys_have_stays(tmp_path: Path) -> None:
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "weights.pt")
    assert list(read_state_dict(tmp_path / "weights.pt")) == ["module.a", "b"]


def test_legacy_format(tmp_path: Path) -> None:
    torch.save(small_model().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    model = small_model(1)
    load_weights(model, tmp_path / "old.pt")
    assert equal(model.state_dict(), small_model().state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_take_the_models_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    save_weights(small_model(), tmp_path / "weights.safetensors")
    model = small_model(1).to(dtype)
    load_weights(model, tmp_path / "weights.safetensors")
    assert model[0].weight.dtype == dtype
    assert model[0].weight.equal(small_model()[0].weight.to(dtype))
    assert model[1].num_batches_tracked.dtype == torch.int64


def test_digest(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    save_weights(small_model(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    load_weights(small_model(1), path, sha256=digest.upper())
    assert refused(small_model(1), path, sha256="0" * 64) == f"has SHA-256 {digest}, expected {'0' * 64}"
    for wrong in ("0" * 63, "g" * 64, 5):
        with pytest.raises(ValueError, match="sha256 must be 64 hexadecimal digits or None, got"):
            load_weights(small_model(), path, sha256=wrong)  # type: ignore[arg-type]


def test_tensors_digest_in_safetensors(tmp_path: Path) -> None:
    """A changed weight in a file of ours is found without a pinned digest."""
    path = tmp_path / "weights.safetensors"
    save_weights(small_model(), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert refused(small_model(1), path) == (
        "damaged: its tensors do not have the SHA-256 that the file states for them"
    )
    save_file(load_file(path), path)  # by somebody else, without one
    load_weights(small_model(1), path)


def test_not_strict(tmp_path: Path) -> None:
    state = small_model().state_dict()
    del state["0.bias"]
    torch.save({**state, "extra": torch.zeros(3)}, tmp_path / "weights.pt")
    model = small_model(1)
    load_weights(model, tmp_path / "weights.pt", strict=False)
    assert model[0].weight.equal(small_model()[0].weight)
    assert model[0].bias.equal(small_model(1)[0].bias)
    torch.save({"extra": torch.zeros(3)}, tmp_path / "other.pt")
    assert refused(model, tmp_path / "other.pt", strict=False) == "does not fit Sequential: no key in common"
    torch.save({"0.bias": torch.zeros(3)}, tmp_path / "shape.pt")
    assert "'0.bias' must be [4], got [3]" in refused(model, tmp_path / "shape.pt", strict=False)


def changed(**changes: Any) -> dict[str, Tensor]:
    """The small model's state with entries replaced, or dropped where the value is None; "a__b" stands for "a.b"."""
    state = dict(small_model().state_dict())
    for name, value in changes.items():
        state[name.strip("_").replace("__", ".")] = value
    return {key: value for key, value in state.items() if value is not None}


MISFITS: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "missing": (lambda: changed(_0__bias=None), "1 missing: '0.bias'"),
    "extra": (lambda: changed(more=torch.zeros(1)), "1 unexpected: 'more'"),
    "many": (
        lambda: {f"x{i}": torch.zeros(1) for i in range(5)},
        "8 missing: '0.weight', '0.bias', '1.weight', and 5 more; 5 unexpected: 'x0', 'x1', 'x2', and 2 more",
    ),
    "shape": (lambda: changed(_0__bias=torch.zeros(5)), "1 of the wrong shape: '0.bias' must be [4], got [5]"),
    "transposed": (
        lambda: changed(_2__weight=torch.zeros(4, 2, 1, 1)),
        "1 of the wrong shape: '2.weight' must be [2, 4, 1, 1], got [4, 2, 1, 1]",
    ),
    "kind": (
        lambda: changed(_0__bias=torch.zeros(4, dtype=torch.int32)),
        "1 of the wrong dtype: '0.bias' must be floating-point, got torch.int32",
    ),
    "NaN": (
        lambda: changed(_0__bias=torch.tensor([0, 0, float("nan"), 0])),
        "1 not finite: '0.bias' has NaN, inf or more than torch.float32 holds",
    ),
    "-inf": (
        lambda: changed(_1__running_var=torch.tensor([0, 0, -float("inf"), 0])),
        "1 not finite: '1.running_var' has NaN, inf or more than torch.float32 holds",
    ),
    "overflow": (
        lambda: changed(_0__bias=torch.full([4], 1e300, dtype=torch.float64)),
        "1 not finite: '0.bias' has NaN, inf or more than torch.float32 holds",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_misfits(tmp_path: Path, name: str, suffix: str) -> None:
    make, cause = MISFITS[name]
    path = tmp_path / f"weights.{suffix}"
    torch.save(make(), path) if suffix == "pt" else save_file(make(), path)
    assert refused(small_model(1), path) == f"does not fit Sequential: {cause}"


def test_no_code_of_a_pickle_runs(tmp_path: Path) -> None:
    """The planted command does run where the pickle is trusted, so its absence means something."""
    sign = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {sign}",)

    for zipped in (True, False):
        path = tmp_path / "evil.pt"
        torch.save({"0.weight": Evil()}, path, _use_new_zipfile_serialization=zipped)
        assert "GLOBAL posix.system" in refused(small_model(), path)
        with pytest.raises(CheckpointError):
            read_state_dict(path)
        assert not sign.exists()
        torch.load(path, weights_only=False)
        assert sign.exists()
        sign.unlink()


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


DAMAGED: dict[str, tuple[str, bytes]] = {
    "empty": ("a.pt", b""),
    "text": ("a.pt", b"<html>404: Not Found</html>"),
    "another pickle": ("a.pt", pickle.dumps({"a": 1}, protocol=2)),
    "start of an archive": ("a.pt", b"PK\x03\x04"),
    "empty safetensors": ("a.safetensors", b""),
    "header of 2^62 bytes": ("a.safetensors", (1 << 62).to_bytes(8, "little") + b"{}"),
    "header that is no JSON": ("a.safetensors", (4).to_bytes(8, "little") + b"\xff{}}"),
    "offsets beyond the end": ("a.safetensors", header({"a": entry("F32", [1 << 40], 0, 1 << 42)})),
    "overlapping offsets": (
        "a.safetensors",
        header({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, bytes(4)),
    ),
    "shape and offsets disagree": ("a.safetensors", header({"a": entry("F32", [2], 0, 4)}, bytes(4))),
    "shape that overflows": ("a.safetensors", header({"a": entry("F32", [1 << 62, 4], 0, 0)})),
    "unknown dtype": ("a.safetensors", header({"a": entry("F33", [1], 0, 4)}, bytes(4))),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files(tmp_path: Path, name: str) -> None:
    file, content = DAMAGED[name]
    (tmp_path / file).write_bytes(content)
    refused(small_model(), tmp_path / file)


CONTENTS: dict[str, tuple[Any, str]] = {
    "a list": ([torch.zeros(1)], "is not a state dict: it holds a list"),
    "a tensor": (torch.zeros(1), "is not a state dict: it holds a Tensor"),
    "a number": ({"epoch": 3}, "is not a state dict: its entry 'epoch' is a int, not a tensor"),
    "other keys": ({1: torch.zeros(1)}, "is not a state dict: it has the key 1 of type int"),
    "meta": ({"a": torch.zeros(1, device="meta")}, "its entry 'a' is not a dense tensor in memory"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "its entry 'a' is not a dense tensor in memory"),
    "expanded": (
        {"0.bias": torch.zeros(1).expand(1 << 40)},
        "unfolds to 4398046511104 bytes from {size}, more than 16 times its size",
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_other_contents(tmp_path: Path, name: str) -> None:
    content, cause = CONTENTS[name]
    path = tmp_path / "a.pt"
    torch.save(content, path)
    assert refused(small_model(), path) == cause.format(size=path.stat().st_size)


def test_a_dictionary_that_holds_itself(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["state_dict"] = loop
    torch.save(loop, tmp_path / "a.pt")
    assert "its entry 'state_dict' is a dict, not a tensor" in refused(small_model(), tmp_path / "a.pt")


def test_archive_bomb_and_compressed_archive(tmp_path: Path) -> None:
    """A gigabyte in a megabyte is refused before it unfolds; ordinary compressed archives load."""

    def repack(path: Path, extra: int) -> None:
        with zipfile.ZipFile(tmp_path / "weights.pt") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
            if extra:
                with new.open("archive/data/99", "w") as member:
                    for _ in range(extra):
                        member.write(bytes(1 << 20))

    save_weights(small_model(), tmp_path / "weights.pt")
    repack(tmp_path / "bomb.pt", 256)
    assert "more than 16 times its size" in refused(small_model(1), tmp_path / "bomb.pt")
    repack(tmp_path / "compressed.pt", 0)
    model = small_model(1)
    load_weights(model, tmp_path / "compressed.pt")
    assert equal(model.state_dict(), small_model().state_dict())


def test_damaged_record_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    save_weights(small_model(), path)
    content = bytearray(path.read_bytes())
    place = content.index(small_model()[0].weight.detach().numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["0.weight"].isfinite().all()  # torch's reader finds nothing
    assert "damaged: the checksum of its record" in refused(small_model(1), path)


def test_files_that_are_none(tmp_path: Path) -> None:
    assert refused(small_model(), tmp_path / "nowhere.pt") == "does not exist"
    (tmp_path / "folder.pt").mkdir()
    assert refused(small_model(), tmp_path / "folder.pt") == "is not a file"
    assert refused(small_model(), tmp_path / "a.txt") == "its suffix must be one of .pt, .pth, .bin, .safetensors"


class Stateful(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 4, 3)

    def get_extra_state(self) -> int:
        return 3


def test_wrong_arguments(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_weights(small_model(), path)
    with pytest.raises(TypeError, match="source must be a path or hf:// reference, got int"):
        load_weights(small_model(), 3)  # type: ignore[arg-type]
    for function in (load_weights, save_weights):
        with pytest.raises(TypeError, match=rf"{function.__name__}: model must be a torch\.nn\.Module, got str"):
            function("model", path)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"{function.__name__}: model must have .* got one with extra state"):
            function(Stateful(), path)
        with pytest.raises(ValueError, match=f"{function.__name__}: model must have memory .* got the meta device"):
            function(small_model().to("meta"), path)
    load_weights(small_model(1), path)


def test_the_error_pickles() -> None:
    error = pickle.loads(pickle.dumps(CheckpointError("a.pt", "does not exist")))
    assert str(error) == "checkpoint a.pt: does not exist"
