// Memory for aligned requests, torch's tensors and the library's buffers, that ends where a forbidden page begins: an
// access past the end, by whatever instruction, kills the process. Freed memory is forbidden, too.
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

extern "C" void __libc_free(void*);

namespace {

constexpr size_t kPage = 4096, kReserved = size_t{1} << 40;
std::atomic<size_t> used{0};

char* base() {
  static char* const memory =
      static_cast<char*>(mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return memory;
}

void* take(size_t size) {
  const size_t bytes = (size + kPage - 1) / kPage * kPage;
  // The first page of a piece keeps its size for free().
  char* const piece = base() + used.fetch_add(bytes + 2 * kPage);
  if (mprotect(piece, bytes + kPage, PROT_READ | PROT_WRITE) != 0) return nullptr;
  *reinterpret_cast<size_t*>(piece) = bytes;
  return piece + kPage + bytes - size;
}

}  // namespace

// torch's tensors: aligned for their elements alone, so that nothing lies between the last one and the page.
extern "C" __attribute__((visibility("default"))) int posix_memalign(void** result, size_t, size_t size) {
  *result = take(size);
  return *result == nullptr ? ENOMEM : 0;
}

// The library's buffers, whose alignment it relies on.
extern "C" __attribute__((visibility("default"))) void* aligned_alloc(size_t alignment, size_t size) {
  return take((size + alignment - 1) / alignment * alignment);
}

extern "C" __attribute__((visibility("default"))) void free(void* p) {
  char* const address = static_cast<char*>(p);
  if (address < base() || address >= base() + kReserved) return __libc_free(p);
  char* const piece = address - reinterpret_cast<uintptr_t>(address) % kPage - kPage;
  const size_t bytes = *reinterpret_cast<size_t*>(piece) + kPage;
  madvise(piece, bytes, MADV_DONTNEED);
  mprotect(piece, bytes, PROT_NONE);
}
