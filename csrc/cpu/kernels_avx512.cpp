// All CPU kernels, compiled for AVX-512 (F, BW, VL, DQ): _build.py sets the flags of this file.
//
// No inline function of a shared or standard header may be emitted here: the linker could pick this copy, with its
// instructions, for code that runs on every CPU. tests/test_build.py looks for such symbols.
#if defined(__x86_64__)
#include "lite_mla.h"
#include "multiscale_aggregate.h"
#include "pointwise.h"
#include "relu_linear_attention.h"

#define EVK_ISA avx512
#include "lite_mla_kernels.h"
#include "multiscale_aggregate_kernels.h"
#include "pointwise_kernels.h"
#include "relu_linear_attention_kernels.h"
#endif
