"""One training in several processes, started by `torchrun`, each with its share of every batch."""

# torch is typed in part.
# mypy: allow-untyped-calls

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import TrainingError, explained


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of 0 to `size` - 1, among those of a training; rank 0 writes files."""

    rank: int = 0
    size: int = 1

    def share(self, images: int) -> slice:
        """Return the images of a batch of so many that this process takes: equal parts, +- 1."""
        return slice(images * self.rank // self.size, images * (self.rank + 1) // self.size)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return `model` with gradients that are the mean over all processes.

        BatchNorm gathers the statistics of the whole batch, which torch does on GPUs alone.
        """
        if self.size == 1:
            return model
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            if device.type != "cuda":
                raise TrainingError(
                    "--method bn in several processes needs --device cuda, since torch gathers "
                    "the statistics of the whole batch on GPUs alone: use one process, or czmig"
                )
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return nn.parallel.DistributedDataParallel(model)

    def sum_(self, values: Tensor) -> Tensor:
        """Replace `values` by their sum over all processes."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return `value` of every process, in the order of the ranks."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let rank 0 through first, and the others when it is done."""
        if self.size > 1 and self.rank > 0:
            distributed.barrier()
        yield
        if self.size > 1 and self.rank == 0:
            distributed.barrier()


def is_launched() -> bool:
    """Return True if `torchrun`, or another launcher, started this process among others."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, if any, by NCCL for GPUs and else by gloo."""
    if not is_launched():
        yield Ranks()
        return
    remedy = "start them with torchrun -m czm_fused.training, or unset RANK and WORLD_SIZE for one"
    with explained("cannot join the processes", remedy):
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
