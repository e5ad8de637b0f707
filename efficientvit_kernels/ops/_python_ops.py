"""Registers ops that are written in Python: those on Triton, and lite_mla on CUDA. Their modules are imported at the
first call of each, and Triton with them.

Opaque ops, like the native ones: torch.compile sees a call with a fake kernel, and does not trace into it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("efficientvit_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]


# Where the functions `<op>_<stage>` of a backend stand.
_MODULES = {"triton": "..triton_kernels.{}", "cuda": "._cuda_{}"}


def register_python(op: str, stage: str, backend: str, signature: str, fake: Callable[..., object]) -> None:
    """`<op>_<stage>_<backend>`, computed by a Python function.

    signature: arguments and results in torch's schema language, those of the native op.
    """
    name = f"{op}_{stage}_{backend}"
    _LIBRARY.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]

    def run(*arguments: Any) -> Any:
        kernels = importlib.import_module(_MODULES[backend].format(op), __package__)
        with _device_of(arguments):
            return getattr(kernels, f"{op}_{stage}")(*arguments)

    for key in ("CUDA", "CPU"):  # CPU: for the interpreter and the emulator; `why_not` keeps everything else away
        _LIBRARY.impl(name, run, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"efficientvit_kernels::{name}", fake, lib=_LIBRARY)


def _device_of(arguments: tuple[Any, ...]) -> AbstractContextManager[object]:
    """Kernels launch on the current device: that of the tensors, whatever the caller's is."""
    flat = (tensor for argument in arguments for tensor in (argument if isinstance(argument, list) else [argument]))
    device = next(tensor.device for tensor in flat if isinstance(tensor, Tensor))
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
