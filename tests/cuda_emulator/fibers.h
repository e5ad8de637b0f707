// Fibers: stacks, the switch between them, and what the sanitizers are told about both.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(EVK_EMULATOR_UCONTEXT)
#define EVK_EMULATOR_USES_UCONTEXT
#include <ucontext.h>
#endif

// There when the process runs under the sanitizer, otherwise null.
extern "C" {
#define EVK_EMULATOR_WEAK __attribute__((weak, visibility("default")))
EVK_EMULATOR_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
EVK_EMULATOR_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
EVK_EMULATOR_WEAK void __asan_poison_memory_region(const volatile void* p, size_t size);
EVK_EMULATOR_WEAK void __asan_unpoison_memory_region(const volatile void* p, size_t size);
EVK_EMULATOR_WEAK void* __tsan_get_current_fiber();
EVK_EMULATOR_WEAK void* __tsan_create_fiber(unsigned flags);
EVK_EMULATOR_WEAK void __tsan_destroy_fiber(void* fiber);
EVK_EMULATOR_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
EVK_EMULATOR_WEAK void __tsan_acquire(void* token);
EVK_EMULATOR_WEAK void __tsan_release(void* token);
#undef EVK_EMULATOR_WEAK
}

namespace emulator::internal {

// A stack of its own, or the one of the thread that launches.
struct Context {
#if defined(EVK_EMULATOR_USES_UCONTEXT)
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
  unsigned char* stack = nullptr;  // lowest address; null for the launching thread
  // For AddressSanitizer, and for ThreadSanitizer.
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  void* tsan = nullptr;
};

// The next switch to `context` calls `entry`, which must not return, on the stack of this number.
void start_at(Context& context, void (*entry)(), size_t number);

// What `entry` must do first.
void arrived_in(Context& context);

void switch_contexts(Context& from, Context& to);

// Whether something was written at the end of the stack.
bool stack_overflowed(const Context& context);

}  // namespace emulator::internal
