// 1 x 1 convolutions for other launchers.
#pragma once

#include "launch.h"
#include "pointwise.h"

namespace efficientvit_kernels::cpu {

// Whether the image is NCHW or channels_last without gaps.
bool is_dense(const Tensor& image);

// The image itself if it is dense, else a contiguous copy.
Tensor dense(const Tensor& image);

struct PointwiseWeight {
  const void* data;  // [M, K], storage type
  int64_t out_channels, in_channels, stride_m, stride_k;

  // [M, K, 1, 1], and its transpose
  static PointwiseWeight of(const Tensor& weight) {
    return {data_of(weight), weight.size(0), weight.size(1), weight.stride(0), weight.stride(1)};
  }
  PointwiseWeight transposed() const { return {data, in_channels, out_channels, stride_k, stride_m}; }
};

struct PointwiseEpilogue {
  const void *in_scale = nullptr, *scale = nullptr, *shift = nullptr;  // compute type, or null
  const Tensor* residual = nullptr;                                    // dense, of out's memory format
};

// Row panels that a thread packs at once when weights stream through: what it packs is still in the first-level cache
// when it is used.
inline constexpr int64_t kStreamPanels = 1;

// A weight as row panels for a product: packed all at once, or panel by panel by the thread that uses them.
class PackedWeight {
 public:
  // in_scale: as in PointwiseEpilogue.
  PackedWeight(const PointwiseWeight& weight, StorageType type, const void* in_scale);

  int64_t panels() const { return panels_; }
  // By all threads; `at` then tells where a panel lies.
  void pack_all();
  char* at(int64_t panel) const { return static_cast<char*>(buffer_.data) + panel * panel_bytes_; }

  // Calls body(p0, p1, WeightRows, scratch) for groups of kStreamPanels panels, in parallel. Rows that the product can
  // read where they are stay there: with few columns, packing would cost as much as it saves.
  template <class Body>
  void for_each_group(int64_t grain, int64_t scratch_bytes, Stage stage, Body body) const {
    const int64_t groups = (panels_ + kStreamPanels - 1) / kStreamPanels;
    const int64_t packed_bytes = (kStreamPanels * panel_bytes_ + 63) / 64 * 64;
    torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
      char* packed = static_cast<char*>(thread_scratch(packed_bytes + scratch_bytes));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t p0 = panels_ * i / groups, p1 = panels_ * (i + 1) / groups;
        const WeightRows rows = rows_for(p0, p1, packed);
        const StageTimer timer(stage);
        body(p0, p1, rows, packed + packed_bytes);
      }
    });
  }

 private:
  void pack(int64_t p0, int64_t p1, void* into) const;
  WeightRows rows_for(int64_t p0, int64_t p1, void* memory) const;

  PointwiseArgs args_;
  PointwiseKernels kernels_;
  int64_t bytes_, panels_, panel_bytes_;
  Buffer buffer_;
  bool reads_in_place_;
};

// out = weight . in, see pointwise.h. `in` and `out` are dense.
void pointwise(const Tensor& in, const PointwiseWeight& weight, const PointwiseEpilogue& epilogue, const Tensor& out,
               Stage stage);

// sum_{b, n} grad_out[b, m, n] in[b, k, n] for dense images of one compute type: [M, ld] values of that type, ld >= K.
struct WeightGrad {
  Buffer buffer;
  void* values;  // in the buffer, or, where that needs no rounding, in the gradient itself
  int64_t ld;
};
// into: the contiguous gradient, [M, K, 1, 1]; the caller copies `values` there unless they are there already.
WeightGrad pointwise_weight_grad(const Tensor& grad_out, const Tensor& in, const Tensor& into);

// sum_{b, n} image[b, c, n], dense image.
std::vector<double> channel_sums(const Tensor& image);

}  // namespace efficientvit_kernels::cpu
