"""The ends of residual branches, read off autograd's graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from czm_fused.example import call, hooked

KEEPS_SCALE = (
    "Adaptive", "Alias", "AsStrided", "Avg", "Clone", "ConstantPad", "Div", "Elu", "Expand",
    "Gelu", "Hardswish", "LeakyRelu", "MaxPool", "Mean", "Mish", "Mul", "NativeDropout", "Permute",
    "Relu", "Reshape", "Silu", "Slice", "Squeeze", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze",
    "Upsample", "View", "_MultiplyByNoise", "_ReLU6",
)  # fmt: skip
"""Autograd nodes of one operand that pass the scale of a convolution's output on."""


def branch_ends(
    model: nn.Module, convolutions: Mapping[str, nn.Module], example_input: Any
) -> set[str]:
    """Return the names of the convolutions whose output is added to a shortcut.

    They are read off autograd's graph of a pass over two samples, or over all where the model does
    not take two; what cannot be read there, as within a scripted module, is not found. Of the two
    operands of a sum, the branch is the one with more convolutions between it and the input; with
    equally many, there is none.

    Args:
        model: the network, in the mode to run it in.
        convolutions: its convolutions by their dotted names.
        example_input: a tensor, a tuple of positional or a dictionary of keyword arguments.

    Raises:
        Exception: what the model raises in a pass with gradients.
    """
    try:
        output, owners = _with_graph(model, convolutions, _two_samples(example_input))
    except Exception:
        # What was taken for samples may be the channels of images in a list.
        output, owners = _with_graph(model, convolutions, example_input)
    leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    order = _inputs_first([leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None])
    depths: dict[Any, int] = {}
    for node in order:
        below = (depths[operand] for operand in _operands(node))
        depths[node] = max(below, default=0) + (node in owners)
    ends = set()
    for node in order:
        operands = _operands(node)
        if not _is_sum(node) or len(operands) != 2:
            continue
        shortcut, branch = sorted(operands, key=depths.__getitem__)
        end = _source(branch, owners)
        if end is not None and depths[shortcut] < depths[branch] and not _is_leaf(shortcut):
            ends.add(end)
    return ends


def _with_graph(
    model: nn.Module, convolutions: Mapping[str, nn.Module], example_input: Any
) -> tuple[Any, dict[Any, str]]:
    """Return the output of `model`, and the convolutions by the nodes that they end in."""
    owners: dict[Any, str] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                owners[output.grad_fn] = name

        return hook

    hooks = [each.register_forward_hook(note(name)) for name, each in convolutions.items()]
    with hooked(hooks), torch.enable_grad():
        return call(model, _differentiable(example_input)), owners


def _source(node: Any, owners: Mapping[Any, str]) -> str | None:
    """Return the convolution that `node` takes its scale from, if it is one and close by."""
    while node not in owners:
        if not node.name().startswith(KEEPS_SCALE) and "add_relu" not in _snake_case(node.name()):
            return None
        operands = _operands(node)
        if len(operands) == 2 and node.name().startswith("Mul"):
            # One operand is a gate, which ends in a sigmoid.
            sources = {_source(operand, owners) for operand in operands} - {None}
            return sources.pop() if len(sources) == 1 else None
        if len(operands) != 1:
            return None
        node = operands[0]
    return owners[node]


def _is_sum(node: Any) -> bool:
    name: str = node.name()
    return name.startswith(("AddBackward", "SubBackward")) or "add_relu" in _snake_case(name)


def _is_leaf(node: Any) -> bool:
    return bool(node.name().endswith("AccumulateGrad"))


def _snake_case(name: str) -> str:
    """Return the name of a custom operator's node in one spelling, whoever registered it."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name)


def _operands(node: Any) -> list[Any]:
    return [operand for operand, _ in node.next_functions if operand is not None]


def _inputs_first(roots: list[Any]) -> list[Any]:
    """Return the nodes below `roots`, each after those that it is computed from."""
    order: list[Any] = []
    seen = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, has_operands_in_order = stack.pop()
        if has_operands_in_order:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(operand, False) for operand in _operands(node)]
    return order


def _two_samples(example_input: Any) -> Any:
    tensors = [x for x in tree_leaves(example_input) if isinstance(x, Tensor)]
    if len({x.shape[:1] for x in tensors}) > 1:
        return example_input
    return tree_map(lambda x: x[:2] if isinstance(x, Tensor) and x.dim() else x, example_input)


def _differentiable(example_input: Any) -> Any:
    def copy(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            # A leaf must not be changed in place, which a model may do to its input.
            return x.detach().requires_grad_().clone()
        return x

    return tree_map(copy, example_input)
