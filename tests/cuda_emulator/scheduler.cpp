// Runs the threads of a block: barriers, warp-wide calls, deadlocks.
#include "scheduler.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator::internal {

State state;

// --- words ----------------------------------------------------------------------------------------------------------

std::string text(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

std::string text(const Site& site) {
  const std::string path = site.file_name();
  return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

std::string block_text() { return "block " + text(blockIdx.x, blockIdx.y, blockIdx.z); }

std::runtime_error error_of(const std::string& words) { return std::runtime_error("cuda emulator: " + words); }

uint64_t next_random() {
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  return state.random ^= state.random << 17;
}

namespace {

[[noreturn]] void fail_at(const std::string& what, const Site& site) {
  throw error_of(what + " at " + text(site) + ", " + block_text() + ", thread " +
                 text(threadIdx.x, threadIdx.y, threadIdx.z));
}

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && same_text(a.file_name(), b.file_name());
}

std::string deadlock() {
  struct Place {
    const Fiber* first;
    int count;
  };
  std::vector<Place> places;
  for (int i = 0; i < state.threads; ++i) {
    const Fiber& fiber = *state.fibers[i];
    if (fiber.finished) continue;
    auto same = [&](const Place& place) {
      return same_text(place.first->waits_in, fiber.waits_in) && same_place(place.first->site, fiber.site);
    };
    auto place = std::find_if(places.begin(), places.end(), same);
    if (place == places.end())
      places.push_back({&fiber, 1});
    else
      ++place->count;
  }
  std::string words = "deadlock, " + block_text() + ": ";
  for (const auto& [first, count] : places)
    words += std::to_string(count) + " threads wait in " + first->waits_in + " at " + text(first->site) + " (first " +
             text(first->index.x, first->index.y, first->index.z) + "), ";
  return words + std::to_string(state.threads - state.alive) + " have finished";
}

// --- whose turn it is -----------------------------------------------------------------------------------------------

int choose_bit(uint32_t bits) {
  if (state.order == Order::kForward) return std::countr_zero(bits);
  if (state.order == Order::kReverse) return 31 - std::countl_zero(bits);
  const int start = static_cast<int>(next_random() >> 59);
  return (std::countr_zero(std::rotr(bits, start)) + start) & 31;
}

// Forward and reverse stay with one warp, and with one lane, for as long as it can run: the worst case for whatever
// relies on others being there already.
Context& choose() {
  if (state.ready_warps && !state.error) {
    const int warp = choose_bit(state.ready_warps);
    return *state.fibers[32 * warp + choose_bit(state.warps[warp].runnable)];
  }
  if (state.alive && !state.error) state.error = std::make_exception_ptr(error_of(deadlock()));
  return state.launching;
}

Fiber& self() { return static_cast<Fiber&>(*state.current); }
Warp& own_warp() { return state.warps[self().number / 32]; }

void set_runnable(int warp, uint32_t lanes) {
  state.warps[warp].runnable |= lanes;
  if (lanes) state.ready_warps |= 1u << warp;
}

void set_waiting(const Fiber& fiber) {
  const int warp = fiber.number / 32;
  if ((state.warps[warp].runnable &= ~(1u << fiber.number % 32)) == 0) state.ready_warps &= ~(1u << warp);
}

void give_way() {
  Context& from = *state.current;
  Context& to = choose();
  // Whether the block ends or an error stops it: the launching thread sees what was done until here.
  release(&state.end_token);
  if (&from == &to) return;
  state.current = &to;
  if (&to != &state.launching) threadIdx = static_cast<Fiber&>(to).index;
  switch_contexts(from, to);
}

void open_barrier() {
  state.at_barrier = 0;
  ++state.barrier_generation;
  for (int warp = 0; 32 * warp < state.threads; ++warp) set_runnable(warp, state.warps[warp].alive);
}

bool is_complete(const Warp& warp, const Group& group) {
  return group.arrived && group.arrived == (group.collective->aligned ? group.mask : group.mask & warp.alive);
}

void complete(int number, Group& group) {
  Warp& warp = state.warps[number];
  if (group.collective->complete) group.collective->complete(warp.operands, group.arrived);
  set_runnable(number, group.arrived);
  group.arrived = 0;
  ++group.generation;
}

void finish() {
  Fiber& fiber = self();
  Warp& warp = own_warp();
  fiber.finished = true;
  set_waiting(fiber);
  warp.alive &= ~(1u << fiber.number % 32);
  --state.alive;
  if (state.at_barrier && state.at_barrier == state.alive) open_barrier();
  if (warp.alive)
    for (Group& group : warp.groups)
      if (is_complete(warp, group)) complete(fiber.number / 32, group);
  if (stack_overflowed(fiber)) {
    fiber.started = false;
    state.error = std::make_exception_ptr(error_of("a thread's stack overflowed, " + block_text() + ", thread " +
                                                   text(fiber.index.x, fiber.index.y, fiber.index.z)));
  }
  give_way();
}

// A fiber lives as long as the process and runs one thread of each block.
void live() {
  arrived_in(self());
  for (;;) {
    acquire(&state.begin_token);
    try {
      state.body(state.context);
    } catch (...) {
      state.error = std::current_exception();
    }
    finish();
  }
}

void begin_threads() {
  state.ready_warps = 0;
  state.alive = state.threads;
  state.at_barrier = 0;
  for (int warp = 0; 32 * warp < state.threads; ++warp) {
    const int lanes = std::min(32, state.threads - 32 * warp);
    state.warps[warp].alive = lanes == 32 ? ~0u : (1u << lanes) - 1;
    state.warps[warp].runnable = 0;
    for (Group& group : state.warps[warp].groups) group.arrived = 0;
    set_runnable(warp, state.warps[warp].alive);
  }
  for (int i = 0; i < state.threads; ++i) {
    Fiber& fiber = *state.fibers[i];
    // One that an error has left in the middle of its thread starts anew.
    if (!fiber.finished || !fiber.started) start_at(fiber, live, i);
    fiber.started = true;
    fiber.finished = false;
    fiber.waits_in = "nothing";
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.copies.clear();
    fiber.copies_done = 0;
    fiber.open_group = 0;
  }
}

}  // namespace

void run_threads() {
  begin_threads();
  release(&state.begin_token);
  give_way();
  if (!state.error) return;
  acquire(&state.end_token);
  std::rethrow_exception(std::exchange(state.error, nullptr));
}

}  // namespace emulator::internal

