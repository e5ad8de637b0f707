"""The generator of mutants: what it makes of the samples, and that a good check kills every one of them."""

from __future__ import annotations

import ctypes
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cuda_emulator import build
from tests.cuda_emulator.mutants import RULES, SURVIVED, UNCOMPILED, Mutant, Trial, mutants_of, mutated_library
from tests.cuda_emulator.sample_runs import SAMPLES, run

pytestmark = build.needs_compiler
GRAM = SAMPLES / "gram.cuh"
UNTOUCHED = -777.0


def check_gram(path: Path) -> None:
    """samples/gram.cuh in both layouts and two orders of threads.

    Memory beyond x is NaN, memory beyond out must stay as it was.
    """
    library = ctypes.CDLL(str(path))
    width, tokens = 14, 5 * 14
    x = torch.randint(-4, 5, (16, tokens), generator=torch.Generator().manual_seed(3)).float()
    x[0, 0], x[12, 40] = 3, math.nan
    positive = x.relu()
    gram = positive @ positive[:8].T
    expected = positive / (positive.sum(1, keepdim=True) + 0.25)
    for order in ("forward", "reverse"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EVK_EMULATOR_ORDER", order)
            for channels_last in (0, 1):
                stored = torch.cat([(x.T if channels_last else x).flatten(), torch.full((256,), math.nan)])
                out = torch.full((128 + x.numel() + 256,), UNTOUCHED)
                run(library, "gram", stored, out, block=(64,), shared=4 * (16 * 32 + 16), a=width, b=channels_last)
                assert (out[128 + x.numel() :] == UNTOUCHED).all(), "written beyond the end"
                actual = out[: 128 + x.numel()]
                # Sums of integers are exact; the quotient is rounded once.
                wanted = torch.cat([gram.flatten(), expected.flatten()])
                torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=0, equal_nan=True)


GRAM_TRIAL = Trial([SAMPLES / "gram.cu"], "gram_mutant", check_gram, includes=[SAMPLES], seconds=5)


# Equivalent, or beyond what a test can reach.
SURVIVORS = {
    "bound off by one: for (int start = 0; start < tokens; start += kTile) { [< -> <=]": "one more tile, of zeros",
    "condition dropped: if (warp == 0) multiply(d, tile); [warp == 0 -> true]": "the other warp's d is not used",
    "condition dropped: ptx::cp_async_4(tile + i, image.data + (valid ? image.offset(channel, token) : 0), valid); "
    "[valid -> true]": "an address that is not read",
    "index narrowed: int64_t stride_c, stride_h, stride_w; [int64_t -> int32_t]": "needs 2^31 elements",
    "index narrowed: __device__ int64_t offset(int channel, int token) const { [int64_t -> int32_t]": "as above",
}
# One of each class for every push: value, order of threads, error of the emulator, memory beyond the end.
QUICK = [
    "barrier removed: __syncthreads(); [__syncthreads() -> (void)0] #2",
    "bound off by one: if (threadIdx.x < kChannels) sums[threadIdx.x] = 0.0f; [< -> <=]",
    "bound off by one: for (int i = threadIdx.x; i < kChannels * tokens; i += blockDim.x) { [< -> <=]",
    "relu drops NaN: __device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; } "
    "[x < 0.0f ? 0.0f : x -> fmaxf(x, 0.0f)]",
]


def by_label() -> dict[str, Mutant]:
    return {mutant.label.removeprefix("gram.cuh: "): mutant for mutant in mutants_of(GRAM)}


def test_some_mutants_are_killed(one_thread: None) -> None:
    chosen = by_label()
    verdicts = GRAM_TRIAL.verdicts([chosen[label] for label in [*QUICK, next(iter(SURVIVORS))]])
    words = [verdict.split("\n")[0] for verdict in verdicts.values()]
    assert words == [
        "AssertionError: Tensor-likes are not close!",
        "RuntimeError: cuda emulator: something was written after shared memory of 2112 bytes, block (0, 0, 0)",
        "AssertionError: written beyond the end",
        "AssertionError: Tensor-likes are not close!",
        SURVIVED,
    ]


