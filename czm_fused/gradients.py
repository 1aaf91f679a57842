"""normalize_gradients_(): the same step for every filter, whatever its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from czm_fused._internal.sharding import local
from czm_fused.init import check_positive, named_convolutions
from czm_fused.ops.step.reference import filter_norms

NORM = 0.1
"""The norm that the gradient of every filter's direction gets."""


@torch.no_grad()
def normalize_gradients_(model: nn.Module, *, norm: float = NORM) -> None:
    """Give the gradient of every filter's direction the same norm, in place.

    For filters W = exp(g) V with unit directions V, the gradient of V is ||W|| dL/dW. So

        dL/dW[f] <- norm / (||W[f]|| ||dL/dW[f]||) dL/dW[f]

    and a step of rate lr turns every filter by about lr * norm radians. BatchNorm does about that
    by itself: a filter before it grows until its steps are small beside it, whatever its gradient
    (Kosson et al., arXiv 2305.17212). Without it, the filters of one network may have gradients
    that differ a hundredfold, depthwise ones above all, and the largest bound the rate.

    Call it between `backward` and `step`, in place of `torch.nn.utils.clip_grad_norm_`; with a
    `GradScaler`, after `unscale_`. The gradients of biases, linear layers and everything else that
    is no filter stay. A gradient of 0 stays 0. Each process of `fully_shard` needs its own filters
    alone.

        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        >>> network(torch.rand(16, 3, 8, 8)).square().sum().backward()
        >>> normalize_gradients_(network)
        >>> weight = network[2].weight
        >>> round((weight[0].norm() * weight.grad[0].norm()).item(), 3)
        0.1

    Args:
        model: the network.
        norm: the norm of each direction's gradient afterwards. Default 0.1.

    Raises:
        ValueError: `norm` is not a positive number.
    """
    check_positive("norm", norm)
    by_kind: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for weight in {each._parameters.get("weight") for each in named_convolutions(model).values()}:
        if weight is not None and weight.grad is not None:
            pair = local(weight), local(weight.grad)
            by_kind.setdefault((weight.device, weight.dtype), []).append(pair)
    for pairs in by_kind.values():
        _normalize([weight for weight, _ in pairs], [grad for _, grad in pairs], norm)


def _normalize(weights: list[Tensor], grads: list[Tensor], norm: float) -> None:
    # All filters at once: a network has many convolutions of few filters.
    counts = [len(weight) for weight in weights]
    products = torch.cat([*map(filter_norms, weights)]) * torch.cat([*map(filter_norms, grads)])
    factors = torch.where(products > 0, norm / products, 0).split_with_sizes(counts)
    for grad, factor in zip(grads, factors, strict=True):
        grad.mul_(factor.view(-1, *[1] * (grad.dim() - 1)))
