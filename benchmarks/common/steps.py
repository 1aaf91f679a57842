"""Ways to do one optimizer step: each steps its own copy of the weights, on shared gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from czm_fused import FusedCZMSGD
from czm_fused.ops import backends
from czm_fused.ops.step import reference


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a step.

    Attributes:
        lr: learning rate.
        luma: strength of the anchor.
        momentum: momentum factor.
        zmg: the share of each slice's mean that is removed.
    """

    lr: float
    luma: float
    momentum: float = 0.9
    zmg: float = 0.85


class Provider(Protocol):
    """One way to do the step.

    Attributes:
        name: as rows name it.
        backend: the backend of `czm_fused`, else `"torch"`.
        step: does one step; what is timed.
    """

    name: str
    backend: str

    @property
    def step(self) -> Callable[[], object]: ...

    def configure(self, settings: Settings) -> None:
        """Take `settings` for the steps to come."""

    def weights(self) -> Sequence[Tensor]:
        """Return the weights, in the model's order."""


def _parameters(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[nn.Parameter]:
    params = [nn.Parameter(weight.clone()) for weight in weights]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


class TorchSGD:
    """`torch.optim.SGD` with momentum."""

    backend = "torch"

    def __init__(
        self,
        name: str,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        settings: Settings,
        **implementation: bool,
    ) -> None:
        self.name = name
        self._params = _parameters(weights, grads)
        self.optimizer = torch.optim.SGD(
            self._params, lr=settings.lr, momentum=settings.momentum, **implementation
        )
        self.step: Callable[[], object] = self.optimizer.step

    def configure(self, settings: Settings) -> None:
        self.optimizer.param_groups[0].update(lr=settings.lr, momentum=settings.momentum)

    def weights(self) -> Sequence[Tensor]:
        return self._params


class FusedCZM:
    """`FusedCZMSGD`, as a user calls it."""

    name = "czm_fused"

    def __init__(
        self, backend: str, weights: Sequence[Tensor], grads: Sequence[Tensor], settings: Settings
    ) -> None:
        self.backend = backend
        self._params = _parameters(weights, grads)
        self.optimizer = FusedCZMSGD(self._params, backend=backend, **vars(settings))
        self.step: Callable[[], object] = self.optimizer.step

    def configure(self, settings: Settings) -> None:
        self.optimizer.param_groups[0].update(vars(settings))

    def weights(self) -> Sequence[Tensor]:
        return self._params


class EagerCZM:
    """The paper as written: `W = exp(g) V` by autograd, LUMA a loss, gradients edited, torch's SGD.

    A step is everything but the network's own forward and backward: the materialisation of W, the
    backward pass through it and through the anchor, the zero-mean gradient, and fused SGD.
    """

    name = "czm_eager"
    backend = "torch"

    def __init__(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], settings: Settings
    ) -> None:
        is_filter = [weight.dim() > 2 for weight in weights]
        filters = [weight for weight, keep in zip(weights, is_filter, strict=True) if keep]
        others = [number for number, skip in enumerate(is_filter) if not skip]
        self._is_filter = is_filter
        self._settings = settings
        self._dweights = [grad for grad, keep in zip(grads, is_filter, strict=True) if keep]
        self._log_scales = [nn.Parameter(reference.initial_log_scale(w)) for w in filters]
        self._directions = [
            nn.Parameter((w / _per_filter(g.detach().exp(), w)).to(w.dtype))
            for w, g in zip(filters, self._log_scales, strict=True)
        ]
        self._others = _parameters([weights[n] for n in others], [grads[n] for n in others])
        self.optimizer = torch.optim.SGD(
            [*self._directions, *self._log_scales, *self._others],
            lr=settings.lr,
            momentum=settings.momentum,
            **_fastest_right_sgd(weights[0]),
        )

    def configure(self, settings: Settings) -> None:
        self._settings = settings
        self.optimizer.param_groups[0].update(lr=settings.lr, momentum=settings.momentum)

    def step(self) -> None:
        weights = self._materialise()
        anchor = sum((v.flatten(1).norm(dim=1) - 1).square().sum() for v in self._directions)
        torch.autograd.backward(
            [self._settings.luma * anchor, *weights], [None, *self._dweights]
        )
        with torch.no_grad():
            for v in self._directions:
                if v.grad is not None and v[0, 0].numel() > 1:
                    means = v.grad.mean(dim=tuple(range(2, v.dim())), keepdim=True)
                    v.grad -= self._settings.zmg * means
        self.optimizer.step()
        for leaf in (*self._directions, *self._log_scales):
            leaf.grad = None

    def weights(self) -> Sequence[Tensor]:
        filters, others = iter(self._materialise()), iter(self._others)
        return [next(filters if keep else others) for keep in self._is_filter]

    def _materialise(self) -> list[Tensor]:
        return [
            (_per_filter(g.exp(), v) * v).to(v.dtype)
            for g, v in zip(self._log_scales, self._directions, strict=True)
        ]


