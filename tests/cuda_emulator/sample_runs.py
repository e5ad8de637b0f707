"""Runs the kernels of tests/cuda_emulator/samples on torch's tensors."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.cuda_emulator import build

SAMPLES = build.EMULATOR / "samples"


@cache
def _loaded(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


class Sample:
    """The kernels of one .cu file: in the emulator, under the sanitizer that the environment names (address, thread),
    or on a GPU."""

    def __init__(self, name: str, *flags: str, gpu: bool = False) -> None:
        self.on_gpu = gpu
        if gpu:
            self.library = _loaded(build.gpu_library(SAMPLES / f"{name}.cu", [SAMPLES]))
            return
        self.sanitized = os.environ.get("EVK_EMULATOR_SANITIZER", "")
        flags += {"address": build.ADDRESS, "thread": build.THREAD, "": ()}[self.sanitized]
        self.library = _loaded(build.library([SAMPLES / f"{name}.cu"], f"sample_{name}", flags, [SAMPLES]))

    def run(self, kernel: str, inputs: torch.Tensor, outputs: int | torch.Tensor, **options: Any) -> torch.Tensor:
        """`run` of this sample's library."""
        return run(self.library, kernel, inputs, outputs, **options)


def run(
    library: ctypes.CDLL,
    kernel: str,
    inputs: torch.Tensor,
    outputs: int | torch.Tensor,
    *,
    grid: Sequence[int] = (1,),
    block: Sequence[int] = (32,),
    shared: int = 0,
    a: int = 0,
    b: int = 0,
) -> torch.Tensor:
    """Launches `kernel(inputs, out, a, b)` and returns out, new and NaN unless given; elements have 4 bytes.

    Raises RuntimeError with the words of the emulator, or of CUDA.
    """
    out = torch.full((outputs,), float("nan")) if isinstance(outputs, int) else outputs
    assert inputs.is_contiguous()
    assert out.is_contiguous()
    assert inputs.element_size() == out.element_size() == 4
    function = getattr(library, f"run_{kernel}")
    function.restype = ctypes.c_char_p
    dims = [*grid, *[1] * (3 - len(grid)), *block, *[1] * (3 - len(block))]
    tensors = [
        argument
        for tensor in (inputs, out)
        for argument in (ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.numel()))
    ]
    words = function((ctypes.c_uint * 6)(*dims), ctypes.c_size_t(shared), *tensors, a, b)
    if words is not None:
        raise RuntimeError(words.decode())
    return out
