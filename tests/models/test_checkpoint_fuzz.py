"""Damaged checkpoints: a few bytes flipped, removed or added. Each loads as if nothing were wrong or is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from efficientvit_kernels.models.checkpoint import CheckpointError, load_weights, read_state_dict, save_weights
from tests.models.checkpoint_common import equal, small_model

pytest.importorskip("safetensors", reason="the .safetensors half needs the package safetensors")
from safetensors.torch import save_file

NIGHTLY = "EVK_FUZZ_EXAMPLES" in os.environ
FUZZ = settings(
    max_examples=2000 if NIGHTLY else 300,
    derandomize=not NIGHTLY,  # the same examples on every push
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

places = st.floats(0, 1, exclude_max=True)
flips = st.tuples(st.just("flip"), places, st.integers(1, 255))
cuts = st.tuples(st.just("cut"), places, st.integers(1, 4096))
additions = st.tuples(st.just("add"), places, st.integers(0, 255))
ends = st.tuples(st.just("end"), places, st.just(0))
damages = st.one_of(
    st.lists(flips, min_size=1, max_size=1), st.lists(flips | cuts | additions | ends, min_size=1, max_size=4)
)


def damage(content: bytes, steps: list[tuple[str, float, int]]) -> bytes:
    result = bytearray(content)
    for kind, place, value in steps:
        at = int(place * len(result))
        if kind == "flip" and at < len(result):
            result[at] ^= value
        elif kind == "cut":
            del result[at : at + value]
        elif kind == "add":
            result.insert(at, value)
        elif kind == "end":
            del result[at:]
    return bytes(result)


def whole_files(folder: Path) -> dict[str, bytes]:
    """The same weights as .pt, as our .safetensors, and as one that somebody else wrote, which has no checksum."""
    save_weights(small_model(), folder / "whole.pt")
    save_weights(small_model(), folder / "whole.safetensors")
    save_file(small_model().state_dict(), folder / "plain.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["whole.pt", "whole.safetensors", "plain.safetensors"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_load_whole_or_not_at_all(tmp_path: Path, name: str) -> None:
    whole = whole_files(tmp_path)[name]
    official = small_model().state_dict()
    fresh = small_model(1).state_dict()
    model = small_model(1)
    path = tmp_path / f"damaged{Path(name).suffix}"
    outcomes = {"loaded": 0, "refused": 0}

    @FUZZ
    @given(damages)
    def run(steps: list[tuple[str, float, int]]) -> None:
        path.write_bytes(damage(whole, steps))
        try:
            load_weights(model, path)
        except CheckpointError:
            outcomes["refused"] += 1
            assert equal(model.state_dict(), fresh)
            return
        outcomes["loaded"] += 1
        loaded = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(fresh)
        # The plain .safetensors has nothing to compare with: a flipped bit of a weight is a weight.
        assert equal(loaded, official) if name.startswith("whole") else all_finite(loaded)

    run()
    assert outcomes["refused"] > 50, outcomes


def all_finite(state: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in state.values())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:TypedStorage is deprecated")
def test_damaged_files_without_a_model(tmp_path: Path) -> None:
    """The reader alone: tensors or CheckpointError, also in the older format, which has no checksums."""
    torch.save(small_model().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "old.pt").read_bytes()

    @FUZZ
    @given(damages)
    def run(steps: list[tuple[str, float, int]]) -> None:
        (tmp_path / "damaged.pt").write_bytes(damage(whole, steps))
        try:
            state = read_state_dict(tmp_path / "damaged.pt")
        except CheckpointError:
            return
        assert all(type(value) is torch.Tensor for value in state.values())

    run()
