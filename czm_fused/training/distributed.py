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

from .errors import TrainingError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a training.

    Attributes:
        rank: of this process, 0 to `size` - 1; rank 0 writes the files.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def share(self, images: int) -> slice:
        """Return the images of a batch of so many that this process takes: equal parts, +- 1.

        The slice is empty where there are fewer images than processes.
        """
        return slice(images * self.rank // self.size, images * (self.rank + 1) // self.size)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return `model` with gradients that are the mean over all processes.

        Raises:
            ValueError: it has BatchNorm, whose statistics torch gathers from several processes on
                GPUs alone.
        """
        if self.size == 1:
            return model
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            if device.type != "cuda":
                raise ValueError(
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
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
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
    """Return whether `torchrun` started this process.

    Raises:
        TrainingError: the environment holds a part of torchrun's variables.
    """
    missing = [name for name in _TORCHRUN if name not in os.environ]
    if missing and {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise TrainingError(
            f"RANK and WORLD_SIZE are set, but {', '.join(missing)} not: start several processes "
            "with torchrun -m czm_fused.training, or unset the two for one"
        )
    return not missing


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, by NCCL for GPUs and else by gloo.

    Without `torchrun`, this process is the only one.

    Raises:
        TrainingError: they cannot be joined.
    """
    if not is_launched():
        yield Ranks()
        return
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"cannot join torchrun's processes: {error}") from error
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def local_rank() -> int:
    """Return this process's number among those that `torchrun` started on this machine."""
    return int(os.environ["LOCAL_RANK"])
