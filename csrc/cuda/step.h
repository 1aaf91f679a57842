// The launch of the step's kernel, as csrc/cuda/module.cpp gives it to Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace czm {

struct WorkItem;

struct StepLaunch {
  int64_t dtype;  // of all tensors, as descriptors number it
  bool has_large_blocks;
  const WorkItem* items;  // on the device; one for each warp
  int64_t blocks;
  // On the host: the bytes of what StepArguments holds.
  const void* grads;
  int64_t tensors;
  const void* hyperparameters;
  const void* hyperparameter_addresses;
  int64_t groups;
  // On the device; null for 1 and 0.
  const float* grad_scale;
  const float* found_inf;
};

// On the current stream of the device.
void launch_step(const StepLaunch& step, int device);

struct StreamState {
  int64_t id;
  bool is_capturing;
};

// Of the current stream of the device.
StreamState stream_of(int device);

// Returns how many words a launch can have as arguments outside of a capture.
int64_t most_words(int device);

// Returns the address on the device of a copy of `data` that is complete and lives as long as the process.
// It may be called while a stream is captured, and is no part of the capture.
int64_t keep_on_device(int device, const void* data, size_t bytes);

}  // namespace czm
