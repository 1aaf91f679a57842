"""The CUDA kernels' own source, compiled for the host: the threads of a block are fibers.

Sanitizers see what a GPU would not tell: reads outside a tensor, undefined behaviour, races.
"""
