"""Shared set-up: unwritten memory is NaN, random state is fixed, long tests run only when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Tests that run side by side share the cores.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))

# Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. It reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="also run the tests marked nightly")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    not_now = pytest.mark.skip(reason="long; run by `make nightly`")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("nightly") and not config.getoption("--nightly"):
            item.add_marker(not_now)


@pytest.fixture(autouse=True)
def nan_filled_empties() -> Iterator[None]:
    """Every torch.empty, in Python and in C++, comes filled with NaN, so that an unwritten element fails the test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def emulated_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU, a test whose parameter `backend` is "cuda" runs the CUDA kernels in the emulator."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is None or parameters.params.get("backend") != "cuda" or torch.cuda.is_available():
        return
    from efficientvit_kernels import _library
    from tests.cuda_emulator import ops

    if (reason := ops.why_not_emulated()) is not None:
        pytest.skip(reason)
    ops.emulated_ops()
    monkeypatch.setattr(_library, "CUDA_EMULATED", True)


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CUDA library was built, a module may be made for "cuda" on a machine without a GPU."""
    from efficientvit_kernels import _library

    monkeypatch.setattr(_library, "WHY_NOT_CUDA", "it was left out")


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's thread count after a test that changes it."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No graphs from earlier tests, and uninitialised memory as it comes: inductor plans its own."""
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)
    yield
    torch.compiler.reset()


@pytest.fixture
def one_thread(threads: None) -> None:
    """For many small cases: torch's own small convolutions spend their time on starting threads."""
    torch.set_num_threads(1)
