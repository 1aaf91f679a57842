"""Find out which convolutions feed which BatchNorm, by running a model on an example input."""

# torch is typed in part.
# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from czm_fused.example import hooked, preserved, run_example
from czm_fused.init import CONVOLUTIONS

OUTPUT = "the output of the model"
"""The consumer of what the model returns."""

KEPT = "something that outlives the forward pass"
"""The consumer of a tensor that is still alive after the forward pass, but is not returned."""

KEEPS_NOTHING = ("cat", "add")
"""Operators whose results are new memory that autograd does not keep for them."""

MIXING = re.compile(r"conv|attention|linear|^(addmm|mm|addbmm|baddbmm|bmm|addmv|mv|dot|addr)")
"""Operators that sum products over features; all others apply a parameter elementwise."""

NORMALISING = re.compile(r"(batch|layer|group|instance|rms)_norm")
"""Operators that normalise."""


@dataclass(eq=False)
class Value:
    """One tensor of a forward pass.

    Attributes:
        producers: the dotted names of the modules with weights that it was computed from; what
            those had as input does not count.
        scales: the dotted names of the modules whose parameters it is computed from alone, where
            those have one dimension longer than 1 at most, such as a scale of shape (C, 1, 1).
        is_convolution: it is the output of its one producer, a convolution.
        is_fresh: nothing else shares its memory, nor does autograd keep it for what computed it.
        consumers: the BatchNorms, by dotted name, and the operators that read it.
        changed: an operator wrote to it in place; to an output of a convolution, a BatchNorm or a
            ReLU6, also through another tensor that shares its memory.
    """

    producers: frozenset[str] = frozenset()
    scales: frozenset[str] = frozenset()
    is_convolution: bool = False
    is_fresh: bool = False
    consumers: set[str] = field(default_factory=set)
    changed: bool = False


