#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "../schemas.h"
#include "runtime.h"

namespace efficientvit_kernels::cuda {
namespace {

std::atomic<int64_t> calls{0};

bool divides(int64_t width, const Image& image) {
  return reinterpret_cast<uintptr_t>(image.data) % (2 * width) == 0 && image.stride_b % width == 0;
}

bool along_tokens(const Image& image, int64_t tokens, int64_t width) {
  return image.flat && image.stride_w == 1 && tokens % width == 0 && image.stride_c % width == 0 &&
         divides(width, image);
}

bool along_channels(const Image& image) {
  return image.stride_c == 1 && image.stride_h % 8 == 0 && image.stride_w % 8 == 0 && divides(8, image);
}

#if defined(__CUDACC__)
// A device's properties do not change, and asking costs microseconds.
Device device_at(int index) {
  static std::atomic<int64_t> known[64];
  if (index < 64 && known[index].load() != 0) {
    const int64_t packed = known[index].load();
    return {static_cast<int>(packed >> 48), static_cast<int>(packed >> 32 & 0xffff), packed & 0xffffffff};
  }
  int major = 0, minor = 0, multiprocessors = 0, shared = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  const Device device{10 * major + minor, multiprocessors, shared};
  if (index < 64) known[index] = int64_t{device.arch} << 48 | int64_t{multiprocessors} << 32 | shared;
  return device;
}
#endif

}  // namespace

void count_call() { calls.fetch_add(1, std::memory_order_relaxed); }

#if defined(__CUDACC__)
Launcher::Launcher(const Tensor& t) : guard_(t.get_device_index()), device_(device_at(t.get_device_index())) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}
#else
Launcher::Launcher(const Tensor&)
    : device_{10 * emulator::device().major + emulator::device().minor, emulator::device().multiprocessors,
              emulator::device().max_shared_per_block} {}
#endif

Image image_of(const Tensor& t) {
  Image image{const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3),
              static_cast<int>(t.size(3)),           false,       false};
  if (t.size(0) == 1) image.stride_b = 0;
  if (t.size(3) == 1) image.stride_w = image.stride_h;
  if (t.size(2) == 1 || t.size(3) == 1) image.stride_h = image.stride_w * t.size(3);
  image.flat = image.stride_h == image.stride_w * t.size(3);
  image.aligned = along_tokens(image, t.size(2) * t.size(3), 8);
  return image;
}

Access access_of(const std::vector<Image>& images, int64_t tokens) {
  const auto all = [&](auto allows) { return std::all_of(images.begin(), images.end(), allows); };
  if (all([=](const Image& image) { return along_tokens(image, tokens, 4); })) return Access::kTokens;
  return all(along_channels) ? Access::kChannels : Access::kElements;
}

Access access_of_rows(const std::vector<Image>& images, int64_t bytes) {
  const int64_t vector = 16 / bytes;
  const auto all = [&](auto allows) { return std::all_of(images.begin(), images.end(), allows); };
  const auto divides = [=](const Image& image, int64_t inner) {
    return reinterpret_cast<uintptr_t>(image.data) % 16 == 0 && image.stride_b % vector == 0 &&
           image.stride_h % vector == 0 && inner % vector == 0;
  };
  if (all([=](const Image& image) {
        return image.stride_w == 1 && image.width % vector == 0 && divides(image, image.stride_c);
      })) {
    return Access::kTokens;
  }
  const bool channels = all([=](const Image& image) { return image.stride_c == 1 && divides(image, image.stride_w); });
  return channels ? Access::kChannels : Access::kElements;
}

}  // namespace efficientvit_kernels::cuda

// The CPU library defines the public ops.
#if defined(__CUDACC__)
STABLE_TORCH_LIBRARY_FRAGMENT(efficientvit_kernels, m) {
  m.def(EVK_MULTISCALE_AGGREGATE_BWD_ADD);
  m.def(EVK_AGGREGATE_ATTENTION_FWD);
  m.def(EVK_LITE_MLA_TWO_LAUNCHES);
  m.def(EVK_PROJECTION_EPILOGUE);
  m.def(EVK_PROJECTION);
}
#endif

// For tests and `info`, through ctypes: whether kernels ran, and what they were compiled for.
extern "C" __attribute__((visibility("default"))) int64_t efficientvit_kernels_cuda_calls() {
  return efficientvit_kernels::cuda::calls.load();
}
#if defined(__CUDACC__)
#define EVK_TEXT_OF(...) #__VA_ARGS__
#define EVK_TEXT(...) EVK_TEXT_OF(__VA_ARGS__)
extern "C" __attribute__((visibility("default"))) const char* efficientvit_kernels_cuda_archs() {
  return EVK_TEXT(__CUDA_ARCH_LIST__);  // nvcc's own: "800,900", ascending
}
#endif
