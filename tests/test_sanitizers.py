"""The CPU library under sanitizers: no access outside a tensor or a piece of scratch memory, no undefined behaviour, no
race between tasks; and planted faults, which must be reported.
"""

from __future__ import annotations

import platform
import re
import signal

import pytest

from efficientvit_kernels import _build
from tests.sanitizing import EDITS, ISAS, ONE_INSTRUCTION_SET, Edit, SanitizedCopy, available, runtimes

pytestmark = [
    pytest.mark.skipif(runtimes("address") is None, reason="the compiler comes without sanitizer libraries"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the edits of the copy are for x86-64"),
]
isas = pytest.mark.parametrize("isa", ISAS)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> SanitizedCopy:
    return SanitizedCopy(tmp_path_factory.mktemp("address"), "address")


@pytest.fixture(scope="module")
def address_baseline(tmp_path_factory: pytest.TempPathFactory) -> SanitizedCopy:
    return SanitizedCopy(tmp_path_factory.mktemp("address_baseline"), "address", only_baseline=True)


@pytest.fixture(scope="module")
def guards(tmp_path_factory: pytest.TempPathFactory) -> SanitizedCopy:
    return SanitizedCopy(tmp_path_factory.mktemp("guards"), "guards")


@pytest.fixture(scope="module")
def thread(tmp_path_factory: pytest.TempPathFactory) -> SanitizedCopy:
    return SanitizedCopy(tmp_path_factory.mktemp("thread"), "thread")


@pytest.fixture(scope="module")
def thread_baseline(tmp_path_factory: pytest.TempPathFactory) -> SanitizedCopy:
    return SanitizedCopy(tmp_path_factory.mktemp("thread_baseline"), "thread", only_baseline=True)


def assert_clean(copy: SanitizedCopy, calls: str, isa: str) -> None:
    if not available(isa):
        pytest.skip(f"this CPU has no {isa}")
    result = copy.run(calls, isa)
    assert result.returncode == 0, result.stderr[-8000:]
    assert result.stdout.split()[:2] == ["clean", isa]


def test_memory_and_behaviour_quickly(address_baseline: SanitizedCopy) -> None:
    assert_clean(address_baseline, "quick", "baseline")


@pytest.mark.nightly
@isas
def test_memory_and_behaviour(isa: str, address: SanitizedCopy) -> None:
    assert_clean(address, "full", isa)


@pytest.mark.nightly
@isas
def test_memory_before_forbidden_pages(isa: str, guards: SanitizedCopy) -> None:
    assert_clean(guards, "awkward", isa)


@pytest.mark.nightly
@isas
def test_no_races(isa: str, thread: SanitizedCopy) -> None:
    assert_clean(thread, "threads", isa)


OVERFLOW, RACE = "AddressSanitizer: heap-buffer-overflow", "ThreadSanitizer: data race"
LOOP, LONGER_LOOP = "for (int64_t i = 0; i < count; ++i) ", "for (int64_t i = 0; i <= count; ++i) "
MEMORY_FAULTS = {
    "a tail reads one element more": (
        Edit("vec.h", f"{LOOP}values[i] = p[i];", f"{LONGER_LOOP}values[i] = p[i];"),
        OVERFLOW,
    ),
    "a tail writes one element more": (
        Edit("vec.h", f"{LOOP}p[i] = values[i];", f"{LONGER_LOOP}p[i] = values[i];"),
        OVERFLOW,
    ),
    "a halo goes on past the image": (
        Edit("depthwise.h", "take = (hi < width ? hi : width) - first;", "take = hi - first;"),
        OVERFLOW,
    ),
    "scratch memory is laid out for larger tiles than it was asked for": (
        Edit(
            "lite_mla_kernels.h",
            "grid(args.height, args.width, aggregate_tokens(args.width));",
            "grid(args.height, args.width, kAggregateTokens);",
        ),
        OVERFLOW,
    ),
    "one piece of scratch memory runs into the next": (
        Edit(
            "multiscale_aggregate_kernels.h",
            "    filtered = arena.take((ld_row + 1) * kAggregateLd);",
            "    filtered = arena.take(kAggregateLd);",
        ),
        "AddressSanitizer: use-after-poison",
    ),
    "scratch memory is not aligned": (
        Edit("launch.cpp", "  return buffer.data;", "  return static_cast<char*>(buffer.data) + 2;"),
        "runtime error: .* misaligned address",
    ),
}
MASK_FAULT = Edit("vec.h", "(1u << count) - 1", "(2u << count) - 1")
RACES = {
    "tasks of the attention overlap": Edit(
        "relu_linear_attention.cpp", "c + 1 == chunks ? tokens : (c + 1) * chunk", "tokens"
    ),
    "tasks of the aggregation share their sums": Edit(
        "multiscale_aggregate.cpp", "+ i * stride * bytes;", "+ i / 2 * stride * bytes;"
    ),
    "chunks of a block share their sums": Edit(
        "lite_mla_launch.h", "((chunk - 1) * pairs + pair) * numel", "pair * numel"
    ),
    "threads share their scratch memory": Edit(
        "launch.cpp", "  thread_local Buffer buffer(0);", "  static Buffer buffer(0);"
    ),
}


def test_edits_find_their_places() -> None:
    """On every push, so that a change of the sources is not found out by the nightly run."""
    edits = {edit for edits in EDITS.values() for edit in edits} | {*ONE_INSTRUCTION_SET, MASK_FAULT, *RACES.values()}
    for edit in edits | {fault for fault, _ in MEMORY_FAULTS.values()}:
        edit.applied((_build.ROOT / "csrc" / "cpu" / edit.file).read_text())


@pytest.mark.nightly
@pytest.mark.parametrize("name", MEMORY_FAULTS)
def test_planted_memory_faults_are_reported(name: str, address_baseline: SanitizedCopy) -> None:
    fault, expected = MEMORY_FAULTS[name]
    with address_baseline.planted(fault):
        result = address_baseline.run("quick", "baseline")
    assert result.returncode != 0
    assert re.search(expected, result.stderr), result.stderr[-8000:]


@pytest.mark.nightly
@pytest.mark.skipif(not available("avx512"), reason="this CPU has no avx512")
def test_a_planted_mask_fault_hits_a_forbidden_page(guards: SanitizedCopy) -> None:
    with guards.planted(MASK_FAULT):
        result = guards.run("awkward", "avx512")
    assert result.returncode == -signal.SIGSEGV, result.stderr[-8000:]


@pytest.mark.nightly
@pytest.mark.parametrize("name", RACES)
def test_planted_races_are_reported(name: str, thread_baseline: SanitizedCopy) -> None:
    with thread_baseline.planted(RACES[name]):
        result = thread_baseline.run("threads", "baseline")
    assert result.returncode != 0
    assert RACE in result.stderr, result.stderr[-8000:]
