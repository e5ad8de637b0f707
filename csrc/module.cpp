// pybind11 module _C: what the build contains and how it would cut a problem. Introspection only, no op lives here.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cuda/aggregate_plan.h"
#include "cuda/lite_mla_plan.h"
#include "cuda/projection_plan.h"

namespace py = pybind11;
namespace cpu = efficientvit_kernels::cpu;
namespace cuda = efficientvit_kernels::cuda;

namespace {

py::dict dict_of(const cuda::TokenPlan& plan, int64_t heads) {
  py::dict dict;
  dict["grid"] = heads * plan.blocks;
  dict["threads"] = 32 * plan.warps;
  dict["block_tokens"] = plan.block_tokens;
  dict["shared_bytes"] = plan.shared_bytes;
  dict["stage_bytes"] = plan.stage_bytes;
  return dict;
}

py::dict cuda_relu_linear_attention_plan(int64_t heads, int64_t tokens, int head_dim, bool fp32, int multiprocessors) {
  if (heads < 1 || tokens < 1 || !cuda::has_head_dim(head_dim) || multiprocessors < 1) {
    throw py::value_error(
        "cuda_relu_linear_attention_plan: heads, tokens and multiprocessors must be positive, head_dim 8, 16, 32 or "
        "64");
  }
  const auto plan = cuda::plan_relu_linear_attention(heads, tokens, head_dim, fp32, {0, multiprocessors, 0});
  py::dict dict;
  dict["kv_state"] = dict_of(plan.kv_state, heads);
  dict["apply"] = dict_of(plan.apply, heads);
  dict["grad_state"] = dict_of(plan.grad_state, heads);
  dict["grad_kv"] = dict_of(plan.grad_kv, heads);
  dict["splits"] = plan.splits();
  dict["sums_splits"] = plan.sums_splits;
  return dict;
}

py::dict dict_of(const cuda::AggregatePlan& plan) {
  py::dict dict;
  dict["threads"] = 32 * plan.warps;
  dict["rows"] = plan.rows;
  dict["cols"] = plan.cols;
  dict["tiles"] = plan.tiles;
  dict["shared_bytes"] = plan.shared_bytes;
  return dict;
}

void check_image(const char* name, int64_t batch, int64_t heads, int64_t height, int64_t width, int head_dim,
                 int size) {
  if (batch < 1 || heads < 1 || height < 1 || width < 1 || !cuda::has_head_dim(head_dim) ||
      !cuda::has_kernel_size(size)) {
    throw py::value_error(std::string(name) +
                          ": batch, heads, height and width must be positive, head_dim 8, 16, 32 or 64, kernel_size 3, "
                          "5 or 7");
  }
}

py::dict cuda_multiscale_aggregate_plan(int64_t batch, int64_t heads, int64_t height, int64_t width, int head_dim,
                                        int kernel_size, bool fp32, int64_t max_shared_bytes) {
  check_image("cuda_multiscale_aggregate_plan", batch, heads, height, width, head_dim, kernel_size);
  const cuda::Device device{0, 1, max_shared_bytes};
  const int bytes = fp32 ? 4 : 2;
  const auto forward = cuda::plan_aggregate(height, width, head_dim, kernel_size, bytes, device);
  const auto grad = cuda::plan_aggregate_grad(batch, height, width, head_dim, kernel_size, bytes, device);
  py::dict dict;
  dict["forward"] = dict_of(forward);
  dict["forward"]["grid"] = batch * 3 * heads * forward.tiles;
  dict["gradients"] = dict_of(grad);
  dict["gradients"]["grid"] = grad.runs * 3 * heads * (head_dim / cuda::kChunk);
  dict["gradients"]["runs"] = grad.runs;
  return dict;
}

py::dict cuda_lite_mla_plan(int64_t batch, int64_t heads, int64_t height, int64_t width, int head_dim, int kernel_size,
                            int64_t out_channels, int multiprocessors, int64_t max_shared_bytes) {
  check_image("cuda_lite_mla_plan", batch, heads, height, width, head_dim, kernel_size);
  const cuda::Device device{0, multiprocessors, max_shared_bytes};
  py::dict dict;
  dict["fused"] = cuda::has_aggregate_attention(head_dim, 2);
  if (!cuda::has_aggregate_attention(head_dim, 2)) return dict;
  const auto plan = cuda::plan_aggregate_attention(height, width, head_dim, kernel_size, device);
  dict["state"] = dict_of(plan.state);
  dict["state"]["grid"] = 2 * batch * heads * plan.splits;
  dict["apply"] = dict_of(plan.apply);
  dict["apply"]["grid"] = 2 * batch * heads * plan.apply.tiles;
  dict["splits"] = plan.splits;
  dict["sums_splits"] = plan.sums_splits;
  const auto projection = cuda::plan_projection(out_channels, batch * height * width, device);
  py::dict product;
  product["grid"] = projection.blocks;
  product["threads"] = cuda::kThreads;
  product["tokens"] = projection.tokens;
  product["shared_bytes"] = projection.shared_bytes;
  dict["projection"] = product;
  return dict;
}

py::dict cuda_two_launches_plan(int64_t batch, int channels, int heads, int64_t height, int64_t width, int head_dim,
                                int kernel_size, int out_channels, int64_t max_shared_bytes) {
  check_image("cuda_two_launches_plan", batch, heads, height, width, head_dim, kernel_size);
  const cuda::Device device{0, 1, max_shared_bytes};
  const cuda::LiteMlaShape shape{batch, height, width, channels, heads, head_dim, out_channels, kernel_size};
  py::dict dict;
  const bool served = cuda::has_two_launches(shape);
  const auto plan = served ? cuda::plan_lite_mla(shape, device) : cuda::LiteMlaPlan{};
  dict["served"] = served && plan.fits();
  dict["preferred"] = served && plan.fits() && cuda::prefers_two_launches(shape);
  if (!served || !plan.fits()) return dict;
  dict["state"] = dict_of(plan.state);
  dict["state"]["grid"] = batch * heads * plan.splits;
  dict["apply"] = dict_of(plan.apply);
  dict["apply"]["grid"] = batch * plan.apply.tiles;
  dict["splits"] = plan.splits;
  dict["sums_splits"] = plan.sums_splits;
  return dict;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection of the native libraries of efficientvit_kernels.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["cplusplus"] = static_cast<long>(__cplusplus);
#if defined(__x86_64__)
        info["cpu_isas"] = py::make_tuple("baseline", "avx2", "avx512");
#else
        info["cpu_isas"] = py::make_tuple("baseline");
#endif
        return info;
      },
      "Compiler, C++ standard, and the instruction sets that were compiled.");
  m.def(
      "cpu_isa", [] { return cpu::isa_name(cpu::isa_in_use()); }, "The instruction set that the CPU kernels use here.");
  m.def(
      "relu_linear_attention_plan",
      [](int64_t tokens, int64_t head_dim) {
        py::dict plan;
        plan["tile_tokens"] = cpu::kTileTokens;
        plan["chunk_tokens"] = cpu::chunk_tokens(head_dim);
        plan["chunks"] = cpu::num_chunks(tokens, head_dim);
        return plan;
      },
      py::arg("tokens"), py::arg("head_dim"), "How the CPU kernels split the tokens of one head.");
  m.def(
      "cuda_relu_linear_attention_plan", &cuda_relu_linear_attention_plan, py::arg("heads"), py::arg("tokens"),
      py::arg("head_dim"), py::arg("fp32"), py::arg("multiprocessors"),
      "The launches of the CUDA kernels, for so many heads of all scales and images: grid, threads, tokens of a block "
      "and shared memory of each.");
  m.def("cuda_multiscale_aggregate_plan", &cuda_multiscale_aggregate_plan, py::arg("batch"), py::arg("heads"),
        py::arg("height"), py::arg("width"), py::arg("head_dim"), py::arg("kernel_size"), py::arg("fp32"),
        py::arg("max_shared_bytes"),
        "The launches of the CUDA kernels for one scale: grid, threads, rows and columns of a tile, shared memory.");
  m.def("cuda_lite_mla_plan", &cuda_lite_mla_plan, py::arg("batch"), py::arg("heads"), py::arg("height"),
        py::arg("width"), py::arg("head_dim"), py::arg("kernel_size"), py::arg("out_channels"),
        py::arg("multiprocessors"), py::arg("max_shared_bytes"),
        "The launches between and behind the products of lite_mla in 16 bits, for one scale.");
  m.def("cuda_two_launches_plan", &cuda_two_launches_plan, py::arg("batch"), py::arg("channels"), py::arg("heads"),
        py::arg("height"), py::arg("width"), py::arg("head_dim"), py::arg("kernel_size"), py::arg("out_channels"),
        py::arg("max_shared_bytes"),
        "lite_mla in two launches: whether they are served, and preferred to four; and what they are.");
}
