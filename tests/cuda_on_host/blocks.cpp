// Compiled without sanitizers: what happens here is the machine's, not the kernels'.
#include "blocks.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

// Defined where a sanitizer is.
extern "C" {
void* __tsan_get_current_fiber() __attribute__((weak));
void* __tsan_create_fiber(unsigned) __attribute__((weak));
void __tsan_switch_to_fiber(void*, unsigned) __attribute__((weak));
void __tsan_acquire(void*) __attribute__((weak));
void __tsan_release(void*) __attribute__((weak));
void __sanitizer_start_switch_fiber(void**, const void*, size_t) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) __attribute__((weak));
}

namespace cuda_host {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kNamedBarriers = 16;
constexpr size_t kStackBytes = 512 * 1024;
constexpr unsigned kTsanNoSynchronisation = 1;

void acquire(void* clock) {
  if (__tsan_acquire) __tsan_acquire(clock);
}

void release(void* clock) {
  if (__tsan_release) __tsan_release(clock);
}

enum class State { ready, at_block_barrier, at_named_barrier, at_warp_barrier, exchanging, ended };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* tsan = __tsan_create_fiber ? __tsan_create_fiber(0) : nullptr;
  State state;
  int barriers;
  int waits;
  unsigned barrier;  // where it waits, and for how many threads
  unsigned barrier_threads;
  unsigned exchanges;
  uint64_t offered[2];
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned threads = 0;
  unsigned current = 0;
  unsigned block = 0;
  unsigned blocks = 0;
  const std::function<void()>* kernel = nullptr;
  ucontext_t scheduler;
  void* scheduler_tsan = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  int skipped_barrier = -1;
  int barriers_met = 0;
  char start, end;
  // Two in turn: who is first at the next barrier must not be waited for by who leaves this one last.
  char block_clocks[2], named_clocks[kNamedBarriers][2], warp_clocks[1024 / kWarp][2];
} machine;

Fiber& current() { return *machine.fibers[machine.current]; }

void switch_to_scheduler(State state) {
  Fiber& fiber = current();
  fiber.state = state;
  void* asan = nullptr;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(state == State::ended ? nullptr : &asan,
                                   machine.scheduler_stack, machine.scheduler_stack_bytes);
  }
  if (__tsan_switch_to_fiber) {
    __tsan_switch_to_fiber(machine.scheduler_tsan, kTsanNoSynchronisation);
  }
  swapcontext(&fiber.context, &machine.scheduler);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(asan, nullptr, nullptr);
}

void fiber_main() {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack,
                                    &machine.scheduler_stack_bytes);
  }
  acquire(&machine.start);
  (*machine.kernel)();
  release(&machine.end);
  switch_to_scheduler(State::ended);
}

void switch_to(unsigned thread) {
  machine.current = thread;
  Fiber& fiber = current();
  void* asan = nullptr;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&asan, fiber.stack.get(), kStackBytes);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber.tsan, kTsanNoSynchronisation);
  swapcontext(&machine.scheduler, &fiber.context);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(asan, nullptr, nullptr);
}

void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.state = State::ready;
  fiber.barriers = 0;
  fiber.waits = 0;
  fiber.exchanges = 0;
}

// Lets threads [first, last) go on if all of them wait in `state`.
bool resume(unsigned first, unsigned last, State state) {
  for (unsigned t = first; t < last; ++t) {
    if (machine.fibers[t]->state != state) return false;
  }
  for (unsigned t = first; t < last; ++t) machine.fibers[t]->state = State::ready;
  return true;
}

// Lets those go on who wait at a named barrier with all the threads that it is for.
void resume_named() {
  for (unsigned barrier = 0; barrier < kNamedBarriers; ++barrier) {
    const auto waits = [&](const std::unique_ptr<Fiber>& fiber) {
      return fiber->state == State::at_named_barrier && fiber->barrier == barrier;
    };
    const auto end = machine.fibers.begin() + machine.threads;
    const auto first = std::find_if(machine.fibers.begin(), end, waits);
    if (first == end) continue;
    if (std::count_if(first, end, waits) < (*first)->barrier_threads) continue;
    for (auto fiber = first; fiber != end; ++fiber) {
      if (waits(*fiber)) (*fiber)->state = State::ready;
    }
  }
}

void run_block() {
  for (unsigned t = 0; t < machine.threads; ++t) prepare(*machine.fibers[t]);
  release(&machine.start);
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    unsigned ended = 0;
    for (unsigned t = 0; t < machine.threads; ++t) {
      if (machine.fibers[t]->state == State::ready) {
        switch_to(t);
        goes_on = true;
      }
      ended += machine.fibers[t]->state == State::ended;
    }
    if (ended == machine.threads) break;
    resume(0, machine.threads, State::at_block_barrier);
    resume_named();
    for (unsigned first = 0; first < machine.threads; first += kWarp) {
      resume(first, first + kWarp, State::at_warp_barrier);
      resume(first, first + kWarp, State::exchanging);
    }
    if (!goes_on) {
      throw std::runtime_error("threads of block " + std::to_string(machine.block) +
                               " wait for others that never come");
    }
  }
  acquire(&machine.end);
  for (unsigned t = 0; t < machine.threads; ++t) {
    machine.barriers_met = std::max(machine.barriers_met, machine.fibers[t]->barriers);
  }
}

void wait(State state, char (&clocks)[2]) {
  Fiber& fiber = current();
  if (fiber.barriers++ == machine.skipped_barrier) return;
  char* const clock = &clocks[fiber.waits++ % 2];
  release(clock);
  switch_to_scheduler(state);
  acquire(clock);
}

}  // namespace

Index thread_index() { return {machine.current}; }
Index block_index() { return {machine.block}; }
Index grid_size() { return {machine.blocks}; }

void wait_for_block() { wait(State::at_block_barrier, machine.block_clocks); }

void wait_for_threads(unsigned barrier, unsigned threads) {
  if (barrier >= kNamedBarriers) throw std::logic_error("there is no such barrier");
  current().barrier = barrier;
  current().barrier_threads = threads;
  wait(State::at_named_barrier, machine.named_clocks[barrier]);
}

void wait_for_warp() {
  wait(State::at_warp_barrier, machine.warp_clocks[machine.current / kWarp]);
}

uint64_t exchange(unsigned lanes, uint64_t bits, int distance) {
  if (lanes != 0xffffffffu) throw std::logic_error("only whole warps exchange here");
  // Two places in turn: who is one exchange ahead does not overwrite what others have yet to read.
  Fiber& fiber = current();
  const unsigned thread = machine.current;
  const unsigned place = fiber.exchanges++ % 2;
  fiber.offered[place] = bits;
  switch_to_scheduler(State::exchanging);
  return machine.fibers[thread ^ unsigned(distance)]->offered[place];
}

void run_blocks(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  while (machine.fibers.size() < threads) machine.fibers.push_back(std::make_unique<Fiber>());
  machine.threads = threads;
  machine.blocks = blocks;
  machine.kernel = &kernel;
  machine.barriers_met = 0;
  if (__tsan_get_current_fiber) machine.scheduler_tsan = __tsan_get_current_fiber();
  for (machine.block = 0; machine.block < blocks; ++machine.block) run_block();
}

void skip_barrier(int number) { machine.skipped_barrier = number; }
int barriers_met() { return machine.barriers_met; }

}  // namespace cuda_host
