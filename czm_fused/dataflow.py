"""Which convolutions feed which BatchNorm: found by running a model, or by torch.fx without."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from czm_fused.example import preserved, run_example
from czm_fused.init import CONVOLUTIONS

OUTPUT = "the output of the model"
"""The consumer of what the model returns."""

KEEPS_NOTHING = ("cat", "add")
"""Operators whose results are new memory that autograd does not keep for them."""


@dataclass(eq=False)
class Value:
    """One tensor of a forward pass.

    Attributes:
        producers: the modules with weights of two or more dimensions that it was computed from,
            each by its dotted name; what those had as input does not count.
        is_convolution: it is the output of its one producer, a convolution.
        is_fresh: nothing else shares its memory, nor does autograd keep it for what computed it.
        consumers: the BatchNorms, by dotted name, and the operators that read it.
        changed: an operator wrote to it in place.
    """

    producers: frozenset[str] = frozenset()
    is_convolution: bool = False
    is_fresh: bool = False
    consumers: set[str] = field(default_factory=set)
    changed: bool = False


@dataclass
class DataFlow:
    """What a model computes from what, as far as convolutions and BatchNorms are concerned.

    Attributes:
        convolutions: the outputs of every convolution that ran, by its dotted name, in the order
            of their first runs.
        norms: input and output of every run of every BatchNorm, by its dotted name.
        tied: the convolutions whose parameters something else reads as well.
        notes: in words, what could not be seen.
    """

    convolutions: dict[str, list[Value]] = field(default_factory=dict)
    norms: dict[str, list[tuple[Value, Value]]] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def follow(model: nn.Module, example_input: Any = None) -> DataFlow:
    """Follow the tensors of `model` through a forward pass, and leave the model as it was.

    The pass is followed twice, in eval mode and in training mode, as some networks have heads that
    train only; BatchNorms stay in eval mode. Should it fail in training mode alone, a note says so.

    Args:
        model: the network.
        example_input: a tensor, a tuple of positional or a dictionary of keyword arguments. If
            None, `torch.fx` follows the pass without running it.

    Raises:
        ValueError: there is no `example_input`, and `torch.fx` cannot follow the model.
        Exception: whatever the model raises in eval mode on `example_input`.
    """
    flow = DataFlow()
    record: Callable[[], None]
    if example_input is None:
        record = _SymbolicRecorder(model, flow).record
    else:
        record = _Recorder(model, flow, example_input).record
    with preserved(model):
        model.eval()
        try:
            record()
        except Exception as error:
            if example_input is not None:
                raise
            raise ValueError(
                "example_input must be given for this model, as torch.fx cannot follow it without "
                f"({type(error).__name__}: {error})"
            ) from error
    with preserved(model):
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        try:
            record()
        except Exception as error:
            flow.notes.append(
                "what runs in training mode alone was not seen, as the forward pass failed there "
                f"({type(error).__name__}: {error})"
            )
    return flow


class _Weights:
    """The parameters of a model by the names of the modules that hold them."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.holders: dict[int, nn.Module] = {}
        for module in self.names:
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.holders.setdefault(id(parameter), module)

    def producers(self, parameter: Tensor) -> frozenset[str]:
        """Return who holds a parameter that mixes features; those of one dimension only scale."""
        holder = self.holders.get(id(parameter))
        if holder is None or parameter.dim() < 2:
            return frozenset()
        return frozenset([self.names[holder]])

    def tied_convolution(self, parameter: Tensor, reader: nn.Module | None) -> str | None:
        """Return the convolution that holds what another module, or none, reads."""
        holder = self.holders.get(id(parameter))
        if holder is reader or not isinstance(holder, CONVOLUTIONS):
            return None
        return self.names[holder]


