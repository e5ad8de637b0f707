"""The golden LiteMLA cases: what the official module computes in float64, with weights made by a fixed rule.

golden/litemla_index.json: constructor arguments, input size and the ordered state of every case. golden/litemla_*.npz:
`out`, `grad_input`, `grad/<parameter>` and `buffer/<name>`, each with /shape and /v; large ones are sampled (/idx).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).with_name("golden")
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "litemla_index.json").read_text())


def golden_weight(position: int, key: str, shape: list[int], dtype: str) -> Tensor:
    """Entry `position` of a state dict: seeded by its position, scaled by its kind, in float64, rounded to float32."""
    random = np.random.default_rng(position)
    if dtype.startswith("int"):
        return torch.zeros(shape, dtype=getattr(torch, dtype))
    if key.endswith("running_var") or (len(shape) == 1 and key.endswith("weight")):
        values = random.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:
        values = 0.1 * random.standard_normal(shape)
    elif key.endswith("positional_encoding_gaussian_matrix"):
        values = random.standard_normal(shape)
    else:
        values = random.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


def load_golden_state(module: nn.Module, case: dict[str, Any]) -> None:
    """Fills `module`, whose keys must be the official ones in the official order."""
    keys = [key for key, _, _ in case["state"]]
    assert list(module.state_dict()) == keys
    module.load_state_dict({key: golden_weight(i, key, *entry) for i, (key, *entry) in enumerate(case["state"])})


def golden_input(case: dict[str, Any]) -> Tensor:
    shape = (case["batch"], case["kwargs"]["in_channels"], case["height"], case["width"])
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    if case["zero_rows_from"] is not None:
        x[:, :, case["zero_rows_from"] :] = 0
    return x


def golden_grad_out(shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal(tuple(shape)).astype(np.float32))


def relative_error(actual: Tensor, golden: Any, name: str) -> float:
    """Largest error over the stored values, relative to the largest of them; NaN if `actual` has a NaN there."""
    assert list(actual.shape) == golden[f"{name}/shape"].tolist(), name
    flat = actual.detach().double().contiguous().flatten().numpy()
    if f"{name}/idx" in golden:
        flat = flat[golden[f"{name}/idx"]]
    expected = golden[f"{name}/v"].ravel()
    largest = np.abs(expected).max()
    return float(np.abs(flat - expected).max() / max(largest, 1e-30))
