"""How the ops live in a program: CUDA graphs, streams, host synchronisation, memory that runs out, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import device
from benchmarks.gpu.calls import (
    OPS,
    Arguments,
    Results,
    Sample,
    bound,
    different_bits,
    mapped,
    named_tensors,
    proof_of_native,
    results,
    runnable,
    served,
)
from benchmarks.gpu.child import result_of
from benchmarks.gpu.parts import Context, FailedError, NotRunError, Step

DTYPE = torch.float16
SLEEP_CYCLES = 50_000_000  # tens of milliseconds: what does not wait for its stream runs before this ends
CHILD_S = 120.0
MEMORY_STEPS = 8  # allocations fail at as many heights


def steps(context: Context) -> list[Step]:
    backends = [*runnable(context.device), *(["reference"] if context.on_gpu else [])]
    whole: dict[str, Callable[..., dict[str, Any]]] = {
        "graph": graph,
        "stream": stream,
        "no host synchronisation": no_synchronisation,
        "torch.compile": compiled,
    }
    children = {"stream sanitizer": "csan", "out of memory": "out_of_memory", "device error": "device_error"}
    return [
        Step(f"{what}: {op}, {backend}", partial(run, op, backend), 3.0)
        for what, run in whole.items()
        for backend in backends
        for op in OPS
        if backend != "reference" or what in ("graph", "torch.compile")
    ] + [
        Step(f"{what}: {op}, {backend}", partial(in_child, function, op, backend), 10.0)
        for what, function in children.items()
        for backend in runnable(context.device)
        for op in OPS
    ]


def sample_of(op: str) -> Sample:
    return Sample(op, 4, 4, 16, 14, 14, extras=op != "relu_linear_attention")


def needs_gpu(context: Context) -> None:
    if not context.on_gpu:
        raise NotRunError("needs a GPU")


def refill(arguments: Arguments, op: str, seed: int, where: str) -> None:
    """Other values into the very tensors of `arguments`."""
    fresh = named_tensors(sample_of(op).make(DTYPE, where, seed))
    for name, tensor in named_tensors(arguments).items():
        tensor.copy_(fresh[name])


def graph(op: str, backend: str, context: Context) -> dict[str, Any]:
    """Captured once, forward and backward, then replayed on other data: the bits of the call outside of the graph."""
    needs_gpu(context)
    for training in (False, True):
        arguments = sample_of(op).make(DTYPE, context.device)
        call = bound(served(op, backend), arguments, training, DTYPE)
        call()
        replayed, outputs = device.captured(call, [call])
        for seed in range(1, 4):
            refill(arguments, op, seed, context.device)
            replayed.replay()
            torch.cuda.synchronize()
            _expect_same(outputs, call(), backend, f"replay {seed}, training {training}")
    return {"replays": 3, "directions": ["forward", "backward"]}


def _expect_same(actual: Any, expected: Results, backend: str, where: str) -> None:
    """Bit by bit for our own kernels; torch's may choose other algorithms inside a graph."""
    if backend == "reference":
        wrong = [
            name
            for name, result in expected.items()
            if not torch.allclose(
                actual[name].float(), result.float(), rtol=0.02, atol=0.02 * float(result.abs().max())
            )
        ]
    else:
        wrong = different_bits(actual, expected)
    if wrong:
        raise FailedError(f"{where}: {', '.join(wrong)} differ")


def stream(op: str, backend: str, context: Context) -> dict[str, Any]:
    """On a stream that first sleeps, then writes the inputs: a launch on any other stream would read the old ones."""
    needs_gpu(context)
    fresh = sample_of(op).make(DTYPE, context.device, 7)
    expected = results(served(op, backend), fresh, True, DTYPE)
    arguments = sample_of(op).make(DTYPE, context.device, 1)
    call = bound(served(op, backend), arguments, True, DTYPE)
    call()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        for name, tensor in named_tensors(arguments).items():
            tensor.copy_(named_tensors(fresh)[name])
        found = call()
    side.synchronize()
    _expect_same(found, expected, backend, "on a side stream")
    return {"directions": ["forward", "backward"]}