@pytest.mark.nightly
def test_every_mutant_is_killed(one_thread: None) -> None:
    chosen = by_label()
    verdicts = dict(zip(chosen, GRAM_TRIAL.verdicts(list(chosen.values())).values(), strict=True))
    assert {label for label, verdict in verdicts.items() if verdict == SURVIVED} == SURVIVORS.keys()
    assert UNCOMPILED not in verdicts.values()
    assert len(verdicts) >= 45


def test_a_trial_of_a_wrong_source_is_refused(one_thread: None) -> None:
    def check(path: Path) -> None:
        raise ValueError("wrong")

    with pytest.raises(AssertionError, match=r"^the check fails without a mutant: ValueError: wrong"):
        replace(GRAM_TRIAL, check=check).verdicts([])


def test_ends_of_processes(one_thread: None) -> None:
    """A mutant that ends its process, or does not end, is no end of the trial."""

    def check(path: Path) -> None:
        if path.parent.name == "0":
            os.abort()
        if path.parent.name == "1":
            time.sleep(60)

    chosen = by_label()
    verdicts = replace(GRAM_TRIAL, check=check, seconds=1).verdicts([chosen[label] for label in QUICK[:3]])
    assert list(verdicts.values()) == ["SIGABRT", "no end", SURVIVED]


def test_every_include_finds_the_mutant(tmp_path: Path) -> None:
    """From beside the file, from elsewhere, and its own of the folder above."""
    folder = tmp_path / "parent" / "code"
    folder.mkdir(parents=True)
    (folder.parent / "limit.h").write_text("constexpr int kLimit = 3;\n")
    (folder / "kernel.cuh").write_text(
        '#include "../limit.h"\ninline int below(int i) { return i < kLimit ? 1 : 0; }\n'
    )
    sources = [folder / "beside.cu", tmp_path / "elsewhere.cu"]
    for source in sources:
        entry = f'extern "C" __attribute__((visibility("default"))) int {source.stem}(int i)'
        source.write_text(f'#include "kernel.cuh"\n{entry} {{ return below(i); }}\n')
    (mutant,) = [mutant for mutant in mutants_of(folder / "kernel.cuh") if mutant.kind == "bound off by one"]
    scratch = tmp_path / "scratch"
    library = ctypes.CDLL(str(mutated_library(mutant, sources, "includes", scratch, includes=[folder])))
    assert [(library.beside(i), library.elsewhere(i)) for i in (2, 3, 4)] == [(1, 1), (1, 1), (0, 0)]
    assert (scratch / "sources/limit.h").exists()


