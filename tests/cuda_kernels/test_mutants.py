"""The checks of the CUDA kernels find mistakes: at least 19 of 20 mutants of the device code, made by rule, fail them.

A dozen at every push, one of each kind; all of them nightly. `survivors.py` lists those that pass, and why they may.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.cuda_emulator import build
from tests.cuda_emulator.mutants import RULES, SURVIVED, UNCOMPILED, Mutant, mutants_of
from tests.cuda_emulator.plain_trials import AGGREGATE, ATTENTION, FILES, PROJECTION, Driver, drivers_of, verdicts_of
from tests.cuda_kernels.survivors import SURVIVORS

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


def in_reach(mutant: Mutant) -> bool:
    """Indices of 32 bits are wrong where nothing here is large enough to show it; see survivors.py."""
    return mutant.kind != "index narrowed"


@pytest.mark.nightly
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_all_mutants_are_found(one_thread: None, file: Path) -> None:
    """Three to five seconds of processor time for each."""
    verdicts = dict(verdicts_of(file))
    survived = {mutant.label.removeprefix(f"{file.name}: ") for mutant, end in verdicts.items() if end == SURVIVED}
    listed = set(SURVIVORS.get(file.name, {}))
    assert listed <= survived, "listed, and found all the same"
    tried = {mutant.label.removeprefix(f"{file.name}: ") for mutant in verdicts if in_reach(mutant)} - listed
    assert len(tried & survived) <= 0.05 * len(tried), tried & survived


def test_every_file_has_a_trial() -> None:
    """None is left out, and no survivor is listed that is no more."""
    assert [file.name for file in FILES if not drivers_of(file)] == []
    kinds = Counter[str]()
    for file in FILES:
        mutants = mutants_of(file)
        kinds.update(mutant.kind for mutant in mutants)
        labels = {mutant.label.removeprefix(f"{file.name}: ") for mutant in mutants}
        assert set(SURVIVORS.get(file.name, {})) <= labels
    assert set(SURVIVORS) <= {file.name for file in FILES}
    assert kinds.keys() <= RULES.keys()
    survivors = sum(len(reasons) for reasons in SURVIVORS.values())
    assert kinds.total() >= 300
    assert survivors <= 0.05 * kinds.total()
