"""Runs mutants of the Triton kernels against tests of this folder and of tests/ops, in the interpreter, under watch.

`python -m tests.triton_kernels.mutant_runs FILE [NAME...] [FILE [NAME...]]...` prints a JSON line per mutant: its name,
and the test that failed, or null; without names, of all mutants of the file, and first of the package itself, which
must pass. Every mutant runs in a child of this process, which imports the kernels from a folder with the one file
changed in front of the package's own; what ends a child, an address out of bounds among it, kills the mutant.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from tests.ops import aggregate_samples
from tests.ops.block_common import assert_all_ok
from tests.ops.common import Sample, judge
from tests.triton_kernels.mutants import Mutant, mutants_of
from tests.triton_kernels.watch import watched

KERNELS = "efficientvit_kernels.triton_kernels"
SECONDS = 600  # of CPU time; a mutant that has not ended by then runs in circles
Test = Callable[[], object]
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


def attention_tests() -> Iterator[tuple[str, Test]]:
    """Imported by the child alone: modules of tests import the kernels."""
    from tests.ops import test_relu_linear_attention_edges as edges
    from tests.triton_kernels import test_addresses
    from tests.triton_kernels import test_relu_linear_attention as own

    samples = [(Sample(2, 2, 5, 9, 7), BFLOAT)]
    samples += [(sample, FLOAT) for sample in own.SMALL[::3] if sample.layout != "nchw" or sample.eps == 1e-3]
    samples += [(own.WIDE[0], BFLOAT), (own.WIDE[3], FLOAT), (own.WIDE[1], HALF), (own.WIDE[2], HALF)]
    samples += [(own.WIDE[2], FLOAT)]
    for sample, dtype in samples:
        yield f"rule T, {sample}, {dtype}", functools.partial(attention, sample, dtype)
    for dtype in (FLOAT, BFLOAT):
        yield f"integers {dtype}", functools.partial(own.test_integers_give_the_exact_state, 33, 9, 33, dtype)
        for name in "qkv":
            special = functools.partial(edges.test_e11_e12_e13_special_values, "triton", dtype, name, edges.nan)
            yield f"NaN in {name}, {dtype}", special
        zeros = functools.partial(edges.test_e1_e2_zero_denominators, "triton", dtype, "all", 3, 65536.0)
        yield f"zeros {dtype}", zeros
        yield f"E26 {dtype}", functools.partial(edges.test_e26_one_tiny_positive_key, "triton", dtype)
        neighbours = functools.partial(own.test_neighbours_full_of_nan, 5 if dtype == FLOAT else 96)
        yield f"neighbours {dtype}", neighbours
        no_eps = functools.partial(own.test_no_eps_and_tiles_that_reach_beyond_the_tokens, 5)
        yield f"no eps {dtype}", functools.partial(no_eps, dtype)
        yield f"inf {dtype}", functools.partial(own.test_infinite_gradients, dtype)
        yield f"E26, 96, {dtype}", functools.partial(own.test_e26_with_blocks_of_rows, dtype)
    yield "every NaN", own.test_no_rounding_turns_a_nan_into_a_number
    yield "far columns", test_addresses.test_attention_of_columns_far_apart
    yield "TF32", own.test_tf32_only_where_torch_allows_it
    yield "layouts", functools.partial(own.test_layouts_and_repeats_give_equal_results, FLOAT)
    for axis in test_addresses.AXES:
        for head_dim in (2, 66):
            yield f"far {axis}, {head_dim}", functools.partial(test_addresses.test_attention, head_dim, axis)


def attention(sample: Sample, dtype: torch.dtype) -> None:
    verdicts = judge(sample.make(dtype), sample.head_dim, sample.eps, "triton")
    assert_all_ok(verdicts)


def aggregation_tests() -> Iterator[tuple[str, Test]]:
    from tests.triton_kernels import test_addresses
    from tests.triton_kernels import test_multiscale_aggregate as own

    for i, sample in enumerate([*own.FUSED, *own.SPLIT]):
        yield f"rule T, {sample}", functools.partial(own.check, sample, own.DTYPES[i % 3])
    yield (
        "integers",
        functools.partial(
            own.test_integers_are_exact, aggregate_samples.Sample(1, 1, 8, 3, 4, (5,), biases=True), BFLOAT
        ),
    )
    for mark in own.test_special_values_reach_what_they_touch.pytestmark:
        if mark.name == "parametrize":
            for case in mark.args[1]:
                yield f"{case[0]}", functools.partial(own.test_special_values_reach_what_they_touch, *case)
    for k in (3, 7):
        yield f"NaN in grad_out, {k}", functools.partial(own.test_nan_in_grad_out, k)
    yield "strides of weights", own.test_weights_of_any_strides
    for programs, sample in own.RUNS:
        with pytest.MonkeyPatch.context() as patch:  # undone when the next test is asked for
            call = functools.partial(own.test_programs_that_take_several_tiles_and_images, programs, sample, patch)
            yield f"{programs} programs, {sample}", call
    yield "addend", functools.partial(own.test_addend, (3, 1))
    for k in (3, 7):
        yield f"TF32, {k}", functools.partial(own.test_tf32, k)
    for dim, k in ((5, 3), (2, 7), (33, 3)):
        yield f"neighbours, {dim}, {k}", functools.partial(own.test_neighbours_full_of_nan, dim, k)
    yield "large magnitudes", own.test_large_magnitudes
    for axis in test_addresses.AXES:
        yield f"far {axis}", functools.partial(test_addresses.test_aggregation, 3, axis)
    yield "far blocks of channels", test_addresses.test_gradient_of_more_channels_than_a_program_has
    yield "far channels, 7", functools.partial(test_addresses.test_aggregation, 7, "channels")
    yield "far images, 7", functools.partial(test_addresses.test_aggregation, 7, "images")
    yield "far columns, 9", functools.partial(test_addresses.test_aggregation, 9, "columns")


def block_tests() -> Iterator[tuple[str, Test]]:
    from tests.triton_kernels import test_addresses
    from tests.triton_kernels import test_lite_mla as own

    for sample, dtype in own.FORWARD:
        yield f"forward, {sample}, {dtype}", functools.partial(own.test_forward, sample, dtype)
    yield "NaN in an image", own.test_images_are_independent
    yield "strides of weights", test_addresses.test_fused_block_with_weights_of_any_strides
    yield "TF32", test_addresses.test_fused_block_in_tf32
    yield "neighbours", test_addresses.test_fused_block_beside_nan
    yield "launches", functools.partial(own.test_launches, FLOAT)
    for axis in test_addresses.AXES:
        yield f"far {axis}", functools.partial(test_addresses.test_fused_block, axis)


def product_tests() -> Iterator[tuple[str, Test]]:
    from tests.triton_kernels import test_addresses
    from tests.triton_kernels import test_lite_mla as own

    for dtype in (HALF, BFLOAT):
        for channels, out_channels, layout in ((70, 33, "nchw"), (16, 130, "channels_last")):
            call = functools.partial(own.test_product_with_epilogue, channels, out_channels, layout, dtype)
            yield f"product, {channels}, {out_channels}, {dtype}", call
    yield "every NaN", own.test_no_rounding_of_a_product_turns_a_nan_into_a_number
    for axis in test_addresses.AXES:
        yield f"far {axis}", functools.partial(test_addresses.test_product_with_epilogue, axis)


TESTS: dict[str, tuple[Callable[[], Iterator[tuple[str, Test]]], ...]] = {
    "tile.py": (attention_tests, product_tests),
    "attention_state.py": (attention_tests,),
    "aggregation.py": (aggregation_tests,),
    "relu_linear_attention.py": (attention_tests,),
    "multiscale_aggregate.py": (aggregation_tests,),
    "lite_mla_kernels.py": (block_tests,),
    "pointwise.py": (product_tests,),
}


def first_failure(file: str, mutant: Mutant | None) -> str | None:
    """In a child: the first test that fails with the mutant in place of its file; None if all pass."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            said = _run(file, mutant, lambda text: os.write(writing, text.encode()))
            status = 0 if said else 3
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace").splitlines()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return None
    return said[-1] if said else f"status {status}"


