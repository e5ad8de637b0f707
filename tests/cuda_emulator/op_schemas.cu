// Defines the ops that the launchers of csrc/cuda implement, for CPU tensors, in a namespace of their own.
#include <torch/csrc/stable/library.h>

#include "../../csrc/cuda/platform.cuh"
#include "../../csrc/schemas.h"

STABLE_TORCH_LIBRARY(efficientvit_kernels_emulated, m) {
  m.def(EVK_RELU_LINEAR_ATTENTION_FWD);
  m.def(EVK_RELU_LINEAR_ATTENTION_BWD);
  m.def(EVK_MULTISCALE_AGGREGATE_FWD);
  m.def(EVK_MULTISCALE_AGGREGATE_BWD);
  m.def(EVK_MULTISCALE_AGGREGATE_BWD_ADD);
  m.def(EVK_AGGREGATE_ATTENTION_FWD);
  m.def(EVK_LITE_MLA_TWO_LAUNCHES);
  m.def(EVK_PROJECTION_EPILOGUE);
  m.def(EVK_PROJECTION);
}

// For tests: kernels launched so far.
extern "C" __attribute__((visibility("default"))) int64_t emulated_launches() { return emulator::launches(); }