namespace emulator {

using namespace internal;

unsigned char* dynamic_shared() { return state.shared; }

void fail(const char* name, const char* what, Site site) { fail_at(std::string(name) + ": " + what, site); }

void check_shared(const void* p, size_t bytes, size_t alignment, const char* name, Site site) {
  const auto address = reinterpret_cast<uintptr_t>(p), begin = reinterpret_cast<uintptr_t>(state.shared);
  if (address < begin || address + bytes > begin + state.shared_bytes)
    fail(name, "not within the block's shared memory", site);
  if (address % alignment) fail(name, "misaligned shared address", site);
}

void block_barrier(Site site) {
  if (state.at_barrier == 0)
    state.barrier_site = site;
  else if (!same_place(state.barrier_site, site))
    fail_at("threads meet in different __syncthreads, at " + text(state.barrier_site) + " and", site);
  Fiber& fiber = self();
  fiber.waits_in = "__syncthreads";
  fiber.site = site;
  char* token = &state.barrier_tokens[state.barrier_generation & 1];
  release(token);
  set_waiting(fiber);
  if (++state.at_barrier == state.alive) open_barrier();
  give_way();
  acquire(token);
}

void meet(const Collective& collective, uint32_t mask, void* operand, Site site) {
  Fiber& fiber = self();
  const int number = fiber.number / 32, lane = fiber.number % 32;
  Warp& warp = state.warps[number];
  const char* name = collective.name;
  if (!(mask >> lane & 1)) fail(name, "the mask lacks the calling lane", site);
  if (collective.aligned && warp.alive != ~0u)
    fail_at(std::string(name) + ": all 32 lanes of the warp must take part, " +
                std::to_string(std::popcount(warp.alive)) + " are left",
            site);
  Group& group = warp.groups[std::countr_zero(mask)];
  if (!group.arrived) {
    group.collective = &collective;
    group.mask = mask;
    group.site = site;
  } else if (!same_text(group.collective->name, name) || group.mask != mask ||
             (!collective.anywhere && !same_place(group.site, site))) {
    fail_at("different warp-wide calls meet: " + std::string(group.collective->name) + " at " + text(group.site) +
                ", and " + std::string(name) + (group.mask != mask ? " with another mask" : ""),
            site);
  }
  fiber.waits_in = collective.name;
  fiber.site = site;
  char* token = collective.orders_memory ? &group.tokens[group.generation & 1] : nullptr;
  if (token) release(token);
  warp.operands[lane] = operand;
  group.arrived |= 1u << lane;
  set_waiting(fiber);
  if (is_complete(warp, group)) complete(number, group);
  give_way();
  if (token) acquire(token);
}

int lane() { return self().number % 32; }

uint32_t active_lanes() { return own_warp().alive; }

void memory_fence() {
  release(&state.fence_token);
  acquire(&state.fence_token);
}

void push_copy(const Copy& copy) {
  Fiber& fiber = self();
  fiber.copies.push_back(copy);
  fiber.copies.back().group = fiber.open_group;
}

void commit_copies() { ++self().open_group; }

bool pop_copy(int pending, Copy& copy) {
  Fiber& fiber = self();
  if (fiber.copies_done == fiber.copies.size() || fiber.copies[fiber.copies_done].group >= fiber.open_group - pending) {
    if (fiber.copies_done == fiber.copies.size()) {
      fiber.copies.clear();
      fiber.copies_done = 0;
    }
    return false;
  }
  copy = fiber.copies[fiber.copies_done++];
  return true;
}

}  // namespace emulator
