"""Two runs give the same bits: thousands of repeats of every op and backend, beside another stream that is busy."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import device
from benchmarks.gpu.calls import OPS, Sample, bound, proof_of_native, runnable, same_bits, served
from benchmarks.gpu.parts import Context, FailedError, NotRunError, Step

COUNTS = {"forward": 10_000, "backward": 1_000}
CHUNK = 50
STEP_S = 40.0
BUSY_SIZE, BUSY_PRODUCTS = 2048, 4  # per call: enough to be under way all the time


def steps(context: Context) -> list[Step]:
    backends = runnable(context.device)
    if not backends:
        return [Step("no backend", nothing_to_repeat)]
    dtypes = (torch.float16,) if context.quick else (torch.float16, torch.float32)
    return [
        Step(f"{direction}: {op}, {backend}, {str(dtype).removeprefix('torch.')}", partial(repeat, *what), 5.0)
        for dtype in dtypes
        for direction in COUNTS
        for op in OPS
        for backend in backends
        if (what := (op, backend, dtype, direction))
    ]


def nothing_to_repeat(context: Context) -> dict[str, Any]:
    raise NotRunError("no backend of this package has kernels for this device; torch's own promise nothing here")


def repeat(op: str, backend: str, dtype: torch.dtype, direction: str, context: Context) -> dict[str, Any]:
    """As many repeats as asked for, or as the time allows; how many there were is in the result."""
    sample = Sample(op, 2, 2, 16, 9, 7) if context.quick else Sample(op, 64, 4, 16, 14, 14)
    training = direction == "backward"
    call = bound(served(op, backend), sample.make(dtype, context.device), training, dtype)
    with proof_of_native(backend):
        first = call()
    wanted = 2 if context.quick else COUNTS[direction]
    wrong = {name: torch.zeros((), dtype=torch.int64, device=context.device) for name in first}
    end, done = time.monotonic() + context.budget(STEP_S), 0
    busy = _Busy(context.device) if context.on_gpu else None
    while done < wanted and (done == 0 or time.monotonic() < end):
        for _ in range(min(CHUNK, wanted - done)):
            if busy is not None:
                busy.more()
            for name, result in call().items():
                wrong[name] += (~same_bits(result, first[name])).sum()
            done += 1
        device.synchronize(context)
    different = {name: int(count) for name, count in wrong.items() if int(count)}
    found = {"sample": str(sample), "repeats": done, "wanted": wanted, "other_stream_busy": busy is not None}
    if different:
        raise FailedError(f"elements that differed from the first run: {different}", found)
    return found


class _Busy:
    """Matrix products on a stream of their own."""

    def __init__(self, where: str) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.left, self.right = (torch.randn(BUSY_SIZE, BUSY_SIZE, device=where).half() for _ in range(2))
        self.out = torch.empty_like(self.left)
        torch.cuda.synchronize()

    def more(self) -> None:
        with torch.cuda.stream(self.stream):
            for _ in range(BUSY_PRODUCTS):
                torch.matmul(self.left, self.right, out=self.out)
