"""The checks of the CUDA kernels find mistakes: at least 19 of 20 mutants of the device code, made by rule, fail them.

A dozen at every push, among them one of each kind; nightly all. `survivors.py` lists what passes and why.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda_emulator import build
from tests.cuda_emulator.mutants import RULES, SURVIVED, UNCOMPILED, Mutant, mutants_of
from tests.cuda_emulator.plain_trials import (
    AGGREGATE,
    ATTENTION,
    FILES,
    PROJECTION,
    TWO_LAUNCHES,
    Driver,
    drivers_of,
    verdicts_of,
)
from tests.cuda_kernels.survivors import EQUIVALENT, MISSED

pytestmark = build.needs_compiler

# One of each kind, where few kernels must be compiled to find it: the driver, the levels of its tables, labels by file.
CHOSEN: dict[str, tuple[Driver, tuple[int, ...], dict[str, list[str]]]] = {
    "attention": (
        ATTENTION,
        (1, 0),
        {
            "relu_linear_attention_kernels.cuh": [
                "barrier removed: __syncthreads(); [__syncthreads() -> (void)0]",
                "bound off by one: for (int e = threadIdx.x; e < numel; e += blockDim.x) to[e] = sum_of_splits(states, "
                "count, numel, e); [< -> <=]",
                "initialisation dropped: float num[D / 8][4] = {}; [{} -> {1234.5f}]",
                "sum overwritten: z[i] += pair.x + pair.y; [+= -> =]",
                "eps dropped: const Divisor divisors[2] = {Divisor(sum_of_row(den[0]) + args.eps), "
                "Divisor(sum_of_row(den[1]) + args.eps)}; [without + args.eps]",
            ],
            "operands.cuh": [
                "shuffle distance halved: x += __shfl_xor_sync(0xffffffffu, x, 1); [1 -> (1) / 2]",
                "fragment of another index: __float_as_uint(q.v[1][1])}; [1 -> 0]",
            ],
            "tile.cuh": ["index narrowed: const int64_t stride_c = not_ahead(plane.stride_c); [int64_t -> int32_t]"],
        },
    ),
    "float32": (
        ATTENTION,
        (0, 1),
        {
            "tile.cuh": [
                "relu drops NaN: __device__ inline float relu(float x) { return x < 0.0f ? 0.0f : x; } "
                "[x < 0.0f ? 0.0f : x -> fmaxf(x, 0.0f)]"
            ]
        },
    ),
    "aggregation": (
        AGGREGATE,
        (1,),
        {
            "image_tile.cuh": [
                "wait removed: cp_async_wait<0>(); [cp_async_wait<0>() -> (void)0]",
                "condition dropped: if (!window.shows(at.row, column)) continue; "
                "[!window.shows(at.row, column) -> false]",
            ]
        },
    ),
    "two launches": (
        TWO_LAUNCHES,
        (1,),
        {
            "lite_mla_kernels.cuh": [
                "barrier removed: __syncthreads();  // x and W_q have been read [__syncthreads() -> (void)0]"
            ],
            "rows_product.cuh": ["bound off by one: for (int k = 0; k < weight.columns; k += 16) { [< -> <=]"],
        },
    ),
    "projection": (
        PROJECTION,
        (),
        {
            "projection_kernels.cuh": [
                "commit removed: cp_async_commit();  // an empty group, too: the waits count them "
                "[cp_async_commit() -> (void)0]",
                "mask of a copy dropped: there); [there -> true]",
                "stride of another axis: return batch * image.stride_b + c * image.stride_c + y * image.stride_h + "
                "of_image % image.width * image.stride_w; [stride_h -> stride_w]",
            ]
        },
    ),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_mutants_are_found(one_thread: None, name: str) -> None:
    driver, levels, labels = CHOSEN[name]
    by_label = {mutant.label: mutant for file in FILES if file.name in labels for mutant in mutants_of(file)}
    chosen = [by_label[f"{file}: {label}"] for file, of_file in labels.items() for label in of_file]
    verdicts = driver.trial(levels).verdicts(chosen)
    assert [mutant.label for mutant, verdict in verdicts.items() if verdict in (SURVIVED, UNCOMPILED)] == []


def test_one_of_each_kind_is_chosen() -> None:
    labels = [label for _, _, files in CHOSEN.values() for of_file in files.values() for label in of_file]
    kinds = {mutant.kind for file in FILES for mutant in mutants_of(file)}
    assert {label.partition(":")[0] for label in labels} == kinds


def label_of(mutant: Mutant) -> str:
    return mutant.label.removeprefix(f"{mutant.file.name}: ")


def listed(mutant: Mutant, *lists: dict[str, dict[str, str]]) -> bool:
    return any(label_of(mutant) in known.get(mutant.file.name, {}) for known in lists)


@pytest.mark.nightly
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_mutants_are_found(one_thread: None, file: Path) -> None:
    """Three to five seconds of processor time for each of some 900."""
    ends = dict(verdicts_of(file))
    survived = {mutant for mutant, end in ends.items() if end == SURVIVED}
    assert [m.label for m in ends if listed(m, EQUIVALENT, MISSED) and m not in survived] == [], "found all the same"
    unlisted = [m.label for m in survived if m.kind != "index narrowed" and not listed(m, EQUIVALENT, MISSED)]
    assert unlisted == []


def test_every_file_has_a_trial() -> None:
    """None is left out, and no survivor is listed that is no more."""
    assert [file.name for file in FILES if not drivers_of(file)] == []
    mutants = [mutant for file in FILES for mutant in mutants_of(file)]
    assert len(mutants) >= 300
    assert {mutant.kind for mutant in mutants} <= RULES.keys()
    counted = [m for m in mutants if m.kind != "index narrowed" and not listed(m, EQUIVALENT)]
    missed = sum(len(of_file) for of_file in MISSED.values())
    assert missed <= 0.05 * len(counted), "tests that miss more than one mutant of twenty are too weak"
    labels = {mutant.label for mutant in mutants}
    for known in (EQUIVALENT, MISSED):
        assert {f"{file}: {label}" for file, of_file in known.items() for label in of_file} <= labels
