// Stacks and switches. Never compiled with a sanitizer.
#include "fibers.h"

#include <sys/mman.h>

#include <new>

#if !defined(EVK_EMULATOR_USES_UCONTEXT)
extern "C" {
// Saves the registers that a function must keep and the stack pointer in *save, and takes those of `load`. swapcontext
// also saves the signal mask, with a system call.
void evk_emulator_switch(void** save, void* load);
}

asm(R"(.text
.globl evk_emulator_switch
.hidden evk_emulator_switch
.type evk_emulator_switch, @function
evk_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size evk_emulator_switch, . - evk_emulator_switch
)");
#endif

namespace emulator::internal {
namespace {

constexpr size_t kPage = 4096;
constexpr uint64_t kCanary = 0x5ca1ab1ec0ffee00u;
constexpr size_t kCanaryWords = 128;

size_t stack_size() {
  const bool large_frames = __asan_poison_memory_region || __tsan_acquire;
  return (large_frames ? 256 : 64) * 1024;
}

Context* switched_from = nullptr;

// A page below the stack that may not be touched, and above it words that tell of a smaller overflow.
void allocate_stack(Context& context) {
  const size_t size = stack_size();
  void* memory =
      mmap(nullptr, kPage + size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) throw std::bad_alloc();
  context.stack = static_cast<unsigned char*>(memory) + kPage;
  context.bottom = context.stack;
  context.size = size;
}

}  // namespace

bool stack_overflowed(const Context& context) {
  const auto* canary = reinterpret_cast<const volatile uint64_t*>(context.stack);
  for (size_t i = 0; i < kCanaryWords; i += 8)
    if (canary[i] != kCanary) return true;
  return false;
}

void start_at(Context& context, void (*entry)(), size_t number) {
  if (!context.stack) allocate_stack(context);
  // What an abandoned run has left.
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(context.stack, context.size);
  auto* canary = reinterpret_cast<uint64_t*>(context.stack);
  for (size_t i = 0; i < kCanaryWords; ++i) canary[i] = kCanary;
  if (__tsan_create_fiber) {
    if (context.tsan) __tsan_destroy_fiber(context.tsan);
    context.tsan = __tsan_create_fiber(0);
  }
  // Stacks that all began at the same offset in their pages would share the same few lines of the caches.
  const size_t colour = number * 9 % 61 * 64;
#if defined(EVK_EMULATOR_USES_UCONTEXT)
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = context.stack;
  context.registers.uc_stack.ss_size = context.size - colour;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#else
  // From the top: where `entry` would return to, `entry` itself, six registers.
  auto* top = reinterpret_cast<uint64_t*>(context.stack + context.size - colour);
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  context.stack_pointer = top;
#endif
}

void arrived_in(Context& context) {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(context.fake_stack, &bottom, &size);
  switched_from->bottom = bottom;
  switched_from->size = size;
}

void switch_contexts(Context& from, Context& to) {
  if (__sanitizer_start_switch_fiber) {
    switched_from = &from;
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, 1);  // 1: a switch orders no memory
#if defined(EVK_EMULATOR_USES_UCONTEXT)
  swapcontext(&from.registers, &to.registers);
#else
  evk_emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
  arrived_in(from);
}

}  // namespace emulator::internal
