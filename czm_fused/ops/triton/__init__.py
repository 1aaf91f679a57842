"""The operators in Triton, for CUDA, ROCm and Intel devices; Triton is imported in here alone."""