class ForeachCZM:
    """The folded step, V never formed, in `torch._foreach` operations where they exist.

    The scalars of all filters share one vector each. Sums over a filter are taken layer by layer,
    because no `_foreach` operation computes them.
    """

    name = "czm_foreach"
    backend = "torch"

    def __init__(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], settings: Settings
    ) -> None:
        self._settings = settings
        self._weights = [weight.clone() for weight in weights]
        buffers = [torch.zeros_like(weight) for weight in weights]
        numbers = range(len(weights))
        filters = [n for n in numbers if weights[n].dim() > 2]
        others = [n for n in numbers if weights[n].dim() <= 2]
        self._filters = [self._weights[n] for n in filters]
        self._dweights = [grads[n] for n in filters]
        self._buffers = [buffers[n] for n in filters]
        self._others = [self._weights[n] for n in others]
        self._other_grads = [grads[n] for n in others]
        self._other_buffers = [buffers[n] for n in others]
        self._with_taps = [n for n, w in enumerate(self._filters) if w[0, 0].numel() > 1]
        self._log_scale = torch.cat([reference.initial_log_scale(w) for w in self._filters])
        self._log_scale_buffer = torch.zeros_like(self._log_scale)

    def configure(self, settings: Settings) -> None:
        self._settings = settings

    @torch.no_grad()
    def step(self) -> None:
        settings = self._settings
        dtype = self._log_scale.dtype
        scale = self._log_scale.exp()
        norms = torch.cat(
            [torch.linalg.vector_norm(w.flatten(1), dim=1, dtype=dtype) for w in self._filters]
        ).div_(scale)
        products = torch._foreach_mul(self._dweights, self._filters)
        log_scale_grad = torch.cat([p.flatten(1).sum(dim=1, dtype=dtype) for p in products])

        grads = torch._foreach_mul(self._dweights, self._split(scale))
        anchor = 2 * settings.luma * (norms - 1) / (norms * scale)
        torch._foreach_addcmul_(grads, self._filters, self._split(anchor))
        sliced = [grads[n] for n in self._with_taps]
        means = [grad.mean(dim=tuple(range(2, grad.dim())), keepdim=True) for grad in sliced]
        torch._foreach_sub_(sliced, means, alpha=settings.zmg)

        torch._foreach_mul_(self._buffers, settings.momentum)
        torch._foreach_add_(self._buffers, grads)
        self._log_scale_buffer.mul_(settings.momentum).add_(log_scale_grad)
        change = -settings.lr * self._log_scale_buffer
        self._log_scale.add_(change)

        torch._foreach_mul_(self._filters, self._split(change.exp()))
        rates = self._split(-settings.lr * self._log_scale.exp())
        torch._foreach_addcmul_(self._filters, self._buffers, rates)

        torch._foreach_mul_(self._other_buffers, settings.momentum)
        torch._foreach_add_(self._other_buffers, self._other_grads)
        torch._foreach_add_(self._others, self._other_buffers, alpha=-settings.lr)

    def weights(self) -> Sequence[Tensor]:
        return self._weights

    def _split(self, values: Tensor) -> list[Tensor]:
        """Deal one number a filter out to the layers, in shapes that broadcast over them."""
        parts = values.to(self._filters[0].dtype).split([len(w) for w in self._filters])
        return [_per_filter(part, w) for part, w in zip(parts, self._filters, strict=True)]


def _fastest_right_sgd(weight: Tensor) -> dict[str, bool]:
    # On CPUs torch's fused SGD leaves most weights of half types as they are (2.11 and 2.13).
    is_wrong = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
    return {"foreach": True} if is_wrong else {"fused": True}


def _per_filter(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *[1] * (weight.dim() - 1))


def available_backends(device: torch.device) -> list[str]:
    """Return the backends of `czm_fused` that run on `device` at full speed."""
    return [
        name
        for name in backends.BACKENDS
        if backends.problem(name, device.type) is None
        # Triton's interpreter is for correctness, at a millisecond a filter.
        and not (name == "triton" and backends.interpreting_triton())
    ]


def czm_providers(
    names: Sequence[str], weights: Sequence[Tensor], grads: Sequence[Tensor], settings: Settings
) -> list[Provider]:
    """Build `FusedCZMSGD` on each backend in `names`, and its rivals of the same mathematics."""
    return [
        *(FusedCZM(backend, weights, grads, settings) for backend in names),
        ForeachCZM(weights, grads, settings),
        EagerCZM(weights, grads, settings),
    ]


def sgd_providers(
    weights: Sequence[Tensor], grads: Sequence[Tensor], settings: Settings
) -> list[Provider]:
    """Build the three implementations of `torch.optim.SGD`: the floor."""
    return [
        TorchSGD("sgd_forloop", weights, grads, settings, foreach=False, fused=False),
        TorchSGD("sgd_foreach", weights, grads, settings, foreach=True),
        TorchSGD("sgd_fused", weights, grads, settings, fused=True),
    ]
