// What the launchers of all CPU ops share: dtypes, outputs, views of tensors, buffers, the count of calls.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "../checks.h"
#include "image.h"
#include "stages.h"

namespace efficientvit_kernels::cpu {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One more call of a registered op; `native_calls` in testing.py reads the sum.
void count_call();

// out[offset + i] = values[i], rounded once to the storage type.
void store_rounded(const double* values, int64_t count, StorageType type, void* out, int64_t offset);

StorageType storage_type(const Tensor& t, const char* op, const char* arg);

inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t compute_bytes(const Tensor& t) { return t.scalar_type() == ScalarType::Double ? 8 : 4; }

// Channels-last output for channels-last-like input; output_format in reference/ makes the same choice for fake
// tensors.
inline MemoryFormat format_like(const Tensor& t) {
  return t.stride(1) == 1 && !t.is_contiguous() ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline Tensor empty_image(const Tensor& like, int64_t channels, MemoryFormat format) {
  const int64_t sizes[] = {like.size(0), channels, like.size(2), like.size(3)};
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

inline Tensor empty_like_weight(const Tensor& weight) {
  std::vector<int64_t> sizes;
  for (int64_t axis = 0; axis < weight.dim(); ++axis) sizes.push_back(weight.size(axis));
  return torch::stable::empty(sizes, weight.scalar_type(), std::nullopt, weight.device());
}

// Without a trip through the dispatcher where nothing is to be done.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline void* data_of(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }

// Folds away image axes of size 1, whose strides mean nothing, so that more tensors count as free of gaps.
inline ImageTensor image_of(const Tensor& t) {
  ImageTensor view{data_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  if (t.size(3) == 1) view.stride_w = view.stride_h;
  if (t.size(2) == 1 || t.size(3) == 1) view.stride_h = view.stride_w * t.size(3);
  return view;
}

// Memory on a 64-byte boundary.
struct Buffer {
  explicit Buffer(int64_t bytes) : data(::operator new(bytes, std::align_val_t{64})) {}
  ~Buffer() { ::operator delete(data, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data(std::exchange(other.data, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data, other.data);
    return *this;
  }
  Buffer& operator=(const Buffer&) = delete;
  void* data;
};

// sums += partial, chunk by chunk in a fixed tree: sums is chunk 0, partial holds chunks 1, 2, ... of `numel` values
// each.
template <class T>
void reduce_chunks(T* sums, T* partial, int64_t numel, int64_t chunks) {
  auto chunk_of = [&](int64_t c) { return c == 0 ? sums : partial + (c - 1) * numel; };
  torch::stable::parallel_for(0, numel, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t step = 1; step < chunks; step *= 2) {
      for (int64_t c = 0; c + step < chunks; c += 2 * step) {
        T* into = chunk_of(c);
        const T* from = chunk_of(c + step);
        for (int64_t i = begin; i < end; ++i) into[i] += from[i];
      }
    }
  });
}

// The calling thread's scratch memory, on a 64-byte boundary, valid until the thread asks again. It is zeroed when it
// is allocated and kept for the thread's next call: padding then never holds denormal numbers, which are slow.
void* thread_scratch(int64_t bytes);

}  // namespace efficientvit_kernels::cpu
