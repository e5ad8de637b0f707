// Checks that keep memory safe when an op is called directly. The public Python function reports bad input first, with
// ValueError or TypeError; the stable ABI can only raise RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define EVK_CHECK(condition, op, arg, expected, actual) \
  STD_TORCH_CHECK(condition, op, ": ", arg, " must be ", expected, ", got ", actual)
