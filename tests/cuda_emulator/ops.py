"""The CUDA ops on CPU tensors: the launchers and kernels of csrc/cuda, compiled with the emulator and loaded as ops."""

from __future__ import annotations

import ctypes
import functools

import torch

from efficientvit_kernels import _build
from tests.cuda_emulator.build import DEVICE_CODE, EMULATOR, library


@functools.cache
def emulated_ops() -> ctypes.CDLL:
    """Compiles what changed (a minute on two cores when everything has), registers the ops, and returns the library."""
    path = library([*sorted(DEVICE_CODE.glob("*.cu")), EMULATOR / "op_schemas.cu"], "ops", torch=True)
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


def cuda_calls() -> int:
    """Calls of a launcher so far in this process: of the emulated library, or of the real one."""
    if torch.cuda.is_available():
        from efficientvit_kernels import _library

        return _library.cuda_calls()
    count = emulated_ops().efficientvit_kernels_cuda_calls
    count.restype = ctypes.c_int64
    return int(count())


def why_not_emulated() -> str | None:
    from tests.cuda_emulator.build import cuda_include

    if _build.compiler() is None or cuda_include() is None:
        return "needs a C++ compiler and CUDA's headers"
    return None
