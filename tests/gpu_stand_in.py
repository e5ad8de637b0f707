"""A stand-in for torch.cuda on the CPU: calls run at once, graphs replay by running again.

It shows that the GPU's paths of `benchmarks.gpu` run through and keep their books; nothing about a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import device, facts, parts
from benchmarks.gpu.parts import NotRunError

MEMORY = SimpleNamespace(total_memory=2**34, L2_cache_size=2**16)


class Stream:
    def wait_stream(self, other: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.time - self.time)


class Graph:
    """The calls that were captured, and the outputs that every replay overwrites."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run, self.outputs = run, run()

    def replay(self) -> None:
        _copy(self.outputs, self.run())


def _copy(old: Any, new: Any) -> None:
    if isinstance(old, torch.Tensor):
        old.detach().copy_(new.detach())
    elif isinstance(old, dict):
        for name in old:
            _copy(old[name], new[name])
    elif isinstance(old, (list, tuple)):
        for one, other in zip(old, new, strict=True):
            _copy(one, other)


def captured(run: Callable[[], object], warm_up: object) -> tuple[Graph, object]:
    graph = Graph(run)
    return graph, graph.outputs


@contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """While active, a Context for "cpu" takes the ways of a GPU. Yields the settings that were made."""
    settings: list[str] = []

    def no_triton(context: object) -> None:
        raise NotRunError("no Triton on the stand-in")

    with monkeypatch.context() as patch:
        patch.setattr(parts.Context, "on_gpu", property(lambda self: True))
        patch.setattr(device, "captured", captured)
        patch.setattr(facts, "triton_probes", no_triton)
        replaced: dict[str, Any] = {
            "Stream": Stream,
            "Event": Event,
            "stream": lambda stream: nullcontext(),
            "current_stream": Stream,
            "synchronize": lambda: None,
            "_sleep": lambda cycles: None,
            "get_device_properties": lambda index=0: MEMORY,
            "mem_get_info": lambda: (2**33, 2**34),
            "memory_allocated": lambda: 0,
            "max_memory_allocated": lambda: 2**20,
            "memory_reserved": lambda: 0,
            "reset_peak_memory_stats": lambda: None,
            "empty_cache": lambda: None,
            "set_per_process_memory_fraction": lambda fraction: settings.append(f"memory {fraction:.6f}"),
            "set_sync_debug_mode": lambda mode: settings.append(f"synchronisation {mode}"),
        }
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
        yield settings
