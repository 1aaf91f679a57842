"""One training in several processes, started by `torchrun`: each takes its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.overrides import TorchFunctionMode

from .errors import TrainingError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a training.

    Attributes:
        rank: of this process, 0 to `size` - 1; rank 0 writes the files.
        size: how many processes there are.
    """

    rank: int = 0
    size: int = 1

    def share(self, images: int) -> slice:
        """Return which images of a batch of so many are this process's: a part of equal size, +- 1.

        It is empty where there are fewer images than processes.
        """
        return slice(images * self.rank // self.size, images * (self.rank + 1) // self.size)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return `model`, its gradients made the mean of those of all processes.

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

    def draws_for(self, images: int) -> AbstractContextManager[Any]:
        """Let every process draw the noise of a whole batch of so many images, and take its share.

        All processes' generators then stay alike, and like that of a single process.
        """
        return nullcontext() if self.size == 1 else _WholeBatch(images, self.share(images))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let rank 0 through first, and the others when it is done."""
        if self.size > 1 and self.rank > 0:
            distributed.barrier()
        yield
        if self.size > 1 and self.rank == 0:
            distributed.barrier()


class _WholeBatch(TorchFunctionMode):
    """Makes `x.uniform_()`, a row for each image of a share, that share of a draw for all."""

    def __init__(self, images: int, share: slice) -> None:
        super().__init__()
        self.images = images
        self.share = share

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        if function is not Tensor.uniform_:
            return function(*arguments, **keywords)
        part, *limits = arguments
        whole = part.new_empty(self.images, *part.shape[1:]).uniform_(*limits, **keywords)
        return part.copy_(whole[self.share])


def is_launched() -> bool:
    """Return whether `torchrun` started this process."""
    return all(name in os.environ for name in _TORCHRUN)


def local_rank() -> int | None:
    """Return this process's number among those `torchrun` started on this machine, or None."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else None


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
