"""The tests of the Triton kernels find mistakes: at least 19 of 20 mutants made by `mutants.py` fail them.

A dozen at every push, all of them nightly. `survivors.py` lists those that pass and why they may.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import pytest
import triton

from efficientvit_kernels._build import ROOT
from tests.triton_kernels.mutants import FILES, FOLDER, RULES, mutants_of
from tests.triton_kernels.survivors import SURVIVORS

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="mutants run in the interpreter")
CHOSEN = {
    "relu_linear_attention.py": [
        "kv_state_kernel: loop: tl.minimum(start + split_tokens, tokens)",
        "apply_kernel: strides: stride_b ... stride_c",
        "apply_kernel: eps: den + eps",
        "grad_state_kernel: relu: tl.where(q_wide <= 0, 0.0, difference)",
        "grad_kv_kernel: rounding: remainder(columns, high, PRECISION)",
        "grad_kv_kernel: index: (D + o_r).to(tl.int64)",
    ],
    "attention_state.py": ["sum_of_splits: loop: range(1, splits)"],
    "aggregation.py": [
        "depthwise_rows: mask: o_h < height",
        "_row_above: window: K // 2",
        "add_products: precision: tl.dot(weight, rounded(acc[r], PRECISION), out[r], input_precision=PRECISION)",
    ],
    "multiscale_aggregate.py": [
        "gradients_kernel: mask: o_r < D",
        "grad_qkv_kernel: flip: -stride_dh ... -stride_dw ... depthwise + first * stride_dc + (K - 1) * "
        "(stride_dh + stride_dw)",
    ],
    "pointwise.py": ["pointwise_kernel: statement: p_x += step * stride_c"],
}


def failures(*words: str) -> dict[str, str | None]:
    """Per mutant the test that found it, or None. A file without names: of all, and of the package itself."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.triton_kernels.mutant_runs", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=14400, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


def test_chosen_mutants_are_found() -> None:
    found = failures(*(word for file, names in CHOSEN.items() for word in (file, *names)))
    assert list(found) == [name for names in CHOSEN.values() for name in names]
    assert [name for name, failure in found.items() if failure is None] == []


@pytest.mark.nightly
@pytest.mark.parametrize("file", FILES)
def test_all_mutants_are_found(file: str) -> None:
    found = failures(file)
    assert found.pop("the package itself") is None
    survived = {name for name, failure in found.items() if failure is None}
    assert survived >= set(SURVIVORS[file]), "listed, and found all the same"
    unknown = survived - set(SURVIVORS[file])
    assert len(survived) <= 0.05 * len(found) or not unknown, unknown


def test_every_kernel_has_mutants() -> None:
    """By every rule, and no file with kernels is left out."""
    assert {path.name for path in FOLDER.glob("*.py") if "@kernel\n" in path.read_text()} <= set(FILES)
    mutants = {file: mutants_of(file) for file in FILES}
    for file, of_file in mutants.items():
        source = (FOLDER / file).read_text()
        names = [mutant.name for mutant in of_file]
        assert len(set(names)) == len(names)
        assert set(SURVIVORS[file]) <= set(names), "a survivor that is no more"
        for mutant in of_file:
            assert mutant.source != source, mutant.name
            ast.parse(mutant.source)
    counts = {rule: sum(f": {rule}: " in m.name for ms in mutants.values() for m in ms) for rule in [*RULES, "strides"]}
    assert min(counts.values()) >= 1, counts
    survivors = sum(len(reasons) for reasons in SURVIVORS.values())
    assert survivors <= 0.05 * sum(counts.values()), "tests that miss more than one mutant of twenty are too weak"
