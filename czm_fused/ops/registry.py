"""Defines an operator once: its schema, fake, plain-torch form, gradient and kernels by backend."""

# torch is typed in part.
# mypy: allow-untyped-calls, no-warn-return-any

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from czm_fused.ops.backends import choose
from czm_fused.ops.layout import to_layout_of

lib = Library("czm_fused", "FRAGMENT")

Result = Tensor | tuple[Tensor, ...]


def needs_plain_torch() -> bool:
    """Return True while a call must be made of torch's own differentiable operators.

    That is while torch.compile or torch.export traces (Inductor fuses them with their neighbours),
    while torch.jit.trace does (a saved or ONNX model knows nothing else), under torch.func's
    transforms, and within a level of forward-mode differentiation.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        # -1 outside all levels. torch's public question is one of a tensor, and dearer.
        or forward_ad._current_level >= 0
    )


class Operator:
    """An operator `czm_fused::<name>`, on the backend that `backends.choose` names at each call.

    The first argument is a tensor; its device decides. The kernels of the native modules are
    registered with torch as `czm_fused::<name>_native`, so that loading them changes nothing about
    what `czm_fused::<name>` runs.

    Args:
        schema: name, arguments and results, in torch's notation.
        reference: the operator in plain torch, differentiable.
        fake: allocates results of the shapes, dtypes and strides that every backend returns.
        triton: module that holds the Triton kernel's launcher, a function named as the operator.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Result],
        fake: Callable[..., Result],
        triton: str,
    ) -> None:
        self.name, signature = schema.split("(", 1)
        self.reference = reference
        self._fake = fake
        self._triton = triton
        lib.define(schema)
        lib.define(f"{self.name}_native({signature}")
        self._operator = getattr(torch.ops.czm_fused, self.name).default
        self._native = getattr(torch.ops.czm_fused, f"{self.name}_native").default
        self._differentiable: Callable[..., Any] = self._operator
        lib.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"czm_fused::{self.name}", fake, lib=lib)

    def __call__(self, *args: Tensor | None) -> Any:
        """Compute the operator: as plain torch where it must be, else on its kernel."""
        first = args[0]
        assert first is not None
        if needs_plain_torch() or choose(first.device) == "reference":
            return self.reference(*args)
        return self._differentiable(*args)

    def apply(self, *args: Tensor | None) -> Any:
        """Compute the operator with the registered gradient on every backend, where it can be."""
        return self.reference(*args) if needs_plain_torch() else self._differentiable(*args)

    def run(self, *args: Tensor | None) -> Result:
        """Compute the operator, without a gradient, on the backend chosen for its device."""
        first = args[0]
        assert first is not None
        backend = choose(first.device)
        if backend == "reference":
            return self.run_reference(*args)
        if backend == "triton":
            launcher = getattr(importlib.import_module(self._triton), self.name)
            return launcher(*args)
        return self._native(*args)

    def run_reference(self, *args: Tensor | None) -> Result:
        """Compute the operator in plain torch, with the strides that every backend returns."""
        result = self.reference(*args)
        # On meta tensors, so that nothing is allocated, except where nothing is read.
        empty = any(arg is not None and arg.numel() == 0 for arg in args)
        like = self._fake(*(args if empty else map(_to_meta, args)))
        if isinstance(result, Tensor):
            assert isinstance(like, Tensor)
            return to_layout_of(result, like)
        return tuple(map(to_layout_of, result, like))

    def register_gradient(
        self,
        save: Callable[[Sequence[Tensor | None], Any], Sequence[Tensor | None]],
        backward: Callable[..., Any],
    ) -> None:
        """Register the operator's derivative.

        Args:
            save: returns the tensors to keep for backward, from the arguments and the result.
            backward: called with `ctx.needs_input_grad`, the kept tensors and the gradients of the
                results; returns a gradient, or None, for each argument.
        """
        operator = self._operator

        def forward(ctx: Any, *args: Tensor | None) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                result = operator(*args)
            ctx.save_for_backward(*save(args, result))
            return result

        def call_backward(ctx: Any, *grads: Tensor) -> Any:
            return backward(ctx.needs_input_grad, ctx.saved_tensors, *grads)

        # Named after the operator, as its node is in the graph of autograd.
        methods = {"forward": staticmethod(forward), "backward": staticmethod(call_backward)}
        function: Any = type(self.name, (torch.autograd.Function,), methods)
        self._differentiable = function.apply
        lib.impl(self.name, function.apply, "Autograd")


def _to_meta(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
