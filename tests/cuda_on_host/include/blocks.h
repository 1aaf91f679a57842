// The threads of a block as fibers of one host thread.
//
// Sanitizers see each fiber as a thread of its own. For ThreadSanitizer only barriers order what
// fibers do, so a race is found however the fibers happen to be scheduled.
#pragma once

#include <cstdint>
#include <functional>

namespace cuda_host {

struct Index {
  unsigned x;
};

Index thread_index();
Index block_index();
Index grid_size();

void wait_for_block();
void wait_for_warp();

// Waits for `threads` threads of the block at a barrier from 0 to 15.
void wait_for_threads(unsigned barrier, unsigned threads);

// Returns the bits that the lane at `distance` (by exclusive or) gave. Orders no memory.
uint64_t exchange(unsigned lanes, uint64_t bits, int distance);

// Runs `kernel` in every thread of every block. Throws std::runtime_error if threads of a block wait
// where others never come.
void run_blocks(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

// Leaves out the barrier that each thread of a block meets after `number` others; -1 for none.
void skip_barrier(int number);

// How many barriers the threads of the last blocks have met, at most.
int barriers_met();

}  // namespace cuda_host
