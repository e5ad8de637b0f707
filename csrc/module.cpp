// pybind11 module _C: what the build contains and how it would cut a problem. Introspection only, no op lives here.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cuda/launch_plan.h"

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
}
