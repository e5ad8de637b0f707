// Where the time of an op goes: CPU time per stage, summed over threads, while somebody asks for it.
#pragma once

#include <cstdint>

namespace efficientvit_kernels::cpu {

enum class Stage {
  kPackWeights,        // weights of a product into panels
  kQkvProduct,         // x -> qkv
  kState,              // aggregation of k and v, sums over tokens
  kFinishState,        // v's pointwise convolution, fold
  kQuery,              // aggregation of q, normalisation
  kProjection,         // the projection and its epilogue
  kAggregate,          // multiscale_aggregate, forward
  kAttentionForward,   // relu_linear_attention, forward
  kAttentionBackward,  // relu_linear_attention, backward
  kAggregateBackward,  // multiscale_aggregate, backward
  kInputGrad,          // products that give gradients of images
  kWeightGrad,         // products that give gradients of weights
  kCount,
};

bool stages_wanted();
void add_to_stage(Stage stage, int64_t nanoseconds);
int64_t thread_nanoseconds();

// Adds this thread's CPU time between construction and destruction to a stage; free of cost when nobody asks.
class StageTimer {
 public:
  explicit StageTimer(Stage stage) : stage_(stage), start_(stages_wanted() ? thread_nanoseconds() : -1) {}
  ~StageTimer() {
    if (start_ >= 0) add_to_stage(stage_, thread_nanoseconds() - start_);
  }
  StageTimer(const StageTimer&) = delete;
  StageTimer& operator=(const StageTimer&) = delete;

 private:
  Stage stage_;
  int64_t start_;
};

}  // namespace efficientvit_kernels::cpu
