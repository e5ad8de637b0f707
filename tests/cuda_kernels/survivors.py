"""Mutants of the CUDA kernels that no trial finds, with the reasons.

All mutants have been run, a file at a time: `python -m tests.cuda_emulator.plain_trials FILE`.

Mutants of the kind "index narrowed" are not listed, and not counted. Those that images far apart show are found (see
tests/cuda_emulator/plain_torch); the others would need more than 2^31 elements of dense memory, or more blocks than the
launchers allow.
"""

from __future__ import annotations

LAST_TILE = "one more tile, every element of which is masked"
LAST_STEP = "one more step of the sum, over zeros"
SAME_TOTAL = "other lanes have the same total, and write it to the same place"
ROWS_OF_D8 = "at D = 8, rows of a product that are not stored"
MARGIN = "pixels of the margin beside a tile, which nothing reads"
DIVISOR = "the quotient differs by less than 16 bits show"
ORDER = "the order in which elements are moved, and nothing else"

# These compute the same.
EQUIVALENT: dict[str, dict[str, str]] = {
    "aggregate_attention_apply_kernels.cuh": {
        "barrier removed: __syncthreads(); [__syncthreads() -> (void)0] #2": (
            "of scale 0, whose lanes write where they alone have read"
        ),
        "condition dropped: if (place.aggregates) { [place.aggregates -> true]": "weights that scale 0 does not use",
        "condition dropped: const int pad = place.aggregates ? K / 2 : 0, margin = place.aggregates ? kMargin : "
        "0; [place.aggregates -> true] #2": "a margin that nothing reads",
    },
    "aggregate_attention_state_kernels.cuh": {
        "bound off by one: for (int e = threadIdx.x; e < WarpState<D>::kTiles * 16 * D; e += blockDim.x) { [< -> "
        "<=]": "the same thread writes the first tap there, later",
        "bound off by one: weight[e] = o < D ? __float_as_uint(value_of(pointwise + (k_first + o) * D + c)) : "
        "0u; [< -> <=]": ROWS_OF_D8,
        "condition dropped: for (int half = 0; half < (D > 8 ? 2 : 1); ++half) { [D > 8 -> true] #2": ROWS_OF_D8,
        "condition dropped: for (int i = 0; i < 8; ++i) rows[half][j][i] = window.shows(row, column + i) ? "
        "to_tf32(sums[i]) : 0u; [window.shows(row, column + i) -> true]": (
            "v beyond the image meets k, which is 0 there; NaN or inf reaches it from neighbours that spoil the same "
            "row of the state"
        ),
        "bound off by one: for (int half = 0; half < (D > 8 ? 2 : 1); ++half) { [> -> >=]": ROWS_OF_D8,
        "bound off by one: for (int half = 0; half < (D > 8 ? 2 : 1); ++half) { [> -> >=] #2": ROWS_OF_D8,
        "condition dropped: if (t == 0) state[D * D + 8 * i + g] = total; [t == 0 -> true]": SAME_TOTAL,
        "condition dropped: for (int half = 0; half < (D > 8 ? 2 : 1); ++half) { [D > 8 -> true]": ROWS_OF_D8,
        "condition dropped: weight[e] = o < D ? __float_as_uint(value_of(pointwise + (k_first + o) * D + c)) : "
        "0u; [o < D -> true]": ROWS_OF_D8,
    },
    "image_tile.cuh": {
        "condition dropped: there ? from.at(at.plane, window.y0 + row, window.x0 + column) : from.data, there); "
        "[there -> true]": "an address that is not read",
        "condition dropped: const bool along_channels = from.stride_c == 1; [from.stride_c == 1 -> true]": ORDER,
        "condition dropped: const bool along_channels = to.stride_c == 1; [to.stride_c == 1 -> true]": ORDER,
        "stride of another axis: const bool along_channels = from.stride_c == 1; [stride_c -> stride_h]": ORDER,
        "stride of another axis: const bool along_channels = to.stride_c == 1; [stride_c -> stride_h]": ORDER,
    },
    "lite_mla_kernels.cuh": {
        "condition dropped: if (works) { [works -> true]": "what a warp without pixels computes is not used",
    },
    "multiscale_aggregate_backward_kernels.cuh": {
        "bound off by one: for (int e = threadIdx.x; e < pixels; e += blockDim.x) { [< -> <=]": (
            "one pixel more, between the planes"
        ),
        "bound off by one: for (int i = 0; i < 2 * kTiles; ++i) { [< -> <=]": "the condition behind it holds nowhere",
        "bound off by one: if (lane < kChunk) own[dy * K + dx] = total; [< -> <=]": SAME_TOTAL,
        "condition dropped: if (lane < kChunk) own[dy * K + dx] = total; [lane < kChunk -> true]": SAME_TOTAL,
        "condition dropped: if (lane < kChunk) own[K * K] = middle_sum, own[K * K + 1] = grad_sum; [lane < "
        "kChunk -> true]": SAME_TOTAL,
        "condition dropped: if (read) to[pixel] = window.shows(row, column + pixel) ? value : 0.0f; [read -> "
        "true]": MARGIN,
        "condition dropped: const bool read = !side || (column + pixel >= -(K / 2) && column + pixel < "
        "tile.grad.cols + K / 2); [column + pixel >= -(K / 2) -> true]": MARGIN,
        "condition dropped: for (int c = 0; c < kChunk; ++c) *tile.middle.at(c, row, column) = window.shows(row, "
        "column) ? sums[c] : 0.0f; [window.shows(row, column) -> true]": "grad_out is 0 there",
        "bound off by one: const bool side = column < 0 || column >= tile.grad.cols;  // of which the halo is a "
        "part [>= -> >]": MARGIN,
        "condition dropped: const bool side = column < 0 || column >= tile.grad.cols;  // of which the halo is a "
        "part [column < 0 || column >= tile.grad.cols -> true]": "what is not at a side passes the test all the same",
        "condition dropped: if (first + g >= segments) continue; [first + g >= segments -> false]": (
            "the last segment once more, with the same values"
        ),
        "condition dropped: if (read) to[pixel] = window.shows(row, column + pixel) ? value : 0.0f; "
        "[window.shows(row, column + pixel) -> true]": (
            "grad_out is 0 there; a P that is not finite spoils every pixel"
        ),
        "bound off by one: for (int first = threadIdx.x / 32 * 8; first < segments; first += blockDim.x / 4) { "
        "[< -> <=]": "a group of segments of which nothing is stored",
        "bound off by one: const bool side = column < 0 || column >= tile.grad.cols;  // of which the halo is a "
        "part [< -> <=]": "what is not at a side passes the test all the same",
        "bound off by one: const bool read = !side || (column + pixel >= -(K / 2) && column + pixel < "
        "tile.grad.cols + K / 2); [< -> <=]": MARGIN,
        "bound off by one: if (8 * i < D) load_words<4>(words[i], tile.grad.at(8 * i + g, row, column)); [< -> "
        "<=]": ROWS_OF_D8,
        "bound off by one: const uint32_t low = words[2 * i][step], high = D > 8 ? words[2 * i + 1][step] : 0; "
        "[> -> >=]": ROWS_OF_D8,
        "bound off by one: for (int e = threadIdx.x; e < kChunk * D; e += blockDim.x) { [< -> <=]": (
            "one element more, which the tile overwrites"
        ),
        "bound off by one: for (int i = 0; i < kPixels; ++i) { [< -> <=] #4": "the condition behind it holds nowhere",
        "bound off by one: if (lane < kChunk) own[K * K] = middle_sum, own[K * K + 1] = grad_sum; [< -> "
        "<=]": SAME_TOTAL,
        "bound off by one: if (first + g >= segments) continue; [>= -> >]": (
            "the last segment once more, with the same values"
        ),
        "condition dropped: if (8 * i < D) load_words<4>(words[i], tile.grad.at(8 * i + g, row, column)); [8 * i "
        "< D -> true]": ROWS_OF_D8,
        "condition dropped: if (!args.needs_qkv || there == 0) continue; [!args.needs_qkv || there == 0 -> false]": (
            "a gradient that is not stored"
        ),
        "condition dropped: if (args.grads_before != nullptr || args.grads_after != nullptr) { "
        "[args.grads_before != nullptr || args.grads_after != nullptr -> true]": "both are asked for again",
        "condition dropped: if (args.sums != nullptr) pointwise_sums.add(tile); [args.sums != nullptr -> true]": (
            "sums that are not stored"
        ),
        "condition dropped: const uint32_t low = words[2 * i][step], high = D > 8 ? words[2 * i + 1][step] : 0; "
        "[D > 8 -> true]": ROWS_OF_D8,
        "condition dropped: const bool read = !side || (column + pixel >= -(K / 2) && column + pixel < "
        "tile.grad.cols + K / 2); [!side || (column + pixel >= -(K / 2) && column + pixel < tile.grad.cols + K / "
        "2) -> true]": MARGIN,
        "condition dropped: const bool read = !side || (column + pixel >= -(K / 2) && column + pixel < "
        "tile.grad.cols + K / 2); [column + pixel < tile.grad.cols + K / 2 -> true]": MARGIN,
    },
    "multiscale_aggregate_kernels.cuh": {
        "bound off by one: for (int pixel = threadIdx.x; pixel < args.rows * args.cols; pixel += blockDim.x) { "
        "[< -> <=]": "one pixel more, between the planes",
    },
    "operands.cuh": {
        "condition dropped: float* state = sums != nullptr && block.block == 0 ? sums + block.pair(args) * "
        "kNumel : nullptr; [block.block == 0 -> true]": "every block stores the same state",
        "bound off by one: by_inverse = (size >= 0x1p-126f && size <= 0x1p126f) || !(size > 0.0f) || "
        "isinf(size); [>= -> >]": DIVISOR,
        "condition dropped: by_inverse = (size >= 0x1p-126f && size <= 0x1p126f) || !(size > 0.0f) || "
        "isinf(size); [size <= 0x1p126f -> true]": DIVISOR,
        "bound off by one: by_inverse = (size >= 0x1p-126f && size <= 0x1p126f) || !(size > 0.0f) || "
        "isinf(size); [> -> >=]": "divided by 0 either way, with the same result",
        "bound off by one: by_inverse = (size >= 0x1p-126f && size <= 0x1p126f) || !(size > 0.0f) || "
        "isinf(size); [<= -> <]": DIVISOR,
    },
    "projection_kernels.cuh": {
        "bound off by one: if (k < args.channels) { [< -> <=]": LAST_STEP,
        "bound off by one: for (Walk at(along_channels ? kTokens : kProjectionRows, along_channels ? "
        "kProjectionRows : kTokens); at.plane < 1; [< -> <=]": "everything is stored twice, with the same values",
        "wait removed: cp_async_wait<0>(); [cp_async_wait<0>() -> (void)0]": "the groups that are left are empty",
        "bound off by one: for (int step = 0; step < kProjectionStages - 1; ++step) load(step); [< -> <=]": (
            "a stage is loaded twice, with the same values"
        ),
        "bound off by one: for (Walk at(kTokens, kProjectionRows / 8); at.plane < 1; at.next()) { [< -> <=]": (
            "everything is stored twice, with the same values"
        ),
        "bound off by one: for (Walk at(kProjectionRows, kTokens / 4); at.plane < 1; at.next()) { [< -> <=]": (
            "everything is stored twice, with the same values"
        ),
        "condition dropped: if (k < args.channels) { [k < args.channels -> true]": LAST_STEP,
        "condition dropped: cp_async_16(to + row * kProjectionPitch + column, there ? from + (first + row) * "
        "channels + k + column : from, [there -> true]": "an address that is not read",
        "condition dropped: const bool along_channels = args.y.stride_c == 1; [args.y.stride_c == 1 -> true]": ORDER,
        "stride of another axis: const bool along_channels = args.y.stride_c == 1; [stride_c -> stride_h]": ORDER,
    },
    "relu_linear_attention_backward_kernels.cuh": {
        "bound off by one: for (int tile = place.start; tile < place.stop; tile += warps * Fragment::kTokens) { "
        "[< -> <=]": LAST_TILE,
        "bound off by one: for (int n = place.start + static_cast<int>(threadIdx.x) / 32 * Fragment::kTokens; n "
        "< place.stop; [< -> <=]": LAST_TILE,
        "bound off by one: if (tile + offset >= place.stop) break; [>= -> >]": LAST_STEP,
        "bound off by one: if (lane < 4) grad_zs[warp * D + Fragment::channel(lane, i)] = total; [< -> <=]": SAME_TOTAL,
        "condition dropped: if (lane < 4) grad_zs[warp * D + Fragment::channel(lane, i)] = total; [lane < 4 -> "
        "true]": SAME_TOTAL,
        "condition dropped: if (lane % 4 == 0) dens[warp * Fragment::kTokens + token] = den[h]; [lane % 4 == 0 "
        "-> true]": SAME_TOTAL,
        "condition dropped: if (tile + offset >= place.stop) break; [tile + offset >= place.stop -> false]": LAST_STEP,
    },
    "relu_linear_attention_fp32_kernels.cuh": {
        "bound off by one: for (int tile = place.start; tile < place.stop; tile += kTileTokensFp32) { [< -> "
        "<=]": LAST_TILE,
        "bound off by one: for (int tile = place.start; tile < place.stop; tile += kTileTokensFp32) { [< -> <=] "
        "#2": LAST_TILE,
        "bound off by one: for (int n = place.start; n < place.stop; n += kTileTokensFp32) { [< -> <=]": LAST_TILE,
        "condition dropped: if (row == 0) own[D * D + column + c] = last[c]; [row == 0 -> true]": SAME_TOTAL,
        "condition dropped: if (half.first == 0) grad_dens[half.token] = grad_den; [half.first == 0 -> "
        "true]": SAME_TOTAL,
        "condition dropped: const bool along_channels = plane.stride_c == 1; [plane.stride_c == 1 -> true]": ORDER,
    },
    "relu_linear_attention_kernels.cuh": {
        "condition dropped: if (first_row == 0 && lane % 4 == 0) own[D * D + Keys::channel(lane, i)] = total; "
        "[first_row == 0 && lane % 4 == 0 -> true]": SAME_TOTAL,
        "condition dropped: if (first_row == 0 && lane % 4 == 0) own[D * D + Keys::channel(lane, i)] = total; "
        "[lane % 4 == 0 -> true]": SAME_TOTAL,
        "bound off by one: while (n < place.stop) { [< -> <=]": LAST_TILE,
        "bound off by one: for (int n = place.start + static_cast<int>(threadIdx.x) / 32 * Fragment::kTokens; n "
        "< place.stop; [< -> <=]": LAST_TILE,
        "condition dropped: if (first_row == 0 && lane % 4 == 0) own[D * D + Keys::channel(lane, i)] = total; "
        "[first_row == 0 -> true]": SAME_TOTAL,
    },
    "tile.cuh": {
        "condition dropped: uint32_t words[kAlongChannels ? kSlots * kPerSlot : kChannels * kSlots / 2]; "
        "[kAlongChannels -> true]": "an array that is no smaller",
        "barrier removed: __syncwarp(); [__syncwarp() -> (void)0] #3": "what is staged next begins with a barrier",
        "barrier removed: __syncwarp(); [__syncwarp() -> (void)0] #4": (
            "the products before it hold the lanes of the warp together"
        ),
        "bound off by one: if (kCount <= 4 || plane.aligned) { [<= -> <]": (
            "four tokens as two times two, with the same values"
        ),
        "bound off by one: if (kCount <= 4 || plane.aligned) { [<= -> <] #2": (
            "four tokens as two times two, with the same values"
        ),
        "condition dropped: move(plane.data + (there ? channel * plane.stride_c + plane.offset(first + token) : "
        "0), [there -> true]": "an address that is not read",
        "condition dropped: x.words[kAccess == Access::kChannels ? (2 * i + c / kPairs) * kPairs + c % kPairs : "
        "c * kTokenPairs + i]); [kAccess == Access::kChannels -> true]": (
            "words that the compiler is told about, and nothing else"
        ),
        "condition dropped: const bool along_channels = plane.stride_c == 1; [plane.stride_c == 1 -> true]": ORDER,
        "stride of another axis: const bool along_channels = plane.stride_c == 1; [stride_c -> stride_h]": ORDER,
    },
}