def _run(file: str, mutant: Mutant | None, say: Callable[[str], object]) -> bool:
    kernels = importlib.import_module(KERNELS)
    with tempfile.TemporaryDirectory() as folder, watched():
        if mutant is not None:
            (Path(folder) / file).write_text(mutant.source)
            kernels.__path__.insert(0, folder)
        warnings.simplefilter("ignore")
        name = "import"
        try:
            for name, test in _tests_of(file, mutant):
                say(f"{name}\n")
                torch.manual_seed(0)
                test()
        except BaseException as error:  # InterpreterError and whatever numpy says of a mutant
            say(f"{name}: {type(error).__name__} {' '.join(str(error).split())[:160]}\n")
            return False
    return True


def _tests_of(file: str, mutant: Mutant | None) -> Iterator[tuple[str, Test]]:
    """Only elements that lie far apart show an index of 32 bits, and an index is all that they are about."""
    for suite in TESTS[file]:
        for name, test in suite():
            if mutant is None or name.startswith("far") == (": index: " in mutant.name):
                yield name, test


def _load_what_children_share(file: str) -> None:
    """All modules but the kernels, and the tests that hold on to them: importing them would take longest."""
    for suite in TESTS[file]:
        next(suite())
    for name in [*sys.modules]:
        if name.startswith((f"{KERNELS}.", "tests.triton_kernels.test_", "tests.ops.test_")) or name == KERNELS:
            del sys.modules[name]
            parent, _, attribute = name.rpartition(".")
            if hasattr(sys.modules.get(parent), attribute):  # `from parent import module` would find it there
                delattr(sys.modules[parent], attribute)


def run_mutants(file: str, names: list[str]) -> None:
    wanted = [mutant for mutant in mutants_of(file) if not names or mutant.name in names]
    missing = set(names) - {mutant.name for mutant in wanted}
    if missing:
        raise SystemExit(f"mutant_runs: {file} has no mutants {sorted(missing)}")
    _load_what_children_share(file)
    for mutant in wanted if names else (None, *wanted):
        name = "the package itself" if mutant is None else mutant.name
        print(json.dumps([name, first_failure(file, mutant)]), flush=True)


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    starts = [i for i, word in enumerate(words) if word in TESTS]
    for start, stop in zip(starts, [*starts[1:], len(words)], strict=True):
        run_mutants(words[start], words[start + 1 : stop])


if __name__ == "__main__":
    main(sys.argv[1:])