# A line, and what each rule makes of it; nothing where it must not be changed.
EXAMPLES = [
    ("barrier removed", "if (a) __syncthreads();", ["if (a) (void)0;"]),
    ("barrier removed", "__syncwarp(lanes(a, b));", ["(void)0;"]),
    ("barrier removed", "// __syncthreads();", []),
    ("wait removed", "ptx::cp_async_wait<1>();", ["(void)0;"]),
    ("commit removed", "cp_async_commit();", ["(void)0;"]),
    (
        "bound off by one",
        "for (int i = a; i < n; ++i) f<int>(i << 2);",
        ["for (int i = a; i <= n; ++i) f<int>(i << 2);"],
    ),
    ("bound off by one", "bool in = i >= 0 || i > 3;", ["bool in = i >= 0 || i >= 3;", "bool in = i > 0 || i > 3;"]),
    ("bound off by one", "template <class T, int N>", []),
    ("bound off by one", "constexpr int kMost = kA < kB ? kA : kB;", []),
    ("bound off by one", "y = x < 0.0f ? 0.0f : x;", []),
    ("condition dropped", "if (f(i) < n) out[i] = x;", ["if (true) out[i] = x;"]),
    ("condition dropped", "if (i >= n) return;", ["if (false) return;"]),
    ("condition dropped", "if (i >= n) {\n  continue;", ["if (false) {\n  continue;"]),
    ("condition dropped", "if constexpr (kFlat) f();", []),
    ("condition dropped", "void __launch_bounds__(kThreads, (kA && (kB)) ? 3 : 2) kernel() {}", []),
    ("condition dropped", "x = g(i < n ? p[i] : 0.0f);", ["x = g(true ? p[i] : 0.0f);"]),
    (
        "condition dropped",
        "y += a[i] ? b : c ? d : e;",
        ["y += true ? b : c ? d : e;", "y += a[i] ? b : true ? d : e;"],
    ),
    ("condition dropped", "return a == b ? c : d;", ["return true ? c : d;"]),
    (
        "condition dropped",
        "const bool in = row < h && column < w;",
        ["const bool in = true;", "const bool in = true && column < w;", "const bool in = row < h && true;"],
    ),
    ("condition dropped", "f(a, b && (c || d), e);", ["f(a, true && (c || d), e);", "f(a, b && true, e);"]),
    (
        "mask of a copy dropped",
        "cp_async_16(s + i, g + (in ? i : 0), in);",
        ["cp_async_16(s + i, g + (in ? i : 0), true);"],
    ),
    ("mask of a copy dropped", "cp_async_8(s, g, true);", []),
    (
        "stride of another axis",
        "int64_t stride_h, stride_w;\nx = p[i * stride_h + j];",
        ["int64_t stride_h, stride_w;\nx = p[i * stride_w + j];"],
    ),
    (
        "stride of another axis",
        "p = a.stride_n + stride_q_n + stride_q_c;",
        ["p = a.stride_n + stride_q_c + stride_q_c;", "p = a.stride_n + stride_q_n + stride_q_n;"],
    ),
    ("relu drops NaN", "return x.y[0] < 0.f ? 0.f : x.y[0];", ["return fmaxf(x.y[0], 0.0f);"]),
    ("relu drops NaN", "return x < 0.f ? 0.f : y;", []),
    (
        "fragment of another index",
        "uint32_t a[2] = {x[1], x[0]};",
        ["uint32_t a[2] = {x[0], x[0]};", "uint32_t a[2] = {x[1], x[1]};"],
    ),
    (
        "fragment of another index",
        "float d[2], e[1];\nd[1] = e[0] + d[2];",
        [
            "float d[2], e[1];\nd[2] = e[0] + d[2];",
            "float d[2], e[1];\nd[1] = e[1] + d[2];",
            "float d[2], e[1];\nd[1] = e[0] + d[1];",
        ],
    ),
    (
        "index narrowed",
        "const int64_t i = static_cast<int64_t>(b) * n;",
        ["const int32_t i = static_cast<int64_t>(b) * n;", "const int64_t i = static_cast<int32_t>(b) * n;"],
    ),
    (
        "shuffle distance halved",
        "x += __shfl_down_sync(mask(a, b), f(x, y), d + 1, 16);",
        ["x += __shfl_down_sync(mask(a, b), f(x, y), (d + 1) / 2, 16);"],
    ),
    (
        "initialisation dropped",
        "float d[4] = {}, e = 0.0f;",
        ["float d[4] = {1234.5f}, e = 0.0f;", "float d[4] = {}, e = 1234.5f;"],
    ),
    ("initialisation dropped", "float x = 1.0f; int i = 0;", []),
    ("sum overwritten", "for (int i = 0; i < n; i += 2) x += y[i];", ["for (int i = 0; i < n; i += 2) x = y[i];"]),
    ("eps dropped", "y = x / (s + args.eps);", ["y = x / (s);"]),
    ("eps dropped", "y = x / (s + 1e-15f) + steps;", ["y = x / (s) + steps;"]),
]


@pytest.mark.parametrize(("kind", "code", "expected"), EXAMPLES)
def test_rule(tmp_path: Path, kind: str, code: str, expected: list[str]) -> None:
    path = tmp_path / "code.cuh"
    path.write_text(code + "\n")
    assert sorted(m.applied(code) for m in mutants_of(path) if m.kind == kind) == sorted(expected)


def test_kinds_of_the_sample() -> None:
    assert {mutant.kind for mutant in mutants_of(GRAM)} == RULES.keys()


def test_a_mutant_of_older_text_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"^gram.cuh has changed since its mutants were listed"):
        mutants_of(GRAM)[0].applied("another text")
