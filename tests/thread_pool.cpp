// torch's parallel_for for ThreadSanitizer, which knows threads but not the barriers of OpenMP: every call cuts its
// range anew and runs each part on a thread of its own. Loaded before torch, so the library's calls come here. Ranges
// are cut whatever their grain, so that tasks of small inputs run side by side, too.
#include <cstdint>
#include <thread>
#include <vector>

extern "C" __attribute__((visibility("default"))) int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t,
                                                                             void (*body)(int64_t, int64_t, void*),
                                                                             void* context) {
  const int64_t count = end - begin, parts = count < 4 ? count : 4;
  std::vector<std::thread> threads;
  for (int64_t part = 0; part < parts; ++part) {
    threads.emplace_back(body, begin + count * part / parts, begin + count * (part + 1) / parts, context);
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
