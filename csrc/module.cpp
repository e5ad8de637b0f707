// pybind11 module _C: what the build contains and how it would cut a problem. Introspection only, no op lives here.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "cpu/plan.h"

namespace py = pybind11;
namespace cpu = efficientvit_kernels::cpu;

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
        info["cuda_archs"] = py::tuple();
        return info;
      },
      "Compiler, C++ standard, and the instruction sets and GPU architectures that were compiled.");
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
}