class _Recorder(TorchDispatchMode):
    """Follows the tensors through the operators of a pass on an example input."""

    def __init__(self, model: nn.Module, flow: DataFlow, example_input: Any) -> None:
        super().__init__()
        self.model = model
        self.flow = flow
        self.example_input = example_input
        self.weights = _Weights(model)
        self.values = WeakTensorKeyDictionary()
        self.running: list[nn.Module] = []

    def record(self) -> None:
        hooks = []
        for module in self.weights.names:
            if isinstance(module, (*CONVOLUTIONS, _BatchNorm)):
                hooks.append(module.register_forward_pre_hook(self._enter))
                leave = self._leave_norm if isinstance(module, _BatchNorm) else self._leave_conv
                hooks.append(module.register_forward_hook(leave, with_kwargs=True))
        self.running.clear()
        try:
            with self:
                result = run_example(self.model, self.example_input)
        finally:
            for hook in hooks:
                hook.remove()
        for tensor in _tensors(result):
            self._value(tensor).consumers.add(OUTPUT)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        running = self.running[-1] if self.running else None
        consumer = self.weights.names[running] if isinstance(running, _BatchNorm) else name
        producers: frozenset[str] = frozenset()
        for tensor in _tensors((args, kwargs)):
            value = self._value(tensor)
            value.consumers.add(consumer)
            producers |= value.producers
            tied = self.weights.tied_convolution(tensor, running)
            if tied is not None:
                self.flow.tied.add(tied)
        for tensor in _tensors(result):
            before = self.values.get(tensor)
            if before is not None:
                before.changed = True
            self.values[tensor] = Value(producers, is_fresh=_is_fresh(name, before))
        return result

    def _value(self, tensor: Tensor) -> Value:
        if tensor not in self.values:
            self.values[tensor] = Value(self.weights.producers(tensor))
        value: Value = self.values[tensor]
        return value

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.running.append(module)

    def _leave_conv(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        self.running.pop()
        name = self.weights.names[module]
        value = self.values[result] = Value(frozenset([name]), is_convolution=True, is_fresh=True)
        self.flow.convolutions.setdefault(name, []).append(value)

    def _leave_norm(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        self.running.pop()
        (given, *_) = _tensors((args, kwargs))
        pair = (self._value(given), self._value(result))
        self.flow.norms.setdefault(self.weights.names[module], []).append(pair)


class _SymbolicRecorder(fx.Tracer):
    """Follows the tensors through the graph that torch.fx traces."""

    def __init__(self, model: nn.Module, flow: DataFlow) -> None:
        super().__init__()
        self.model = model
        self.flow = flow
        self.weights = _Weights(model)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*CONVOLUTIONS, _BatchNorm)) or super().is_leaf_module(
            m, module_qualified_name
        )

    def record(self) -> None:
        arguments = inspect.signature(self.model.forward).parameters.values()
        defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
        values: dict[fx.Node, Value] = {}
        for node in self.trace(self.model, concrete_args=defaults).nodes:
            values[node] = self._follow(node, [values[each] for each in node.all_input_nodes])

    def _follow(self, node: fx.Node, inputs: list[Value]) -> Value:
        module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        name = OUTPUT if node.op == "output" else getattr(node.target, "__name__", str(node.target))
        consumer = self.weights.names[module] if isinstance(module, _BatchNorm) else name
        for value in inputs:
            value.consumers.add(consumer)
        before = inputs[0] if inputs and _is_in_place(node, name, module) else None
        if before is not None:
            before.changed = True
        if module is not None and isinstance(module, CONVOLUTIONS):
            name = self.weights.names[module]
            value = Value(frozenset([name]), is_convolution=True, is_fresh=True)
            self.flow.convolutions.setdefault(name, []).append(value)
            return value

        producers = frozenset[str]().union(*(value.producers for value in inputs))
        for parameter in self._parameters(node, module):
            producers |= self.weights.producers(parameter)
            tied = self.weights.tied_convolution(parameter, module)
            if tied is not None:
                self.flow.tied.add(tied)
        value = Value(producers, is_fresh=_is_fresh(name, before))
        if isinstance(module, _BatchNorm):
            self.flow.norms.setdefault(consumer, []).append((inputs[0], value))
        return value

    def _parameters(self, node: fx.Node, module: nn.Module | None) -> list[Tensor]:
        if module is not None:
            return [] if isinstance(module, _BatchNorm) else list(module.parameters())
        if node.op != "get_attr":
            return []
        attribute = operator.attrgetter(str(node.target))(self.model)
        return [attribute] if isinstance(attribute, nn.Parameter) else []


def _is_fresh(operator_name: str, before: Value | None) -> bool:
    """Say whether a result is fresh, given what was in its memory before an operator in place."""
    if before is None:
        return operator_name in KEEPS_NOTHING
    in_place = operator_name.rstrip("_").removeprefix("i")
    return in_place in KEEPS_NOTHING and before.is_fresh and before.consumers <= {operator_name}


def _is_in_place(node: fx.Node, name: str, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    augmented = getattr(node.target, "__module__", None) == "_operator" and name.startswith("i")
    return bool(node.kwargs.get("inplace")) or name.endswith("_") or augmented


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
