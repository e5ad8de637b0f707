"""LiteMLA and FusedLiteMLA against the official module's float64 results: outputs, every gradient, BN statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from efficientvit_kernels import FusedLiteMLA, LiteMLA
from efficientvit_kernels.testing import native_calls
from tests.golden_data import CASES, GOLDEN, golden_grad_out, golden_input, load_golden_state, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def build(case: dict[str, Any], backend: str) -> nn.Module:
    if backend == "module":
        return LiteMLA(**case["kwargs"])
    return FusedLiteMLA(**case["kwargs"], backend=backend)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("backend", ["module", "reference", "cpu", "auto"])
@pytest.mark.parametrize("case", CASES, ids=[case["file"][8:-4] for case in CASES])
def test_golden(case: dict[str, Any], backend: str, dtype: torch.dtype, channels_last: bool) -> None:
    golden = np.load(GOLDEN / case["file"])
    module = build(case, backend)
    load_golden_state(module, case)
    module.to(dtype).train(case["train"])
    x = golden_input(case).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    before = native_calls()

    out = module(x)
    out.backward(golden_grad_out(out.shape).to(dtype))

    # Forward and backward: of the whole block, or, where qkv has a norm, of the aggregation and of the attention.
    calls = {"whole": 2, "aggregation and attention": 4}
    assert native_calls() - before == (calls[module.fusion_plan().path] if backend in ("cpu", "auto") else 0)
    results = {"out": out, "grad_input": x.grad}
    results |= {f"grad/{name}": parameter.grad for name, parameter in module.named_parameters()}
    results |= {f"buffer/{name}": b for name, b in module.named_buffers() if f"buffer/{name}/v" in golden}
    errors = {name: relative_error(value, golden, name) for name, value in results.items()}
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors
