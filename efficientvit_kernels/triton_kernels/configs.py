"""The configuration table: tiles, warps and pipeline stages of every kernel, per head dimension, tokens, architecture.

Nothing is tuned at run time: that would depend on the machine's mood, tune anew at every resolution and break the
capture of CUDA graphs. `docs/optimization-notes.md` says which entries come from measurements; the others come from the
resource table and the byte and FLOP model.
"""

from __future__ import annotations

from dataclasses import dataclass

# Each split of the sum over tokens costs a state to write and read again (4 KB at D = 32), and gives one more program
# per head; with up to MAX_SUMMED_SPLITS the readers add them up themselves, which saves a launch.
TOKENS_PER_SPLIT = 256
MAX_SPLITS = 32
MAX_SUMMED_SPLITS = 4


@dataclass(frozen=True)
class AttentionConfig:
    """block_n: tokens of a tile. block_r: rows of the state that a program holds."""

    block_n: int
    block_r: int
    num_warps: int
    num_stages: int


# (kernel, padded head dimension) -> (up to this many tokens, configuration), the fewest tokens first.
_ATTENTION: dict[tuple[str, int], tuple[tuple[float, AttentionConfig], ...]] = {
    ("kv_state", 16): ((64, AttentionConfig(64, 16, 4, 1)), (float("inf"), AttentionConfig(128, 16, 4, 3))),
    ("kv_state", 32): ((64, AttentionConfig(64, 32, 4, 1)), (float("inf"), AttentionConfig(64, 32, 4, 3))),
    ("kv_state", 64): ((float("inf"), AttentionConfig(64, 64, 4, 2)),),
    ("kv_state", 128): ((float("inf"), AttentionConfig(32, 64, 4, 2)),),
    ("kv_state", 256): ((float("inf"), AttentionConfig(32, 32, 4, 2)),),
    ("kv_state", 512): ((float("inf"), AttentionConfig(16, 16, 4, 1)),),
    ("apply", 16): ((64, AttentionConfig(64, 16, 4, 1)), (float("inf"), AttentionConfig(128, 16, 4, 3))),
    ("apply", 32): ((64, AttentionConfig(64, 32, 4, 1)), (float("inf"), AttentionConfig(64, 32, 4, 3))),
    ("apply", 64): ((float("inf"), AttentionConfig(64, 64, 4, 2)),),
    ("apply", 128): ((float("inf"), AttentionConfig(32, 64, 4, 1)),),
    ("apply", 256): ((float("inf"), AttentionConfig(16, 32, 4, 1)),),
    ("apply", 512): ((float("inf"), AttentionConfig(16, 16, 4, 1)),),
    ("grad_state", 16): ((float("inf"), AttentionConfig(64, 16, 4, 2)),),
    ("grad_state", 32): ((float("inf"), AttentionConfig(64, 32, 4, 2)),),
    ("grad_state", 64): ((float("inf"), AttentionConfig(32, 64, 4, 2)),),
    ("grad_state", 128): ((float("inf"), AttentionConfig(32, 32, 4, 1)),),
    ("grad_state", 256): ((float("inf"), AttentionConfig(16, 32, 4, 1)),),
    ("grad_state", 512): ((float("inf"), AttentionConfig(16, 16, 8, 1)),),
    ("grad_kv", 16): ((float("inf"), AttentionConfig(64, 16, 4, 2)),),
    ("grad_kv", 32): ((float("inf"), AttentionConfig(64, 32, 4, 2)),),
    ("grad_kv", 64): ((float("inf"), AttentionConfig(32, 64, 4, 2)),),
    ("grad_kv", 128): ((float("inf"), AttentionConfig(32, 32, 4, 1)),),
    ("grad_kv", 256): ((float("inf"), AttentionConfig(16, 32, 4, 1)),),
    ("grad_kv", 512): ((float("inf"), AttentionConfig(16, 16, 8, 1)),),
}
MAX_HEAD_DIM = 512


def attention_config(kernel: str, block_d: int, tokens: int) -> AttentionConfig:
    buckets = _ATTENTION[kernel, block_d]
    return next(config for limit, config in buckets if tokens <= limit)


def tokens_per_split(tokens: int) -> int:
    """A function of the tokens alone, so that an image's bits do not depend on its batch."""
    return max(TOKENS_PER_SPLIT, -(-tokens // (MAX_SPLITS * TOKENS_PER_SPLIT)) * TOKENS_PER_SPLIT)
