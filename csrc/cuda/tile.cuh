// Tiles of tokens in registers: how the lanes of a warp share them, and how they are loaded and stored.
//
// Products run on the matrix units as mma.m16n8k8 in TF32, which holds every float16 and bfloat16 exactly. Its operands
// are spread over 8 rows of 4 lanes, lane = 4 * g + t. Which row of a product stands for which token, and which step of
// its sum for which channel, is free, as long as both operands agree: so each lane takes what it can load and store
// with 16 bytes at a time, and nothing moves between lanes or through shared memory.
#pragma once

#include "launch_plan.h"
#include "platform.cuh"
#include "ptx.cuh"

namespace efficientvit_kernels::cuda {

// What one load or store moves, the same for all tensors of a launch. The launcher finds it out from pointers and
// strides.
enum class Access : int {
  kElements,  // one element: any strides, any alignment
  kTokens,    // 8 or 4 neighbouring tokens of a channel, whose rows are aligned to as many, and end with a whole group
  kChannels,  // neighbouring channels of a token: all tokens are aligned to 16 bytes
};

// A [B, C, H, W] tensor; strides in elements.
struct Image {
  void* data;
  int64_t stride_b, stride_c, stride_h, stride_w;
  int width;
  bool flat;     // tokens are stride_w apart across the ends of rows, too
  bool aligned;  // for kTokens: to 8 tokens, not only to 4
};

// Keeps what follows from `x` where it stands: ahead of the loop, the addresses of all channels would fill the
// registers.
__device__ inline int64_t not_ahead(int64_t x) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}

// The same of words that are unpacked anew: their unpacked values would fill the registers from their first use to the
// last.
__device__ inline void forget_unpacked(uint32_t& word) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(word));
#else
  (void)word;
#endif
}

// The channels of one head in one image.
template <class T>
struct Plane {
  T* data;
  int64_t stride_c, stride_h, stride_w;
  int width;
  bool flat, aligned;

  __device__ Plane(const Image& image, int64_t batch, int64_t channel)
      : data(static_cast<T*>(image.data) + batch * image.stride_b + channel * image.stride_c),
        stride_c(image.stride_c),
        stride_h(image.stride_h),
        stride_w(image.stride_w),
        width(image.width),
        flat(image.flat),
        aligned(image.aligned) {}

  // Rows of tokens, `pitch` apart, aligned to 8 of them.
  __device__ Plane(T* rows, int64_t pitch)
      : data(rows), stride_c(pitch), stride_h(0), stride_w(1), width(1), flat(true), aligned(true) {}

  __device__ int64_t offset(int token) const {
    return flat ? token * stride_w : token / width * stride_h + token % width * stride_w;
  }
};

template <class T>
struct Packed;  // two values of a 16-bit type in one word, the first in the low half

template <>
struct Packed<__half> {
  __device__ static float low(uint32_t word) { return __half2float(__ushort_as_half(static_cast<uint16_t>(word))); }
  __device__ static float high(uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16)));
  }
  __device__ static uint32_t pack(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return __half_as_ushort(both.x) | static_cast<uint32_t>(__half_as_ushort(both.y)) << 16;
  }
  __device__ static uint32_t relu(uint32_t word) { return relu_f16x2(word); }
};

template <>
struct Packed<__nv_bfloat16> {
  __device__ static float low(uint32_t word) { return __uint_as_float(word << 16); }
  __device__ static float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  __device__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return __bfloat16_as_ushort(both.x) | static_cast<uint32_t>(__bfloat16_as_ushort(both.y)) << 16;
  }
  __device__ static uint32_t relu(uint32_t word) { return relu_bf16x2(word); }
};

template <class T>
__device__ uint32_t element(const T* p) {
  return *reinterpret_cast<const uint16_t*>(p);
}

template <class T>
__device__ void store_element(T* p, uint32_t bits) {
  *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(bits);
}

