"""The CUDA kernels' own source, compiled for the host: threads are fibers, and barriers are waited at.

Sanitizers see what a GPU would not tell: reads outside a tensor, undefined behaviour, races.
"""
