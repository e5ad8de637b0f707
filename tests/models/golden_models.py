"""The golden models: the official state dicts key by key, and what the official models compute with rule-made weights.

golden/manifests.json.gz: for each of the 38 models its parameters, buffers, MACs and state dict, where "<name> bn <C>"
stands for the five entries of a BatchNorm. golden/<model>.npz: for every input "HxW" and tensor T (`stage0` ..., `out`)
`HxW/T/shape`, flat indices `idx`, the float64 values `v64` there, and `stats64` (mean, std, ...) of the whole tensor.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.golden_data import GOLDEN, golden_weight

Entry = tuple[str, list[int], str]
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")

# Float32 against the float64 of the official code, relative to the tensor's standard deviation. The official float32
# itself is within 2.7e-5; another order of sums may be a few times that.
TOLERANCE = 2e-4


@cache
def _manifests() -> dict[str, Any]:
    return json.loads(gzip.decompress((GOLDEN / "manifests.json.gz").read_bytes()))  # type: ignore[no-any-return]


def model_names() -> list[str]:
    """All 38, e.g. "efficientvit_cls_b1", "efficientvit_sam_xl0", "dc_ae_f32c32_in_1p0"."""
    return list(_manifests())


def summary(name: str) -> dict[str, Any]:
    """ "entries", "params", "buffers", "macs" by input size, "norm_eps" by class, shapes ("out", ...)."""
    return {key: value for key, value in _manifests()[name].items() if key != "state"}


@cache
def manifest(name: str) -> list[Entry]:
    """(key, shape, dtype) of every entry of the official state dict, in its order."""
    entries: list[Entry] = []
    for line in _manifests()[name]["state"]:
        key, *rest = line.split(" ")
        if rest[0] == "bn":
            entries += [(f"{key}.{part}", [int(rest[1])], "float32") for part in BATCH_NORM]
            entries.append((f"{key}.num_batches_tracked", [], "int64"))
        else:
            entries.append((key, [int(size) for size in rest[0].split("x") if size], "float32"))
    return entries


def state_entries(model: nn.Module) -> list[Entry]:
    """The same of a model of ours, to compare with `manifest`; works on the meta device."""
    return [(k, list(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in model.state_dict().items()]


def load_golden(model: nn.Module, name: str) -> nn.Module:
    """Loads rule-made weights into `model`, whose keys and shapes must be those of `manifest(name)`; in eval mode.

    The model may have been made on the meta device, which saves the time of its initialisation.
    """
    entries = manifest(name)
    assert state_entries(model) == entries
    weights = {key: golden_weight(i, key, shape, dtype) for i, (key, shape, dtype) in enumerate(entries)}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def golden_image(height: int, width: int, batch: int = 1, channels: int = 3) -> Tensor:
    shape = (batch, channels, height, width)
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


@cache
def golden(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def golden_sizes(name: str) -> list[tuple[int, int]]:
    """(H, W) of the inputs that `golden(name)` has results for."""
    sizes = dict.fromkeys(key.split("/")[0] for key in golden(name) if key.endswith("/shape"))
    return [(int(h), int(w)) for h, w in (size.split("x") for size in sizes if size[0].isdigit())]


def compare(name: str, prefix: str, tensors: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> dict[str, float]:
    """Asserts that every tensor equals `<prefix>/<its key>/...` of the golden file; returns the relative errors.

    prefix: "128x128" or the like, "decoder" and so on. Every golden tensor under the prefix must be there.
    """
    data = golden(name)
    expected = {key.rsplit("/", 1)[0] for key in data if key.startswith(f"{prefix}/") and key.endswith("/shape")}
    assert {f"{prefix}/{key}" for key in tensors} == expected
    errors = {key: _error(data, f"{prefix}/{key}", tensor) for key, tensor in tensors.items()}
    bad = {key: error for key, error in errors.items() if not error <= tolerance}
    assert not bad, f"{name} {prefix}: errors relative to the standard deviation: {bad}"
    return errors


def _error(data: dict[str, Any], key: str, tensor: Tensor) -> float:
    assert list(tensor.shape) == data[f"{key}/shape"].tolist(), key
    assert bool(tensor.isfinite().all()), key
    values = tensor.detach().double().contiguous().flatten().numpy()[data[f"{key}/idx"]]
    return float(np.abs(values - data[f"{key}/v64"]).max() / data[f"{key}/stats64"][1])
