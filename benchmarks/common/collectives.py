"""What a data-parallel step sends: the collectives of each process and their bytes, counted."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode


class _Count(TorchDispatchMode):
    """Count what DistributedDataParallel sends, and send no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives = 0
        self.nbytes = 0

    def add(self, *tensors: Tensor) -> None:
        self.collectives += 1
        self.nbytes += sum(tensor.nbytes for tensor in tensors)

    def hook(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.add(bucket.buffer())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        if operator.namespace == "c10d":
            self.add(*arguments[0])
        return operator(*arguments, **(keywords or {}))


def collectives(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Return the collectives of a process in a step, and the bytes that it hands to them.

    DistributedDataParallel with its defaults reduces the gradients in buckets, and broadcasts the
    buffers, BatchNorm's running statistics, before each forward pass. Counted on a copy on the CPU,
    in a group of one process, in the third step: two settle which gradients share a bucket.

    Args:
        model: the network, in training mode.
        images: what it takes; two of them suffice.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(copy.deepcopy(model).cpu())
        count = _Count()
        parallel.register_comm_hook(None, count.hook)
        for _ in range(3):
            count.collectives = count.nbytes = 0
            with count:
                parallel(images[:2].cpu()).sum().backward()
        return count.collectives, count.nbytes
    finally:
        dist.destroy_process_group()


def synchronised_statistics(model: nn.Module) -> tuple[int, int]:
    """Return what `SyncBatchNorm` adds to `collectives` in the place of every BatchNorm.

    Each gathers mean, inverse deviation and count in the forward pass, 2C + 1 float32 numbers, and
    reduces two sums in the backward pass, 2C (torch.nn.modules._functions.SyncBatchNorm). Computed,
    as it runs on GPUs alone.
    """
    channels = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return 2 * len(channels), sum(4 * (4 * each + 1) for each in channels)
