"""The configuration table of the attention's kernels serves every call, and its splits are what the readers expect."""

from __future__ import annotations

from itertools import pairwise, product
from math import inf

import pytest

from efficientvit_kernels.triton_kernels import configs, launch
from efficientvit_kernels.triton_kernels.configs import AttentionConfig, attention_config, tokens_per_split

KERNELS = ("kv_state", "apply", "grad_state", "grad_kv")
KINDS = ("half", "tf32", "ieee")
BLOCK_DIMS = (16, 32, 64, 128, 256)


def test_every_kernel_kind_and_head_dim_has_its_rows() -> None:
    assert set(configs._ATTENTION) == set(product(KERNELS, KINDS, BLOCK_DIMS))
    assert max(BLOCK_DIMS) == configs.MAX_HEAD_DIM


@pytest.mark.parametrize(("key", "rows"), [*configs._ATTENTION.items(), *configs._OF_ARCH.items()], ids=str)
def test_rows_are_well_formed(key: tuple[str | int, ...], rows: tuple[tuple[float, int], ...]) -> None:
    limits = [limit for limit, *_ in rows]
    assert all(a < b for a, b in pairwise(limits)), "buckets must grow"
    assert limits[-1] == inf, "there must be a row for any number of tokens"
    block_d = key[-1]
    assert isinstance(block_d, int)
    for _, *row in rows:
        config = AttentionConfig(*row)
        block_n, block_r, num_warps = config.block_n, config.block_r, config.num_warps
        assert 16 <= block_n <= configs.TOKENS_PER_SPLIT, "products need 16; a split must be whole tiles"
        assert 16 <= block_r <= block_d
        for size in (block_n, block_r, num_warps):
            assert size & (size - 1) == 0, f"{size} must be a power of two"
        assert 1 <= config.num_stages <= 5
        assert config.max_registers is None or 32 * num_warps * config.max_registers <= 65536


def test_the_bucket_is_that_of_the_tokens() -> None:
    few, many = (AttentionConfig(*row) for _, *row in configs._ATTENTION["kv_state", "half", 32])
    assert few != many
    for tokens, expected in ((1, few), (49, few), (256, few), (257, many), (16384, many), (2**31, many)):
        assert attention_config("kv_state", "half", 32, tokens, "sm_90") == expected


def test_an_architecture_has_rows_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs._OF_ARCH, ("sm_86", "apply", "half", 64), ((inf, 16, 16, 2, 1),))
    assert attention_config("apply", "half", 64, 100, "sm_86") == AttentionConfig(16, 16, 2, 1)
    assert attention_config("apply", "half", 64, 100, "sm_90") != AttentionConfig(16, 16, 2, 1)
    assert {key[1:] for key in configs._OF_ARCH} <= set(configs._ATTENTION)


def test_amd_has_half_the_warps_of_64_threads_and_no_bound_of_registers() -> None:
    for arch, warps, bound in (("sm_90", 8, {"maxnreg": 255}), ("gfx942", 4, {})):
        with launch.recording(arch) as recorded:
            launch.launch(None, 1, num_warps=8, num_stages=1, maxnreg=255)
        assert recorded[0].meta == {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True, **bound}


def test_large_tiles_have_a_bound_of_registers() -> None:
    for (kernel, kind, block_d), ((_, *row), *_) in configs._ATTENTION.items():
        bound = attention_config(kernel, kind, block_d, 1, "sm_80").max_registers
        if len(row) == 5:
            assert bound == row[4]
        else:
            assert bound == (255 if block_d >= 64 and row[2] == 8 else None)


@pytest.mark.parametrize(
    ("tokens", "per_split"), [(1, 256), (49, 256), (256, 256), (257, 256), (8192, 256), (8193, 512), (16384, 512)]
)
def test_tokens_per_split(tokens: int, per_split: int) -> None:
    assert tokens_per_split(tokens) == per_split
    assert -(-tokens // per_split) <= configs.MAX_SPLITS
