"""Undo what an operation has done to a model if it fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def undone_on_error(model: nn.Module, changed: Iterable[nn.Module]) -> Iterator[None]:
    """Restore children, attributes, parameters and buffers of `model` if the block raises.

    Args:
        model: the model.
        changed: its modules the contents of whose parameters and buffers are restored as well.
    """
    tables: list[Any] = [
        table
        for module in model.modules()
        for table in (vars(module), module._modules, module._parameters, module._buffers)
    ]
    entries = [dict(table) for table in tables]
    tensors = {each for module in changed for each in (*module.parameters(), *module.buffers())}
    contents = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        for table, entry in zip(tables, entries, strict=True):
            table.clear()
            table.update(entry)
        with torch.no_grad():
            for tensor, content in contents:
                tensor.copy_(content)
        raise
