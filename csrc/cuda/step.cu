// One launch of the step for the tensors of a dtype.
//
// Hyperparameters and the addresses of the gradients are arguments of the kernel, so that nothing is
// copied and the host never waits; a CUDA graph keeps them as they were.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "launch_utils.h"
#include "step_launch.h"

namespace czm {
namespace {

using torch::stable::accelerator::DeviceGuard;

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// While it lives, this thread may do what would else end a capture, its own or another's.
class RelaxedCapture {
 public:
  RelaxedCapture() { STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

void launch_step(const StepLaunch& step, int device) {
  if (step.blocks == 0) return;
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  choose_kernel(step, [&](auto kernel, const auto& arguments, int shared_bytes) {
    if (step.has_large_blocks) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          shared_bytes));
    }
    kernel<<<unsigned(step.blocks), kThreads, shared_bytes, stream>>>(arguments);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

StreamState stream_of(int device) {
  const cudaStream_t stream = current_stream(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return {reinterpret_cast<int64_t>(stream), status != cudaStreamCaptureStatusNone};
}

int64_t most_words(int device) {
  int driver = 0, major = 0;
  STD_CUDA_CHECK(cudaDriverGetVersion(&driver));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  // As torch asks for its own multi-tensor kernels.
  return driver >= 12010 && major >= 7 ? kManyWords : kFewWords;
}

int64_t keep_on_device(int device, const void* data, size_t bytes) {
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;
  void* memory = nullptr;
  STD_CUDA_CHECK(cudaMalloc(&memory, bytes));
  // A stream that no capture is on and that waits for no other.
  cudaStream_t stream = nullptr;
  STD_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  STD_CUDA_CHECK(cudaMemcpyAsync(memory, data, bytes, cudaMemcpyHostToDevice, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  STD_CUDA_CHECK(cudaStreamDestroy(stream));
  return reinterpret_cast<int64_t>(memory);
}

}  // namespace czm
