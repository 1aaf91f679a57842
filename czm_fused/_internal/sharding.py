"""Parameters that are not plain tensors of numbers: DTensors, of which each rank steps its own
filters without communication, complex ones, and those that have yet to be initialised; and the
modules whose parameters `fully_shard` makes DTensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_special(tensor: Tensor) -> bool:
    """Return True for a complex tensor, a DTensor or any other subclass than Parameter."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_complex()


def is_fake(params: Sequence[Tensor]) -> bool:
    """Return True if any parameter has no memory because a FakeTensorMode made it."""
    if not params or type(params[0]) in (Tensor, torch.nn.Parameter):
        return False
    from torch._subclasses import fake_tensor

    return any(map(fake_tensor.is_fake, params))


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Return True for a DTensor."""
    # Importing its module takes a second, and making a DTensor has imported it.
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, or a plain alias of another subclass of Tensor.

    Both share the memory of `tensor`, unless it has a conjugate bit, and are real, with a last
    dimension more where it is complex. A plain tensor is returned itself, and so is one without a
    shape.
    """
    if not is_special(tensor):
        return tensor
    if is_dtensor(tensor):
        part = tensor.to_local()
        # What a collective has yet to deliver can be waited for.
        plain: Tensor = part.wait() if hasattr(part, "wait") else part
    elif is_lazy(tensor):
        return tensor
    else:
        with torch._C.DisableTorchFunctionSubclass():
            plain = tensor.detach()
    return torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain


def check_not_sharded(model: nn.Module) -> None:
    """Check that every process has the parameters of `model` whole.

    Raises:
        ValueError: `fully_shard` has split them.
    """
    for name, module in model.named_modules():
        if _is_fully_sharded(module):
            what = f"its module {name!r}" if name else "it"
            raise ValueError(
                f"model must not be sharded yet, but {what} is; call fully_shard afterwards"
            )


def reshard(model: nn.Module) -> None:
    """Put the optimizer's parameters back, which FSDP leaves out after a pass without backward."""
    for module in model.modules():
        if _is_fully_sharded(module):
            module.reshard()


def _is_fully_sharded(module: nn.Module) -> TypeGuard[FSDPModule]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def check_not_flattened(number: int, param: Tensor) -> None:
    """Check that parameter `number` has its filters.

    Raises:
        TypeError: FullyShardedDataParallel has flattened it.
    """
    if getattr(param, "_fsdp_flattened", False) or hasattr(param, "_is_flat_param"):
        raise TypeError(
            f"parameter {number} is flattened by FullyShardedDataParallel, which hides its "
            "filters; use torch.distributed.fsdp.fully_shard instead"
        )


def check_placements(number: int, param: Tensor, has_filters: bool) -> None:
    """Check that a rank can step its part of parameter `number` alone.

    Filters must be whole, so they are split along dimension 0 or not at all; what takes plain
    momentum SGD is split anyhow.

    Raises:
        ValueError: the placements leave a rank with a part of a filter, or of a sum.
    """
    if not is_dtensor(param):
        return
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"parameter {number} has placements {param.placements}, a sum that is still to be "
            "made; redistribute it to Shard(0) or Replicate() before it becomes a parameter"
        )
    if has_filters and not all(
        placement.is_replicate() or getattr(placement, "dim", None) == 0
        for placement in param.placements
    ):
        raise ValueError(
            f"parameter {number} has placements {param.placements}, but each rank must hold whole "
            "filters: place it by Shard(0) or Replicate(), as fully_shard does without a "
            "shard_placement_fn, or set exp_scale=False, zmg=0, luma=0 and grad_norm=0 in its group"
        )


def place_grads(
    params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients placed as their parameters are, as torch's optimizers take them.

    Those of DTensors on the same ranks are redistributed, such as the sums that are still to be
    made of an input split over the ranks; all ranks take part.

    Raises:
        RuntimeError: a gradient that is a DTensor where its parameter is none, or the reverse, or
            that is on other ranks.
    """
    placed: list[Tensor | None] = list(grads)
    for number, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is None or _placed(grad) == _placed(param):
            continue
        if not (is_dtensor(grad) and is_dtensor(param) and grad.device_mesh == param.device_mesh):
            raise RuntimeError(
                f"the gradient of parameter {number} is {_describe(grad)}, but the parameter is "
                f"{_describe(param)}; redistribute the gradient, or accumulate it, as the parameter"
            )
        placed[number] = grad.redistribute(placements=param.placements)
    return placed


def local_grads(
    params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return this rank's parts of the gradients, placed as `place_grads` does.

    Raises:
        RuntimeError: what `place_grads` refuses.
    """
    placed = place_grads(params, grads)
    return [None if grad is None else local(grad) for grad in placed]


def per_filter(values: Tensor, param: Tensor) -> Tensor:
    """Return `values`, one a filter of this rank, sharded over the ranks as `param` is."""
    if not is_dtensor(param):
        return values
    from torch.distributed.tensor import DTensor

    sharded = DTensor.from_local(
        values,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape[:1],
        stride=(1,),
    )
    # from_local takes what is offloaded to the mesh's device.
    return sharded.to(values.device)


def check_state(name: str, value: object, param: Tensor) -> None:
    """Check that state `name` can be had where `param` is, without asking other ranks.

    Raises:
        ValueError: it is a DTensor placed otherwise than its parameter.
    """
    if is_dtensor(value) and _placed(value) != _placed(param):
        raise ValueError(
            f"{name} is {_describe(value)}, but its parameter is {_describe(param)}; "
            "save and load it with torch.distributed.checkpoint.state_dict's "
            "get_optimizer_state_dict and set_optimizer_state_dict"
        )


def place_like(name: str, tensor: Tensor, param: Tensor) -> Tensor:
    """Return state `name`, of whole shape, placed as `param` is.

    Raises:
        ValueError: what `check_state` refuses.
    """
    check_state(name, tensor, param)
    if _placed(tensor) == _placed(param):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every rank has the whole of it, and keeps its part.
    return distribute_tensor(tensor, *_placed(param), src_data_rank=None)


def _placed(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else ()


def _describe(tensor: Tensor) -> str:
    if not is_dtensor(tensor):
        return "a plain tensor"
    return f"a DTensor with placements {tensor.placements} on {tensor.device_mesh}"