// NaN stays NaN, as in torch.relu; fmaxf would make it 0.
__device__ inline float relu(float x) { return x < 0.0f ? 0.0f : x; }

// kWords words from `p`, with as few loads as its alignment to as many bytes allows.
template <int kWords>
__device__ void load_words(uint32_t* words, const void* p) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 x = static_cast<const uint4*>(p)[i];
      words[4 * i] = x.x, words[4 * i + 1] = x.y, words[4 * i + 2] = x.z, words[4 * i + 3] = x.w;
    }
  } else if constexpr (kWords == 2) {
    const uint2 x = *static_cast<const uint2*>(p);
    words[0] = x.x, words[1] = x.y;
  } else {
    words[0] = *static_cast<const uint32_t*>(p);
  }
}

template <int kWords>
__device__ void store_words(void* p, const uint32_t* words) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      static_cast<uint4*>(p)[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  } else if constexpr (kWords == 2) {
    *static_cast<uint2*>(p) = make_uint2(words[0], words[1]);
  } else {
    *static_cast<uint32_t*>(p) = words[0];
  }
}

// The same of words that were packed one by one.
template <int kWords>
__device__ void store_packed(void* p, const uint32_t* words) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      store_16(static_cast<uint32_t*>(p) + i, words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  } else if constexpr (kWords == 2) {
    store_8(p, words[0], words[1]);
  } else {
    store_words<kWords>(p, words);
  }
}

// A lane's tokens n to n + kCount - 1 (8, 4 or 2) of a channel; those from `stop` on are 0. Rows end with a whole
// group.
template <int kCount, class T>
__device__ void load_tokens(uint32_t* words, const Plane<T>& plane, const T* p, int n, int stop) {
  if (kCount <= 4 || plane.aligned) {
    if (n < stop) {
      load_words<kCount / 2>(words, p + n);
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) words[i] = 0;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 2; i += 2) {
      words[i] = words[i + 1] = 0;
      if (n + 2 * i < stop) load_words<2>(words + i, p + n + 2 * i);
    }
  }
}

template <int kCount, class T>
__device__ void store_tokens(const Plane<T>& plane, T* p, const uint32_t* words, int n, int stop) {
  if (kCount <= 4 || plane.aligned) {
    if (n < stop) store_packed<kCount / 2>(p + n, words);
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 2; i += 2) {
      if (n + 2 * i < stop) store_packed<2>(p + n + 2 * i, words + i);
    }
  }
}

// Read at every use: without `volatile` the compiler would keep whole operands in registers, and spill.
__device__ inline float shared_float(const float* p) { return *static_cast<const volatile float*>(p); }

__device__ inline void shared_pair(uint32_t (&pair)[2], const uint32_t* p) {
  const uint64_t both = *reinterpret_cast<const volatile uint64_t*>(p);
  pair[0] = static_cast<uint32_t>(both), pair[1] = static_cast<uint32_t>(both >> 32);
}

// Two tokens by two channels: what a lane holds of a 16 x 8 tile, v[token][channel].
struct Quad {
  float v[2][2];
};

// How fragments of `kSlots` tokens by `kChannels` channels a lane lie in registers, two values a word: two tokens of a
// channel, or with Access::kChannels two channels of a token.
template <class T, int kSlots, int kChannels, Access kAccess>
struct Words {
  static constexpr bool kAlongChannels = kAccess == Access::kChannels;
  static constexpr int kPerSlot = (kChannels + 1) / 2;
  uint32_t words[kAlongChannels ? kSlots * kPerSlot : kChannels * kSlots / 2];

  // Tokens `slot` and slot + 1 (an even slot) of channel `i`.
  __device__ float2 tokens(int slot, int i) const {
    if constexpr (kAlongChannels) {
      const uint32_t first = words[slot * kPerSlot + i / 2], second = words[(slot + 1) * kPerSlot + i / 2];
      return i % 2 == 0 ? make_float2(Packed<T>::low(first), Packed<T>::low(second))
                        : make_float2(Packed<T>::high(first), Packed<T>::high(second));
    } else {
      const uint32_t word = words[(i * kSlots + slot) / 2];
      return make_float2(Packed<T>::low(word), Packed<T>::high(word));
    }
  }