# These do not, and tests should find them.
MISSED: dict[str, dict[str, str]] = {
    "aggregate_attention_apply_kernels.cuh": {
        "bound off by one: for (int i = 0; i < D / 4; ++i) load_words<4>(q.x.words + 4 * i, own + 4 * i * "
        "halo.plane); [< -> <=]": "a write beyond a local array, through a pointer, where nothing is",
    },
    "multiscale_aggregate_backward_kernels.cuh": {
        "condition dropped: const float value = i < there ? hidden[i] : 0.0f; [i < there -> true]": (
            "no sample has an infinity beside the end of a row, which would meet a gradient of 0"
        ),
        "bound off by one: const float value = i < there ? hidden[i] : 0.0f; [< -> <=]": (
            "no sample has an infinity beside the end of a row, which would meet a gradient of 0"
        ),
        "condition dropped: to[i] = kFp32 ? value : __uint_as_float(to_tf32(value)); [kFp32 -> true]": (
            "the matrix units cut off what was not rounded: within rule T here"
        ),
    },
    "projection_kernels.cuh": {
        "bound off by one: for (int i = 0; i < 2; ++i) { [< -> <=]": (
            "a write beyond a local array, through a reference, where nothing is"
        ),
    },
    "relu_linear_attention_fp32_kernels.cuh": {
        "shuffle distance halved: both.add(__shfl_xor_sync(0xffffffffu, own.high, 1), "
        "__shfl_xor_sync(0xffffffffu, own.low, 1)); [1 -> (1) / 2] #2": (
            "half of what rounding lost of a denominator: below what rule T allows here"
        ),
        "condition dropped: __device__ float error() const { return isfinite(low) ? low : 0.0f; } [isfinite(low) "
        "-> true]": "no sample has an infinite sum whose result is not NaN by other terms",
        "condition dropped: const float rest = isfinite(left / den) ? left / den : 0.0f; [isfinite(left / den) "
        "-> true]": "no sample has an infinite sum whose result is not NaN by other terms",
        "sum overwritten: low += (high - (sum - part)) + (x - part) + error; [+= -> =]": (
            "a part of what rounding lost: below what rule T allows here"
        ),
    },
}
