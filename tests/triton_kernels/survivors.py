"""Mutants that no test finds, with the reasons: they compute the same, or only more than 2^31 elements would tell.

All mutants have been run, a file at a time.
"""

from __future__ import annotations

COMPILED = "a store converts as `narrowed` does; the interpreter alone cuts bfloat16 off, which rule T allows"
BESIDE = "reads one lane more, of the same head, which meets a zero or is not stored"
DEFAULT = "only in 16 bits, where the precision is TF32, which is also the default on NVIDIA GPUs"
MASKED = "the programs' last tiles then go on below the image, where every lane is masked"
STORED = "16 bits are stored, which are exact in TF32: nothing to round"
BEYOND = "grad_out is 0 beyond the image, and so is P^T grad_out but for a P of NaN or inf, which spoils the same sums"
HUGE = "only partial sums of more than 2^31 elements need 64 bits there"

SURVIVORS: dict[str, dict[str, str]] = {
    "tile.py": {
        "operand: narrow: x.to(tl.float32)": "the interpreter makes everything float32 right after the load",
    },
    "attention_state.py": {
        "sum_of_splits: bound: o_row < D": "reads z as a row more of KV, whose lanes are not stored",
        "sum_of_splits: bound: o_col < D": BESIDE,
    },
    "aggregation.py": {
        "middle_rows: mask: rows + r < height": BEYOND,
        "middle_rows: mask: cols < width": BEYOND,
        "middle_rows: mask: m_n[None, :]": BEYOND,
        "middle_rows: bound: rows + r < height": BEYOND,
        "middle_rows: bound: cols < width": BEYOND,
        "store_rows: rounding: narrowed(acc[r], p_out.dtype.element_ty)": COMPILED,
        "add_grad_pointwise: mask: m_n[None, :]": "what lanes beyond the image hold meets grad_out, which is 0 there; "
        "NaN reaches the same sum from inside the image; inf, which might not, is not tested",
    },
    "relu_linear_attention.py": {
        "kv_state_kernel: bound: o_d < D": BESIDE,
        "apply_kernel: bound: o_c < D": BESIDE,
        "apply_kernel: rounding: narrowed(num / (den + eps)[None, :], out.dtype.element_ty)": COMPILED,
        "grad_state_kernel: rounding: narrowed(grad_q, grad_qkv.dtype.element_ty)": COMPILED,
        "grad_state_kernel: bound: o_d < D": BESIDE,
        "grad_state_kernel: bound: o_d + i_r * BLOCK_D < D": "writes grad_k's first channel, as does the next launch",
        "grad_state_kernel: precision: tl.dot(tl.trans(low), grad_num, grad_q, input_precision=PRECISION)": DEFAULT,
        "grad_kv_kernel: rounding: narrowed(grad_k, grad_qkv.dtype.element_ty)": COMPILED,
        "grad_kv_kernel: rounding: narrowed(grad_v, grad_qkv.dtype.element_ty)": COMPILED,
        "grad_kv_kernel: precision: tl.dot(tl.trans(low), v, grad_k, input_precision=PRECISION)": DEFAULT,
    },
    "multiscale_aggregate.py": {
        "gradients_kernel: index: i_chunk.to(tl.int64)": HUGE,
        "grad_taps_kernel: index: i_chunk.to(tl.int64)": HUGE,
    },
    "lite_mla_kernels.py": {
        "aggregate_kv_state_kernel: loop: tl.minimum(start + split_tiles, tiles)": MASKED,
        "aggregate_apply_kernel: loop: tl.minimum(start + block_tiles, tiles)": MASKED,
        "aggregate_apply_kernel: rounding: narrowed(num / den[None, :], out.dtype.element_ty)": COMPILED,
        "aggregate_apply_kernel: rounding: narrowed(num / den[None, :], out.dtype.element_ty) #2": COMPILED,
        "aggregate_kv_state_kernel: mask: m_n[None, :] #2": "v of lanes beyond the image meets k, which is 0 there; "
        "NaN or inf reaches them from neighbours that spoil the same row of the state",
    },
    "pointwise.py": {
        "pointwise_kernel: narrow: acc += load(p, m_m & m_n).to(tl.float32)": "the step before the rounding to 16 bits",
        "pointwise_kernel: narrow: load(p, m_m & m_n).to(tl.float32)": "16 bits are stored, and float16 holds them",
        "pointwise_kernel: precision: tl.dot(stored_operand(w, 'tf32'), stored_operand(tile, 'tf32'), acc, "
        "input_precision='tf32')": DEFAULT,
        "pointwise_kernel: rounding: stored_operand(w, 'tf32')": STORED,
        "pointwise_kernel: rounding: stored_operand(tile, 'tf32')": STORED,
    },
}
