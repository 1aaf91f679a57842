"""The operators with gradients on the triton backend, to be called where Triton interprets."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

from czm_fused.functional import add_relu_noise
from czm_fused.ops.add_relu_noise import triton as noise_kernels
from czm_fused.ops.exp_scale import triton as scale_kernels


def run_both() -> tuple[int, Tensor]:
    """Run both operators forward and backward.

    Returns:
        The launches of Triton kernels, and the gradient of exp_scale's direction, 2 x 3 at g = 0.
    """
    launches = []

    def counted(launch):
        return lambda *args, **named: (launches.append(args[0]), launch(*args, **named))

    with (
        mock.patch.object(noise_kernels, "_launch", counted(noise_kernels._launch)),
        mock.patch.object(scale_kernels, "_launch", counted(scale_kernels._launch)),
    ):
        x = torch.randn(2, 3, 4, 4, requires_grad=True)
        add_relu_noise(x, x.detach(), 0.1).sum().backward()
        direction, g = torch.randn(2, 3, requires_grad=True), torch.zeros(2, requires_grad=True)
        torch.ops.czm_fused.exp_scale(direction, g).sum().backward()
    assert direction.grad is not None
    return len(launches), direction.grad