  __device__ void relu() {
#pragma unroll
    for (uint32_t& word : words) word = Packed<T>::relu(word);
  }

  // Slot s is token(s), channel i is channel c + i; without Access::kChannels the slots are neighbours.
  template <class Token>
  __device__ void load(const Plane<T>& plane, int c, int stop, Token token) {
    const int64_t stride_c = not_ahead(plane.stride_c);
    const T* base = plane.data + c * stride_c;
    if constexpr (!kAlongChannels) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        load_tokens<kSlots>(words + i * kSlots / 2, plane, base + i * stride_c, token(0), stop);
      }
    } else {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int n = token(slot);
        const T* p = base + plane.offset(n);
        uint32_t* to = words + slot * kPerSlot;
#pragma unroll
        for (int i = 0; i < kPerSlot; ++i) to[i] = 0;
        if (n >= stop) continue;
        if constexpr (kChannels > 1) {
          load_words<kPerSlot>(to, p);
        } else {
          to[0] = element(p);
        }
      }
    }
  }

  template <class Token>
  __device__ void store(const Plane<T>& plane, int c, int stop, Token token) const {
    const int64_t stride_c = not_ahead(plane.stride_c);
    T* base = plane.data + c * stride_c;
    if constexpr (!kAlongChannels) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        store_tokens<kSlots>(plane, base + i * stride_c, words + i * kSlots / 2, token(0), stop);
      }
    } else {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int n = token(slot);
        if (n < stop) store_packed<kPerSlot>(base + plane.offset(n), words + slot * kPerSlot);
      }
    }
  }
};

// Access::kElements: C channels of kTokens tokens of a plane, moved by the lanes of a warp one element at a time
// through `stage`, the warp's own shared memory. There every row is aligned, and what a lane loads or stores are whole
// groups.
template <class T, int C, int kTokens>
struct Staged {
  static constexpr int kPitch = kTokens + 8;  // the rows of neighbouring channels start in different banks
  T* stage;

  __device__ Plane<T> plane() const { return Plane<T>(stage, kPitch); }

  template <class Move>
  __device__ void for_each(const Plane<T>& plane, int first, int stop, int lane, Move move) const {
    const bool along_channels = plane.stride_c == 1;
#pragma unroll 4
    for (int e = lane; e < C * kTokens; e += 32) {
      const int token = along_channels ? e / C : e % kTokens, channel = along_channels ? e % C : e / kTokens;
      const bool there = first + token < stop;
      move(plane.data + (there ? channel * plane.stride_c + plane.offset(first + token) : 0),
           stage + channel * kPitch + token, there);
    }
  }
  __device__ void load(const Plane<T>& plane, int first, int stop, int lane) const {
    __syncwarp();  // what was staged before is no longer read
    for_each(plane, first, stop, lane,
             [](const T* global, T* shared, bool there) { store_element(shared, there ? element(global) : 0); });
    __syncwarp();
  }
  __device__ void store(const Plane<T>& plane, int first, int stop, int lane) const {
    __syncwarp();
    for_each(plane, first, stop, lane, [](T* global, const T* shared, bool there) {
      if (there) store_element(global, element(shared));
    });
    __syncwarp();
  }
};

// D channels of kTokens tokens in a warp, for products whose rows are tokens. A lane holds 8 tokens, in kTokenPairs
// pairs (at D = 64 half as many, for want of registers), by D / 4 channels, in kPairs pairs; it is operand A (rows
// tokens, sum over channels) or result C (rows tokens, columns channels) of the product of pair `i` of the tokens and
// pair `j` of the channels.
template <class T, int D, Access kAccess, int kTileTokens = tile_tokens(D)>
struct TokenFragment {
  static constexpr int kTokens = kTileTokens;
  static constexpr int kTokenPairs = kTokens / 16;
  static constexpr int kSlots = 2 * kTokenPairs;
  static constexpr int kChannels = D / 4;
  static constexpr int kPairs = D / 8;
  Words<T, kSlots, kChannels, kAccess> x;

