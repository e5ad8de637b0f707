"""The configuration table: tiles, warps and pipeline stages of every kernel, per precision, head dimension and tokens.

Nothing is tuned at run time: that would depend on the machine's mood, tune anew at every resolution and break the
capture of CUDA graphs. The entries come from the resources of their code (nothing spills in the table that
`resources.py` makes) and from the bytes that they keep in flight; none is measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

# Each split of the sum over tokens costs a state to write and read again (4 KB at D = 32), and gives one more program
# per head; with up to MAX_SUMMED_SPLITS the readers add them up themselves, which saves a launch.
TOKENS_PER_SPLIT = 256
MAX_SPLITS = 32
MAX_SUMMED_SPLITS = 4


# ptxas spills a few bytes where that lets one more block on a multiprocessor, unless it is told a bound; then it uses
# what it is given. For large tiles, which no official model has.
MAX_REGISTERS = 255


@dataclass(frozen=True)
class AttentionConfig:
    """block_n: tokens of a tile. block_r: rows of the state that a program holds. max_registers: NVIDIA alone."""

    block_n: int
    block_r: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# Per kernel, kind and padded head dimension: (up to this many tokens, block_n, block_r, num_warps, num_stages), the
# fewest tokens first; sixth, where MAX_REGISTERS are more than are needed, max_registers.
# Kinds: "half", 16-bit storage; "tf32", float32 storage with TF32 products; "ieee", float32.
#
# Up to 256 tokens a split is a handful of tiles, and planes are often not aligned (7 x 7, 14 x 14), so that every
# element is loaded by an address of its own: smaller tiles, or these addresses fill the registers.
# Products in IEEE float32 have no matrix units: Triton unrolls them, and holds a row of both operands per output in
# registers; hence 8 warps and few tokens or rows.
_Row = tuple[float, int, int, int, int] | tuple[float, int, int, int, int, int]
_ATTENTION: dict[tuple[str, str, int], tuple[_Row, ...]] = {
    ("kv_state", "half", 16): ((256, 64, 16, 4, 2), (inf, 128, 16, 4, 3)),
    ("kv_state", "half", 32): ((256, 32, 32, 4, 3), (inf, 64, 32, 4, 3)),
    ("kv_state", "half", 64): ((inf, 64, 64, 8, 3, 128),),
    ("kv_state", "half", 128): ((inf, 32, 64, 8, 2),),
    ("kv_state", "half", 256): ((inf, 32, 32, 8, 2),),
    ("kv_state", "tf32", 16): ((256, 32, 16, 4, 3), (inf, 64, 16, 4, 3)),
    ("kv_state", "tf32", 32): ((256, 32, 32, 4, 2), (inf, 32, 32, 4, 3)),
    ("kv_state", "tf32", 64): ((inf, 32, 64, 8, 2, 128),),
    ("kv_state", "tf32", 128): ((inf, 32, 64, 8, 1),),
    ("kv_state", "tf32", 256): ((inf, 16, 32, 8, 1),),
    ("kv_state", "ieee", 16): ((inf, 32, 16, 4, 2),),
    ("kv_state", "ieee", 32): ((inf, 32, 32, 8, 2),),
    ("kv_state", "ieee", 64): ((inf, 16, 64, 8, 1, 128),),
    ("kv_state", "ieee", 128): ((inf, 16, 32, 8, 1, 128),),
    ("kv_state", "ieee", 256): ((inf, 16, 32, 8, 1),),
    ("apply", "half", 16): ((256, 64, 16, 4, 2), (inf, 128, 16, 4, 3)),
    ("apply", "half", 32): ((256, 32, 32, 4, 3), (inf, 64, 32, 4, 3)),
    ("apply", "half", 64): ((inf, 32, 64, 4, 2),),
    ("apply", "half", 128): ((inf, 32, 128, 8, 1),),
    ("apply", "half", 256): ((inf, 32, 64, 8, 1),),
    ("apply", "tf32", 16): ((inf, 64, 16, 4, 2),),
    ("apply", "tf32", 32): ((inf, 32, 32, 4, 3),),
    ("apply", "tf32", 64): ((inf, 32, 64, 8, 1),),
    ("apply", "tf32", 128): ((inf, 32, 64, 8, 1),),
    ("apply", "tf32", 256): ((inf, 32, 64, 8, 1),),
    ("apply", "ieee", 16): ((inf, 64, 16, 4, 2),),
    ("apply", "ieee", 32): ((inf, 64, 32, 8, 1),),
    ("apply", "ieee", 64): ((inf, 32, 32, 8, 1, 128),),
    ("apply", "ieee", 128): ((inf, 32, 32, 8, 1, 128),),
    ("apply", "ieee", 256): ((inf, 32, 32, 8, 1, 128),),
    ("grad_state", "half", 16): ((inf, 32, 16, 4, 4),),
    ("grad_state", "half", 32): ((inf, 16, 32, 4, 4),),
    ("grad_state", "half", 64): ((inf, 16, 64, 8, 2),),
    ("grad_state", "half", 128): ((inf, 16, 64, 8, 1),),
    ("grad_state", "half", 256): ((inf, 16, 16, 8, 1),),
    ("grad_state", "tf32", 16): ((inf, 32, 16, 4, 2),),
    ("grad_state", "tf32", 32): ((inf, 32, 32, 8, 2),),
    ("grad_state", "tf32", 64): ((inf, 16, 64, 8, 1),),
    ("grad_state", "tf32", 128): ((inf, 16, 64, 8, 1),),
    ("grad_state", "tf32", 256): ((inf, 16, 16, 8, 1),),
    ("grad_state", "ieee", 16): ((inf, 32, 16, 4, 2, 168),),
    ("grad_state", "ieee", 32): ((inf, 32, 32, 8, 1),),
    ("grad_state", "ieee", 64): ((inf, 16, 64, 8, 1),),
    ("grad_state", "ieee", 128): ((inf, 16, 32, 8, 1),),
    ("grad_state", "ieee", 256): ((inf, 16, 16, 8, 1),),
    ("grad_kv", "half", 16): ((inf, 64, 16, 4, 3),),
    ("grad_kv", "half", 32): ((256, 32, 32, 4, 3), (inf, 64, 32, 4, 3)),
    ("grad_kv", "half", 64): ((inf, 32, 64, 8, 2),),
    ("grad_kv", "half", 128): ((inf, 32, 64, 8, 1),),
    ("grad_kv", "half", 256): ((inf, 32, 64, 8, 1),),
    ("grad_kv", "tf32", 16): ((inf, 32, 16, 4, 2),),
    ("grad_kv", "tf32", 32): ((inf, 32, 32, 4, 2),),
    ("grad_kv", "tf32", 64): ((inf, 16, 64, 8, 1),),
    ("grad_kv", "tf32", 128): ((inf, 32, 64, 8, 1),),
    ("grad_kv", "tf32", 256): ((inf, 32, 64, 8, 1),),
    ("grad_kv", "ieee", 16): ((inf, 64, 16, 8, 1),),
    ("grad_kv", "ieee", 32): ((inf, 32, 32, 8, 1),),
    ("grad_kv", "ieee", 64): ((inf, 16, 64, 8, 1),),
    ("grad_kv", "ieee", 128): ((inf, 32, 16, 8, 1, 128),),
    ("grad_kv", "ieee", 256): ((inf, 32, 16, 8, 1, 128),),
}
# Where the row above does not serve an architecture.
_OF_ARCH: dict[tuple[str, str, str, int], tuple[_Row, ...]] = {
    ("sm_100", "grad_kv", "half", 32): ((inf, 32, 32, 4, 3),),
    ("sm_120", "grad_state", "ieee", 16): ((inf, 32, 16, 4, 2, MAX_REGISTERS),),
    ("sm_120", "grad_state", "ieee", 64): ((inf, 16, 32, 8, 1),),
}
MAX_HEAD_DIM = 256


def attention_config(kernel: str, kind: str, block_d: int, tokens: int, arch: str) -> AttentionConfig:
    rows = _OF_ARCH.get((arch, kernel, kind, block_d)) or _ATTENTION[kernel, kind, block_d]
    config = next(AttentionConfig(*row) for limit, *row in rows if tokens <= limit)
    if config.num_warps == 8 and block_d >= 64 and config.max_registers is None:
        config = replace(config, max_registers=MAX_REGISTERS)
    return config


def tokens_per_split(tokens: int) -> int:
    """A function of the tokens alone, so that an image's bits do not depend on its batch."""
    return max(TOKENS_PER_SPLIT, -(-tokens // (MAX_SPLITS * TOKENS_PER_SPLIT)) * TOKENS_PER_SPLIT)
