// As much of torch's stable ABI as the launchers of csrc/cuda use, in a header that compiles in a moment: mutants of
// the kernels are compiled by the hundred, and torch's own headers would take most of that time.
//
// Memory is stricter than torch's, and AddressSanitizer sees its ends. Every tensor ends where a forbidden page begins,
// lies among NaN, and what is written around it is found at its end. Images may lie far apart (`Layout`), which costs
// the pages that are touched and no more: so indices of 32 bits go wrong in an image of a few elements.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, bytes) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(p, bytes) ((void)0)
#endif

namespace plain_torch {

template <class... Words>
[[noreturn]] void fail(const Words&... words) {
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}

// Set where something was written beside a tensor: a destructor cannot throw.
inline bool damaged = false;

// `bytes` of memory, all bits set, up to a forbidden page; `sparse`: zeros that take no room until they are written.
class Memory {
 public:
  Memory(size_t bytes, bool sparse) : bytes_(bytes), sparse_(sparse) {
    room_ = (bytes + kFront + kPage - 1) / kPage * kPage;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* found = mmap(nullptr, room_ + kPage, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (found == MAP_FAILED) fail("plain_torch: no address space for ", bytes, " bytes");
    base_ = static_cast<unsigned char*>(found);
    mprotect(base_ + room_, kPage, PROT_NONE);
    if (sparse) return;
    std::memset(base_, 0xff, room_);
    ASAN_POISON_MEMORY_REGION(base_, data() - base_);
    ASAN_POISON_MEMORY_REGION(data() + bytes_, base_ + room_ - data() - bytes_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    ASAN_UNPOISON_MEMORY_REGION(base_, sparse_ ? 0 : room_);
    const auto is_set = [](unsigned char byte) { return byte == 0xff; };
    damaged |= !sparse_ && !(std::all_of(base_, data(), is_set) && std::all_of(data() + bytes_, base_ + room_, is_set));
    munmap(base_, room_ + kPage);
  }
  unsigned char* data() const { return base_ + room_ - (bytes_ + 15) / 16 * 16; }

 private:
  static constexpr size_t kPage = 4096, kFront = 256;
  size_t bytes_, room_;
  bool sparse_;
  unsigned char* base_;
};

}  // namespace plain_torch

namespace torch::headeronly {
enum class ScalarType : int { Half, BFloat16, Float, Double, Int, Long, Bool };
enum class MemoryFormat : int { Contiguous, Preserve, ChannelsLast };
enum class Layout : int { Strided };
}  // namespace torch::headeronly

namespace torch::stable {

using headeronly::MemoryFormat;
using headeronly::ScalarType;

inline int64_t size_of(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Int ? 4 : type == ScalarType::Double ? 8 : 2;
}

struct Device {};

struct Sizes {
  std::vector<int64_t> values;
  Sizes(std::vector<int64_t> values) : values(std::move(values)) {}
  Sizes(std::initializer_list<int64_t> values) : values(values) {}
  template <size_t kCount>
  Sizes(const int64_t (&values)[kCount]) : values(values, values + kCount) {}
  template <size_t kCount>
  Sizes(const std::array<int64_t, kCount>& values) : values(values.begin(), values.end()) {}
};

class Tensor {
 public:
  Tensor() = default;
  // `offset`: elements of the memory that stay before it.
  Tensor(std::vector<int64_t> sizes, std::vector<int64_t> strides, ScalarType type, int64_t offset = 0,
         bool sparse = false)
      : sizes_(std::move(sizes)), strides_(std::move(strides)), type_(type), offset_(offset) {
    int64_t elements = numel() == 0 ? 0 : 1 + offset;
    for (size_t i = 0; numel() != 0 && i < sizes_.size(); ++i) elements += (sizes_[i] - 1) * strides_[i];
    memory_ = std::make_shared<plain_torch::Memory>(elements * size_of(type), sparse);
  }

  bool defined() const { return memory_ != nullptr; }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_[i < 0 ? i + dim() : i]; }
  int64_t stride(int64_t i) const { return strides_[i < 0 ? i + dim() : i]; }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes_) count *= size;
    return count;
  }
  ScalarType scalar_type() const { return type_; }
  bool is_cpu() const { return true; }
  bool is_cuda() const { return false; }
  int32_t get_device_index() const { return 0; }
  Device device() const { return {}; }
  bool is_contiguous(MemoryFormat = MemoryFormat::Contiguous) const {
    int64_t dense = 1;
    for (int64_t i = dim() - 1; i >= 0; --i) {
      if (sizes_[i] != 1 && strides_[i] != dense) return false;
      dense *= sizes_[i];
    }
    return true;
  }
  void* mutable_data_ptr() const { return memory_->data() + offset_ * size_of(type_); }
  const void* const_data_ptr() const { return mutable_data_ptr(); }
  void* data_ptr() const { return mutable_data_ptr(); }