  __device__ static int token(int lane, int slot) { return lane / 4 * kSlots + slot; }
  __device__ static int channel(int lane, int i) { return lane % 4 * kChannels + i; }

  __device__ Quad quad(int i, int j) const {
    const float2 first = x.tokens(2 * i, 2 * j), second = x.tokens(2 * i, 2 * j + 1);
    return {{{first.x, second.x}, {first.y, second.y}}};
  }
  __device__ void set_quad(int i, int j, const Quad& q) {
    if constexpr (kAccess == Access::kChannels) {
#pragma unroll
      for (int h = 0; h < 2; ++h) x.words[(2 * i + h) * kPairs + j] = Packed<T>::pack(q.v[h][0], q.v[h][1]);
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e) x.words[(2 * j + e) * kTokenPairs + i] = Packed<T>::pack(q.v[0][e], q.v[1][e]);
    }
  }

  __device__ void unpack_anew(int i) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      forget_unpacked(
          x.words[kAccess == Access::kChannels ? (2 * i + c / kPairs) * kPairs + c % kPairs : c * kTokenPairs + i]);
    }
  }

  // Tokens first + token(lane, slot); those from `stop` on are 0. `stage`: for Staged.
  __device__ void load(const Plane<T>& plane, int first, int stop, int lane, T* stage) {
    if constexpr (kAccess == Access::kElements) {
      const Staged<T, D, kTokens> staged{stage};
      staged.load(plane, first, stop, lane);
      x.load(staged.plane(), channel(lane, 0), kTokens, [=](int slot) { return token(lane, slot); });
    } else {
      x.load(plane, channel(lane, 0), stop, [=](int slot) { return first + token(lane, slot); });
    }
  }
  __device__ void store(const Plane<T>& plane, int first, int stop, int lane, T* stage) const {
    if constexpr (kAccess == Access::kElements) {
      const Staged<T, D, kTokens> staged{stage};
      __syncwarp();
      x.store(staged.plane(), channel(lane, 0), kTokens, [=](int slot) { return token(lane, slot); });
      staged.store(plane, first, stop, lane);
    } else {
      x.store(plane, channel(lane, 0), stop, [=](int slot) { return first + token(lane, slot); });
    }
  }
};

// C channels of 32 tokens in a warp, for products whose sum runs over tokens. A lane holds C / 8 channels of the row g
// by 8 tokens, two for each of 4 steps of the sum; it is operand A (rows channels) or B (columns channels).
template <class T, int C, Access kAccess>
struct ChannelFragment {
  static constexpr int kTokens = 32;
  static constexpr int kSteps = 4;
  static constexpr int kChannels = C / 8;
  Words<T, 8, kChannels, kAccess> x;

  __device__ static int token(int lane, int slot) { return lane % 4 * 8 + slot; }
  __device__ static int channel(int lane, int i) { return lane / 4 * kChannels + i; }

  // Both tokens of a step, for channel i of the lane.
  __device__ float2 pair(int step, int i) const { return x.tokens(2 * step, i); }

  __device__ void load(const Plane<T>& plane, int first, int stop, int lane, T* stage) {
    if constexpr (kAccess == Access::kElements) {
      const Staged<T, C, kTokens> staged{stage};
      staged.load(plane, first, stop, lane);
      x.load(staged.plane(), channel(lane, 0), kTokens, [=](int slot) { return token(lane, slot); });
    } else {
      x.load(plane, channel(lane, 0), stop, [=](int slot) { return first + token(lane, slot); });
    }
  }
};

}  // namespace efficientvit_kernels::cuda
