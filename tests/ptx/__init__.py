"""An interpreter of PTX, which runs the GPU's kernels on the CPU and proves how they use memory.

It executes the PTX of one kernel in numpy, the lanes of a block as vectors, on host memory. It
traps: an access outside the registered tensors, or not aligned to its whole vector; unordered
accesses of two lanes of a block to one byte, shared or global; two blocks on one byte; a barrier or
shuffle not met by all the lanes that it names. It cannot see ptxas and SASS, time, streams, the
allocator, graphs or the driver.
"""
