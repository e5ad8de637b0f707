"""Interpreted kernels under watch: what a GPU would do in silence fails here.

While a kernel runs, every address that it reads or writes must be that of an element of one of its tensors, not only
of their memory: gaps between the elements of a slice count as outside. No element is written twice in one launch, as
the order of programs is not defined. Products of float32 storage are in IEEE precision unless torch allows TF32, and
operands of a product in TF32 have no more than its 11 bits: matrix units would cut the rest off. Masks are of truth
values: a scalar condition in a mask becomes a number in the interpreter, and Triton 3.9's refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch import Tensor

# Up to this many elements from the first to the last one, membership is a table of booleans.
TABLE = 2**24


class _Region:
    """The elements of one tensor argument."""

    def __init__(self, tensor: Tensor) -> None:
        offsets = np.zeros(1, np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
        self.itemsize = tensor.element_size()
        self.first = tensor.data_ptr()
        self.elements = int(offsets.max(initial=-1)) + 1
        self.places: np.ndarray | None = None
        self.written = np.zeros(self.elements if self.elements <= TABLE else len(offsets), bool)
        if self.elements > TABLE:
            self.places = np.unique(offsets)
        self.members = np.zeros(self.elements if self.elements <= TABLE else 0, bool)
        if self.places is None:
            self.members[offsets] = True

    def __contains__(self, address: int) -> bool:
        return 0 <= address - self.first < self.elements * self.itemsize

    def indices(self, addresses: np.ndarray) -> np.ndarray | None:
        """Places in `written` of addresses that are all elements of this tensor; None if one is not."""
        # Unsigned: what lies before the first element is far behind the last one.
        offsets, rest = np.divmod(addresses - np.uint64(self.first), np.uint64(self.itemsize))
        if rest.any() or (offsets >= self.elements).any():
            return None
        if self.places is None:
            return offsets if self.members[offsets].all() else None
        found = np.searchsorted(self.places, offsets.astype(np.int64))
        return found if (self.places[found] == offsets.astype(np.int64)).all() else None


class _Watch:
    def __init__(self) -> None:
        self.regions: list[_Region] = []
        self.precision = "ieee"

    def start(self, arguments: Sequence[Any]) -> None:
        tensors = {(t.data_ptr(), t.shape, t.stride()): t for t in arguments if isinstance(t, Tensor) and t.numel()}
        self.regions = [_Region(tensor) for tensor in tensors.values()]
        half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors.values())
        self.precision = "tf32" if half or torch.get_float32_matmul_precision() != "highest" else "ieee"

    def find(self, what: str, pointers: np.ndarray, mask: np.ndarray) -> tuple[_Region, np.ndarray] | None:
        """The tensor where the addresses that are not masked lie, and their places there; None if all are masked."""
        assert mask.dtype == bool, f"the mask of {what} must be of truth values, got {mask.dtype}"
        shape = np.broadcast_shapes(pointers.shape, mask.shape)
        addresses = np.broadcast_to(pointers, shape)[np.broadcast_to(mask, shape)].reshape(-1)
        if not addresses.size:
            return None
        for region in self.regions:
            if int(addresses[0]) in region:
                places = region.indices(addresses)
                if places is not None:
                    return region, places
        raise AssertionError(f"{what} of what is no element of a tensor")

    def write(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        found = self.find("a write", pointers, mask)
        if found is not None:
            region, places = found
            assert not region.written[places].any(), "an element is written twice"
            region.written[places] = True

    def multiply(self, operands: Sequence[np.ndarray], precision: str) -> None:
        assert precision == self.precision, f"a product must be in {self.precision}, got {precision}"
        for operand in operands if precision == "tf32" else ():
            if operand.dtype == np.float32:
                bits = operand[np.isfinite(operand)].view(np.uint32)
                assert not (bits & 0x1FFF).any(), "an operand of a product in TF32 is not rounded"


@contextmanager
def watched() -> Iterator[None]:
    """Nothing but a pass where kernels are compiled."""
    if not triton.knobs.runtime.interpret:
        yield
        return
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    watch = _Watch()
    load, store, dot = (
        getattr(InterpreterBuilder, f"create_{name}") for name in ("masked_load", "masked_store", "dot")
    )
    call = GridExecutor.__call__

    def watched_call(self: Any, *arguments: Any, **options: Any) -> Any:
        watch.start(arguments)
        return call(self, *arguments, **options)

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        watch.find("a read", pointers.data, mask.data)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.write(pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest)

    def watched_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        watch.multiply((a.data, b.data), str(precision).rsplit(".")[-1].lower())
        return dot(self, a, b, d, precision, *rest)

    with ExitStack() as stack:
        stack.enter_context(patch.object(GridExecutor, "__call__", watched_call))
        for name, replacement in (("masked_load", watched_load), ("masked_store", watched_store), ("dot", watched_dot)):
            stack.enter_context(patch.object(InterpreterBuilder, f"create_{name}", replacement))
        yield
