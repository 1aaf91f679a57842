"""The numbers that the GPU kernels must keep. Lower them with the kernels; never raise them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from helpers.cases import Case, Options


@dataclass(frozen=True)
class Numbers:
    """What loads of weights, gradients and momentum cost.

    Attributes:
        sectors: 32 bytes each, over the tensor's own, at most.
        requests: of warps, over as many as move 16 bytes a thread, at most.
        loads_a_wait: loads under way when the first of them is needed, at least.
    """

    sectors: float
    requests: float
    loads_a_wait: float


# A case for each kind of filter, and its numbers by backend.
CASES = {
    "contiguous": (
        Case((4, 512, 3, 3)),
        {"cuda": Numbers(1, 1, 15), "triton": Numbers(1, 1.03, 15)},
    ),
    "channels_last": (
        Case((4, 512, 3, 3), layout="channels_last"),
        {"cuda": Numbers(1, 1, 15), "triton": Numbers(1, 1.12, 15)},
    ),
    "bfloat16": (
        Case((4, 512, 3, 3), torch.bfloat16),
        {"cuda": Numbers(1, 1, 4.5), "triton": Numbers(1, 2.06, 1.36)},
    ),
    "misaligned": (
        Case((4, 512, 3, 3), offset=1),
        {"cuda": Numbers(1.25, 4, 20), "triton": Numbers(2.51, 8.06, 9.3)},
    ),
    "no vector divides it": (
        Case((8, 3, 7, 7)),
        {"cuda": Numbers(1.13, 4.14, 19), "triton": Numbers(2.48, 8.71, 7.5)},
    ),
    "1x1": (
        Case((8, 64, 1, 1)),
        {"cuda": Numbers(1, 1, 12), "triton": Numbers(1, 2, 3)},
    ),
    "9,216 weights": (
        Case((2, 1024, 3, 3)),
        {"cuda": Numbers(1, 1, 30), "triton": Numbers(2, 2.03, 2.5)},
    ),
    "9,216 weights, grad_norm": (
        Case((2, 1024, 3, 3), options=Options(grad_norm=0.1)),
        {"cuda": Numbers(1, 1, 30), "triton": Numbers(3, 3.03, 2)},
    ),
    "20,480 weights": (
        Case((1, 2560, 8)),
        {"cuda": Numbers(1, 1, 30), "triton": Numbers(2, 2.03, 2.5)},
    ),
    "20,475 weights": (
        Case((1, 2275, 9)),
        {"cuda": Numbers(1.01, 4.01, 13), "triton": Numbers(2.01, 8.07, 9.9)},
    ),
    "20,480 weights of half types": (
        Case((1, 2560, 8), torch.bfloat16),
        {"cuda": Numbers(1, 1, 15), "triton": Numbers(2, 4, 1.2)},
    ),
    "10,240 weights of float64": (
        Case((1, 1280, 8), torch.float64),
        {"cuda": Numbers(1, 1, 30), "triton": Numbers(2, 2, 5)},
    ),
    "25,088 weights": (
        Case((1, 25088)),
        {"cuda": Numbers(2, 2, 2.5), "triton": Numbers(2, 2, 2.5)},
    ),
}

# Global loads that wait for one another before the first weight is asked for, at most: of aligned
# filters that registers hold, and of those that are misaligned or read twice.
LOADS_BEFORE_WEIGHT = {
    "plain": {"cuda": (1, 1), "triton": (1, 1)},
    "GradScaler and a rate on the device": {"cuda": (1, 2), "triton": (1, 1)},
}

# The share of a CIFAR ResNet's blocks in which fewer than half of the threads load a weight.
UNDER_HALF_FULL = {"cuda": 0.24, "triton": 0.1}

# Barriers that no case needs, at most, over all variants of a kernel. CUDA's is after a tile, for
# momentum that alone is off an aligned address; Triton's compiler places its own.
UNNEEDED_BARRIERS = {"cuda": 1, "triton": 4}

# Registers of the CUDA step, by the size of its blocks (0 small, 1 large), of every dtype and on
# every architecture. With 128, two blocks of 256 threads share a multiprocessor; a large block has
# one to itself.
REGISTERS = {0: 128, 1: 255}
