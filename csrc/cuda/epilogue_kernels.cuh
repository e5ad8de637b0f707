// The affine epilogue of a projection, in place: y = scale * y + shift + residual, in float32, rounded once.
#pragma once

#include "image_tile.cuh"

namespace efficientvit_kernels::cuda {

struct EpilogueArgs {
  Image y;                          // [B, C, H, W]
  Image residual;                   // the same, or data is null
  const float* scale;               // [C], or null
  const float* shift;               // [C], or null
  int64_t channels, tokens, count;  // tokens: H * W; count: elements, of all images
  bool dense;          // y and residual are stored alike and without gaps, and 16 bytes at a time can be moved
  bool channels_last;  // of what is dense
};

__device__ inline float epilogue_of(const EpilogueArgs& args, float y, int64_t c, float residual) {
  if (args.scale != nullptr) y *= args.scale[c];
  if (args.shift != nullptr) y += args.shift[c];
  return y + residual;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) epilogue_kernel(EpilogueArgs args) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t thread = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (args.dense) {
    const int64_t first = thread * kVector;
    if (first >= args.count) return;
    uint32_t y[4], residual[4] = {0, 0, 0, 0};
    T* p = static_cast<T*>(args.y.data) + first;
    load_words<4>(y, p);
    if (args.residual.data != nullptr) load_words<4>(residual, static_cast<const T*>(args.residual.data) + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = first + i * (4 / sizeof(T));
      const int64_t c = args.channels_last ? at % args.channels : first / args.tokens % args.channels;
      if constexpr (sizeof(T) == 4) {
        y[i] = __float_as_uint(epilogue_of(args, __uint_as_float(y[i]), c, __uint_as_float(residual[i])));
      } else {
        const float low = epilogue_of(args, Packed<T>::low(y[i]), c, Packed<T>::low(residual[i]));
        const int64_t next = args.channels_last ? c + 1 : c;
        y[i] = Packed<T>::pack(low, epilogue_of(args, Packed<T>::high(y[i]), next, Packed<T>::high(residual[i])));
      }
    }
    store_words<4>(p, y);
    return;
  }
  if (thread >= args.count) return;
  const int64_t n = thread % args.tokens, c = thread / args.tokens % args.channels;
  const int64_t batch = thread / args.tokens / args.channels;
  const int row = static_cast<int>(n / args.y.width), column = static_cast<int>(n % args.y.width);
  Bits<T>* p = Channels<T>(args.y, batch, c).at(0, row, column);
  float residual = 0.0f;
  if (args.residual.data != nullptr) {
    residual = value_of(reinterpret_cast<const T*>(Channels<T>(args.residual, batch, c).at(0, row, column)));
  }
  const float value = epilogue_of(args, value_of(reinterpret_cast<const T*>(p)), c, residual);
  if constexpr (sizeof(T) == 4) {
    *p = __float_as_uint(value);
  } else {
    *p = static_cast<Bits<T>>(Packed<T>::pack(value, 0.0f));
  }
}

}  // namespace efficientvit_kernels::cuda