def no_synchronisation(op: str, backend: str, context: Context) -> dict[str, Any]:
    """Nothing in a call waits for the device: torch raises where something does."""
    needs_gpu(context)
    for training in (False, True):
        call = bound(served(op, backend), sample_of(op).make(DTYPE, context.device), training, DTYPE)
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"directions": ["forward", "backward"]}


def compiled(op: str, backend: str, context: Context) -> dict[str, Any]:
    """One full graph, forward and backward, with the bits of eager."""
    torch.compiler.reset()
    arguments = sample_of(op).make(DTYPE, context.device)
    function = partial(OPS[op].public, backend=backend)
    expected = results(served(op, backend), arguments, True, DTYPE)
    found = results(torch.compile(function, fullgraph=True), arguments, True, DTYPE)
    _expect_same(found, expected, backend, "compiled")
    return {"directions": ["forward", "backward"]}


def in_child(function: str, op: str, backend: str, context: Context) -> dict[str, Any]:
    needs_gpu(context)
    environment = {"csan": {"TORCH_CUDA_SANITIZER": "1"}, "device_error": {"CUDA_LAUNCH_BLOCKING": "1"}}
    arguments = {"op": op, "backend": backend, "where": context.device}
    timeout = min(CHILD_S, context.left())
    return result_of(f"runtime:{function}", arguments, timeout, environment=environment.get(function))


def csan(op: str, backend: str, where: str) -> dict[str, Any]:
    """Under torch's stream sanitizer: inputs made on one stream, used on another after waiting for it."""
    arguments = sample_of(op).make(DTYPE, where)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), proof_of_native(backend):
        results(served(op, backend), arguments, True, DTYPE)
    side.synchronize()
    return {"directions": ["forward", "backward"]}


def out_of_memory(op: str, backend: str, where: str) -> dict[str, Any]:
    """With less and less memory every call succeeds or raises OutOfMemoryError; inputs stay, the next call is right."""
    sample = Sample(op, 16, 8, 32, 64, 64)
    arguments = sample.make(DTYPE, where)
    copies = mapped(arguments, torch.clone)
    call = bound(served(op, backend), arguments, True, DTYPE)
    expected = call()
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - base
    total = torch.cuda.get_device_properties(0).total_memory
    outcome = []
    for number in range(MEMORY_STEPS):
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_reserved() + extra * number / MEMORY_STEPS
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        try:
            call()
            outcome.append("ran")
        except torch.OutOfMemoryError:
            outcome.append("raised")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.synchronize()
        for name, tensor in named_tensors(arguments).items():
            if not torch.equal(tensor, named_tensors(copies)[name]):
                raise FailedError(f"{name} has changed after an allocation that failed", {"outcome": outcome})
        _expect_same(call(), expected, backend, f"the call after memory step {number}")
    if "raised" not in outcome:
        raise FailedError("no allocation failed: the test tested nothing", {"outcome": outcome, "extra": extra})
    return {"outcome": outcome, "extra_bytes": extra}


def device_error(op: str, backend: str, where: str) -> dict[str, Any]:
    """After a device-side assertion of somebody else our call raises and gives no result."""
    arguments = sample_of(op).make(DTYPE, where)
    call = bound(served(op, backend), arguments, False, DTYPE)
    call()
    torch.cuda.synchronize()
    index = torch.full((4,), 1 << 20, device=where)
    try:
        torch.zeros(8, device=where)[index].sum()
        torch.cuda.synchronize()
    except RuntimeError as error:
        planted = str(error).splitlines()[0]
    else:
        raise FailedError("the planted assertion did not fire: the test tested nothing")
    try:
        call()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return {"planted": planted[:200], "raised": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]}
    raise FailedError("the call returned as if the device were well", {"planted": planted})