@dataclass
class DataFlow:
    """The flow of tensors through a model, as far as convolutions and BatchNorms are concerned.

    Attributes:
        convolutions: the outputs of every convolution that ran, by its dotted name, in the order
            of their first runs.
        norms: input and output of every run of every BatchNorm, by its dotted name.
        activations: the outputs of every ReLU6 that ran, by its dotted name.
        tied: the convolutions whose parameters something else reads as well.
        reads: the attributes of a BatchNorm that something else reads, by its dotted name.
        functional: the normalising operators that ran in a module, by its dotted name.
        notes: in words, what could not be seen.
    """

    convolutions: dict[str, list[Value]] = field(default_factory=dict)
    norms: dict[str, list[tuple[Value, Value]]] = field(default_factory=dict)
    activations: dict[str, list[Value]] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)
    reads: dict[str, set[str]] = field(default_factory=dict)
    functional: dict[str, set[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def follow(model: nn.Module, example_input: Any) -> DataFlow:
    """Follow the tensors of `model` through a forward pass, and leave the model as it was.

    The pass is followed twice, in eval mode and in training mode, as some networks have heads that
    train only; BatchNorms stay in eval mode. Should it fail in training mode alone, a note says so.

    Args:
        model: the network.
        example_input: a tensor, a tuple of positional or a dictionary of keyword arguments.

    Raises:
        ValueError: the model fails on `example_input` in eval mode.
    """
    flow = DataFlow()
    recorder = _Recorder(model, flow)
    with preserved(model):
        try:
            recorder.record(example_input, training=False)
        except Exception as error:
            raise ValueError(
                "model must run on example_input in eval mode, but raised "
                f"{type(error).__name__}: {error}; pass a batch as the model takes it"
            ) from error
    with preserved(model):
        try:
            recorder.record(example_input, training=True)
        except Exception as error:
            flow.notes.append(
                "what runs in training mode alone was not seen, as the forward pass failed there "
                f"({type(error).__name__}: {error})"
            )
    return flow


class _Recorder(TorchDispatchMode):
    """Follows the tensors through the operators of a forward pass."""

    def __init__(self, model: nn.Module, flow: DataFlow) -> None:
        super().__init__()
        self.model = model
        self.flow = flow
        self.names = {module: name for name, module in model.named_modules()}
        self.norms = [module for module in self.names if isinstance(module, _BatchNorm)]
        self.holders: dict[int, nn.Module] = {}
        for module in self.names:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self.holders.setdefault(id(tensor), module)
        self.values = WeakTensorKeyDictionary()
        self.outputs: list[tuple[StorageWeakRef, Value]] = []
        self.running: list[nn.Module] = []

    def record(self, example_input: Any, training: bool) -> None:
        # Models may override train(), and read their BatchNorms there.
        with self._watched_norms():
            self.model.train(training)
        for norm in self.norms:
            norm.eval()
        self.running.clear()
        self.outputs.clear()
        hooks = []
        for module in self.names:
            hooks.append(module.register_forward_pre_hook(self._enter))
            hooks.append(module.register_forward_hook(self._leave, with_kwargs=True))
        with hooked(hooks), self._watched_norms(), self:
            result = run_example(self.model, example_input)
        for tensor in _tensors(result):
            self._value(tensor).consumers.add(OUTPUT)
        # The result is still held here, so memory that only it shares counts as kept as well:
        # pytree does not look into every object that a model returns.
        for storage, value in self.outputs:
            if OUTPUT not in value.consumers and not storage.expired():
                value.consumers.add(KEPT)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        running = self.running[-1] if self.running else self.model
        consumer = self.names[running] if isinstance(running, _BatchNorm) else name
        if NORMALISING.search(name):
            self.flow.functional.setdefault(self.names[running], set()).add(name)
        inputs = []
        for tensor in _tensors((args, kwargs)):
            inputs.append(self._value(tensor))
            self._note_reader(tensor, running)
        producers = frozenset[str]().union(*(value.producers for value in inputs))
        scales = frozenset[str]().union(*(value.scales for value in inputs))
        if MIXING.search(name):
            producers |= scales
        if producers or not all(value.scales for value in inputs):
            scales = frozenset()
        for value in inputs:
            value.consumers.add(consumer)
        for tensor in _tensors(result):
            before = self.values.get(tensor)
            if before is not None:
                before.changed = True
                self._note_change(tensor)
            self.values[tensor] = Value(producers, scales, is_fresh=_is_fresh(name, before))
        return result

    def _value(self, tensor: Tensor) -> Value:
        if tensor not in self.values:
            holder = self.holders.get(id(tensor))
            if holder is None or not isinstance(tensor, nn.Parameter):
                self.values[tensor] = Value()
            else:
                name = frozenset([self.names[holder]])
                scales = sum(length > 1 for length in tensor.shape) < 2
                self.values[tensor] = Value(scales=name) if scales else Value(name)
        value: Value = self.values[tensor]
        return value

    def _note_output(self, output: Tensor, value: Value) -> None:
        self.outputs.append((StorageWeakRef(output.untyped_storage()), value))

    def _note_change(self, tensor: Tensor) -> None:
        changed = StorageWeakRef(tensor.untyped_storage())
        for storage, value in self.outputs:
            if storage == changed:
                value.changed = True

    def _note_reader(self, tensor: Tensor, reader: nn.Module) -> None:
        holder = self.holders.get(id(tensor))
        if holder is None or holder is reader:
            return
        if isinstance(holder, CONVOLUTIONS):
            self.flow.tied.add(self.names[holder])
        elif isinstance(holder, _BatchNorm) and not isinstance(reader, _BatchNorm):
            self.flow.reads.setdefault(self.names[holder], set())

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.running.append(module)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        # A module that raised an exception, which the model caught, has not been left.
        while self.running.pop() is not module:
            pass
        name = self.names[module]
        if isinstance(module, CONVOLUTIONS):
            value = Value(frozenset([name]), is_convolution=True, is_fresh=True)
            self.values[result] = value
            self._note_output(result, value)
            self.flow.convolutions.setdefault(name, []).append(value)
        elif isinstance(module, _BatchNorm):
            (given, *_) = _tensors((args, kwargs))
            pair = (self._value(given), self._value(result))
            self._note_output(result, pair[1])
            self.flow.norms.setdefault(name, []).append(pair)
        elif isinstance(module, nn.ReLU6):
            for tensor in _tensors(result):
                self._note_output(tensor, self._value(tensor))
                self.flow.activations.setdefault(name, []).append(self._value(tensor))

    @contextmanager
    def _watched_norms(self) -> Iterator[None]:
        """Note which attributes of a BatchNorm are read while it is not running itself."""
        kinds: dict[Any, Any] = {norm: type(norm) for norm in self.norms}
        try:
            for norm, kind in kinds.items():
                norm.__class__ = _watched(kind, self._note_attribute)
            yield
        finally:
            for norm, kind in kinds.items():
                norm.__class__ = kind

    def _note_attribute(self, norm: nn.Module, attribute: str) -> None:
        if norm not in self.running:
            self.flow.reads.setdefault(self.names[norm], set()).add(attribute)


_IDENTITY = nn.Identity()


def _watched(kind: Any, note: Callable[[nn.Module, str], None]) -> Any:
    """Return a subclass of `kind` that notes every read of what `nn.Identity` does not have."""

    class Watched(kind):
        def __getattribute__(self, name: str) -> Any:
            if not hasattr(_IDENTITY, name):
                note(self, name)
            return super().__getattribute__(name)

    Watched.__name__, Watched.__module__ = kind.__name__, kind.__module__
    return Watched


def _is_fresh(operator_name: str, before: Value | None) -> bool:
    """Return True if a result is fresh, given the value that an operator in place replaced."""
    if before is None:
        return operator_name in KEEPS_NOTHING
    in_place = operator_name.rstrip("_")
    return in_place in KEEPS_NOTHING and before.is_fresh and before.consumers <= {operator_name}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
