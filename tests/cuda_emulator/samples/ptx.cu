// Every function of csrc/cuda/ptx.cuh. Tensors hold words, whatever their bits mean.
#include "entry.h"
#include "ptx.cuh"

namespace ptx = efficientvit_kernels::cuda;

__device__ __forceinline__ void mma(int kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if (kind == 0) ptx::mma_m16n8k8_tf32(d, a, b);
  if (kind == 1) ptx::mma_m16n8k16_f16(d, a, b);
  if (kind == 2) ptx::mma_m16n8k16_bf16(d, a, b);
}

// in [32, 10]: each lane's fragments of d, a, b. out [32, 4]: d.
__global__ void fragments(const float* in, float* out, int kind, int) {
  const float* own = in + 10 * threadIdx.x;
  float d[4];
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) d[i] = own[i];
  for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(own[4 + i]);
  for (int i = 0; i < 2; ++i) b[i] = __float_as_uint(own[8 + i]);
  mma(kind, d, a, b);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = d[i];
}

// in: `words` words of shared memory, then 32 offsets of rows in it, in bytes. out [32, 4].
__global__ void matrices(const float* in, float* out, int form, int words) {
  EVK_DYNAMIC_SHARED(shared);
  const int t = threadIdx.x;
  for (int i = t; i < words; i += 32) reinterpret_cast<float*>(shared)[i] = in[i];
  __syncwarp();
  const void* row = shared + __float_as_int(in[words + t]);
  uint32_t r[4] = {0, 0, 0, 0};
  uint32_t (&r2)[2] = *reinterpret_cast<uint32_t (*)[2]>(&r);
  if (form == 0) ptx::ldmatrix_x4(r, row);
  if (form == 1) ptx::ldmatrix_x4_trans(r, row);
  if (form == 2) ptx::ldmatrix_x2(r2, row);
  if (form == 3) ptx::ldmatrix_x2_trans(r2, row);
  for (int i = 0; i < 4; ++i) out[4 * t + i] = __uint_as_float(r[i]);
}

// out [16, 8] = A B in 16 bits. in: A [16, 16], then B [16, 8]; `transposed`: A [k, m] and B [n, k] instead. The
// matrices go through shared memory and ldmatrix into the fragments, so both must agree on the layout.
__global__ void product(const float* in, float* out, int kind, int transposed) {
  EVK_DYNAMIC_SHARED(shared);
  const int t = threadIdx.x;
  for (int i = t; i < 192; i += 32) reinterpret_cast<float*>(shared)[i] = in[i];
  __syncwarp();
  const unsigned char* b_shared = shared + 512;
  float d[4] = {0, 0, 0, 0};
  uint32_t a[4], b[2];
  if (transposed) {
    ptx::ldmatrix_x4_trans(a, shared + 32 * (t % 8 + 8 * (t / 16)) + 16 * (t / 8 % 2));
    ptx::ldmatrix_x2(b, b_shared + 32 * (t % 8) + 16 * (t / 8 % 2));
  } else {
    ptx::ldmatrix_x4(a, shared + 32 * (t % 16) + 16 * (t / 16));
    ptx::ldmatrix_x2_trans(b, b_shared + 16 * (t % 16));
  }
  mma(kind, d, a, b);
  for (int i = 0; i < 4; ++i) out[8 * (t / 4 + 8 * (i / 2)) + 2 * (t % 4) + i % 2] = d[i];
}

// Word by word: to_tf32, relu_f16x2, relu_bf16x2.
__global__ void conversions(const float* in, float* out, int kind, int) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t x = __float_as_uint(in[t]);
  uint32_t y = ptx::to_tf32(in[t]);
  if (kind == 1) y = ptx::relu_f16x2(x);
  if (kind == 2) y = ptx::relu_bf16x2(x);
  out[t] = __uint_as_float(y);
}

// Every thread copies `words` words, valid where the first of them is not zero; out [4, threads, words]: shared memory
// before the wait, after it, and the same for a second copy, of which the first wait leaves one group unfinished.
__global__ void copies(const float* in, float* out, int words, int) {
  EVK_DYNAMIC_SHARED(shared);
  const int t = threadIdx.x, n = blockDim.x * words;
  float* own = reinterpret_cast<float*>(shared) + t * words;
  const float* from = in + t * words;
  for (int i = 0; i < 2 * words; ++i) own[i / words * n + i % words] = 7.0f;
  for (int copy = 0; copy < 2; ++copy) {
    float* to = own + copy * n;
    if (words == 1) ptx::cp_async_4(to, from, *from != 0);
    if (words == 2) ptx::cp_async_8(to, from, *from != 0);
    if (words == 4) ptx::cp_async_16(to, from, *from != 0);
    ptx::cp_async_commit();
  }
  auto store = [&](int row, int copy) {
    for (int i = 0; i < words; ++i) out[row * n + t * words + i] = own[copy * n + i];
  };
  store(0, 0);
  ptx::cp_async_wait<1>();
  store(1, 0);
  store(2, 1);
  ptx::cp_async_wait<0>();
  store(3, 1);
}

// Each thread moves `words` (2 or 4) words of its own to global memory, and through shared memory to global behind it.
__global__ void stores(const float* in, float* out, int words, int) {
  EVK_DYNAMIC_SHARED(shared);
  const int t = threadIdx.x, n = blockDim.x * words;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(in) + t * words;
  uint32_t* own = reinterpret_cast<uint32_t*>(shared) + t * words;
  uint32_t* to = reinterpret_cast<uint32_t*>(out) + t * words;
  for (uint32_t* p : {to, own}) {
    if (words == 4) ptx::store_16(p, from[0], from[1], from[2], from[3]);
    if (words == 2) ptx::store_8(p, from[0], from[1]);
  }
  for (int i = 0; i < words; ++i) to[n + i] = own[i];
}

EVK_SAMPLE(fragments)
EVK_SAMPLE(matrices)
EVK_SAMPLE(product)
EVK_SAMPLE(conversions)
EVK_SAMPLE(copies)
EVK_SAMPLE(stores)