  // move(of this tensor, of `dense`) with the addresses of every element, `dense` being contiguous.
  template <class Move>
  void for_each(void* dense, Move move) const {
    const int64_t size = size_of(type_);
    for (int64_t i = 0; i < numel(); ++i) {
      int64_t at = 0, rest = i;
      for (int64_t axis = dim() - 1; axis >= 0; rest /= sizes_[axis--]) at += rest % sizes_[axis] * strides_[axis];
      move(static_cast<unsigned char*>(data_ptr()) + at * size, static_cast<unsigned char*>(dense) + i * size, size);
    }
  }
  void copy_from(const void* dense) {
    for_each(const_cast<void*>(dense), [](void* own, const void* x, int64_t size) { std::memcpy(own, x, size); });
  }
  void copy_to(void* dense) const {
    for_each(dense, [](const void* own, void* x, int64_t size) { std::memcpy(x, own, size); });
  }

 private:
  std::vector<int64_t> sizes_, strides_;
  ScalarType type_ = ScalarType::Float;
  int64_t offset_ = 0;
  std::shared_ptr<plain_torch::Memory> memory_;
};

inline Tensor zero_(Tensor t) {
  t.for_each(nullptr, [](void* own, void*, int64_t size) { std::memset(own, 0, size); });
  return t;
}

// None is called for: what the trials pass is contiguous.
inline Tensor contiguous(const Tensor&) { plain_torch::fail("plain_torch: contiguous() is not there"); }

inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  return strides;
}

}  // namespace torch::stable

namespace plain_torch {

using torch::stable::Tensor;

// In the order of `LAYOUTS` of tests/cuda_emulator/plain_runs.py.
enum class Layout : int { kNchw, kChannelsLast, kSliced, kTransposed, kOffset, kFarChannels, kFarTokens };

inline bool far_outputs = false;

// An image [B, C, H, W]. Far apart, but still aligned to 8 elements, as the widest accesses ask for.
inline Tensor image(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type, Layout layout) {
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3], far = int64_t{1} << 32;
  const auto with = [&](int64_t across_h, int64_t across_w, int64_t across_c, int64_t across_b) {
    const bool sparse = layout == Layout::kFarChannels || layout == Layout::kFarTokens;
    return Tensor(sizes, {across_b, across_c, across_h, across_w}, type, layout == Layout::kOffset ? 1 : 0, sparse);
  };
  const int64_t sliced_h = 2 * w + 1, sliced_c = sliced_h * h + 3;
  const int64_t far_c = far + (h * w + 7) / 8 * 8, far_w = far / 2 + (c + 7) / 8 * 8, far_h = far_w * w + 8;
  switch (layout) {
    case Layout::kNchw:
      return with(w, 1, h * w, c * h * w);
    case Layout::kChannelsLast:
    case Layout::kOffset:
      return with(w * c, c, 1, c * h * w);
    case Layout::kSliced:
      return with(sliced_h, 2, sliced_c, sliced_c * c);
    case Layout::kTransposed:
      return with(1, h, h * w, c * h * w);
    case Layout::kFarChannels:
      return with(w, 1, far_c, far_c * c);
    default:
      return with(far_h, far_w, 1, far_h * h);
  }
}

}  // namespace plain_torch

namespace torch::stable {

// An image where a memory format is asked for; other tensors are contiguous.
template <class... Rest>
Tensor empty(const Sizes& sizes, std::optional<ScalarType> type, std::nullopt_t = std::nullopt, Device = {},
             std::nullopt_t = std::nullopt, std::optional<MemoryFormat> format = std::nullopt) {
  using plain_torch::Layout;
  if (!format) return Tensor(sizes.values, dense_strides(sizes.values), *type);
  const bool last = *format == MemoryFormat::ChannelsLast;
  const Layout layout = plain_torch::far_outputs ? (last ? Layout::kFarTokens : Layout::kFarChannels)
                                                 : (last ? Layout::kChannelsLast : Layout::kNchw);
  return plain_torch::image(sizes.values, *type, layout);
}

}  // namespace torch::stable

namespace plain_torch {

inline Tensor dense(const void* values, const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type) {
  Tensor t(sizes, torch::stable::dense_strides(sizes), type);
  t.copy_from(values);
  return t;
}

// call(), and its words of an error, or null. Memory must have been left alone around the tensors, which it destroys.
template <class Call>
const char* words_of(Call call) {
  static std::string words;
  damaged = false;
  try {
    call();
    if (damaged) fail("something was written beside a tensor");
  } catch (const std::exception& error) {
    words = error.what();
    return words.c_str();
  }
  return nullptr;
}

}  // namespace plain_torch

#define PLAIN_TORCH_EXPORT extern "C" __attribute__((visibility("default"))) const char*
#define STD_TORCH_CHECK(condition, ...) ((condition) ? void() : ::plain_torch::fail(__VA_ARGS__))
#define TORCH_BOX(function) (function)
// Nothing is registered: whoever includes a launcher calls its functions.
#define PLAIN_TORCH_JOINED_(a, b) a##b
#define PLAIN_TORCH_JOINED(a, b) PLAIN_TORCH_JOINED_(a, b)
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m) \
  template <class Library>                      \
  [[maybe_unused]] static void PLAIN_TORCH_JOINED(registered_at_, __LINE__)(Library & m)
