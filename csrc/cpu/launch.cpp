#include "launch.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>
#include <type_traits>

#include "isa.h"

namespace efficientvit_kernels::cpu {
namespace {
std::atomic<int64_t> calls{0};
}

void count_call() { calls.fetch_add(1, std::memory_order_relaxed); }

StorageType storage_type(const Tensor& t, const char* op, const char* arg) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return StorageType::kFloat;
    case ScalarType::Double:
      return StorageType::kDouble;
    case ScalarType::Half:
      return StorageType::kHalf;
    case ScalarType::BFloat16:
      return StorageType::kBFloat16;
    default:
      break;
  }
  EVK_CHECK(false, op, arg, "float16, bfloat16, float32 or float64", "another dtype");
}

void* thread_scratch(int64_t bytes) {
  thread_local Buffer buffer(0);
  thread_local int64_t size = 0;
  if (bytes > size) {
    buffer = Buffer(bytes);
    std::memset(buffer.data, 0, bytes);
    size = bytes;
  }
  return buffer.data;
}

void store_rounded(const double* values, int64_t count, StorageType type, void* out, int64_t offset) {
  auto store = [&](auto* first) {
    for (int64_t i = 0; i < count; ++i)
      first[offset + i] = static_cast<std::remove_pointer_t<decltype(first)>>(values[i]);
  };
  switch (type) {
    case StorageType::kDouble:
      return store(static_cast<double*>(out));
    case StorageType::kHalf:
      return store(static_cast<torch::headeronly::Half*>(out));
    case StorageType::kBFloat16:
      return store(static_cast<torch::headeronly::BFloat16*>(out));
    default:
      return store(static_cast<float*>(out));
  }
}

}  // namespace efficientvit_kernels::cpu

// For tests and `info`, through ctypes: which kernels run, and whether they ran.
extern "C" __attribute__((visibility("default"))) int64_t efficientvit_kernels_cpu_calls() {
  return efficientvit_kernels::cpu::calls.load();
}
extern "C" __attribute__((visibility("default"))) const char* efficientvit_kernels_cpu_isa() {
  return efficientvit_kernels::cpu::isa_name(efficientvit_kernels::cpu::isa_in_use());
}
