"""Triton's interpreter in a process of its own, because Triton asks for it when it decorates.

As a script, it is that process.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1]


def obstacle() -> str | None:
    """Say why Triton cannot interpret here, or None."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


class Interpreter:
    """The process."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CZM_FUSED_BACKEND": "triton",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        }
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        atexit.register(self._process.kill)

    def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Call a function of the interpreting process.

        What it changes in the memory of tensors, it changes here as well.

        Args:
            name: of the function, `module:function` or `torch.ops.czm_fused:operator`.
            arguments: of the function; tensors on the CPU.

        Raises:
            RuntimeError: the function raised; what it raised, as text.
        """
        pipes = self._process.stdin, self._process.stdout
        assert pipes[0] is not None and pipes[1] is not None
        _send(pipes[0], (name, arguments, named))
        result, storages, problem = _receive(pipes[1])
        if problem is not None:
            raise RuntimeError(problem)
        for tensor, storage in zip(_tensors(arguments), storages, strict=True):
            tensor.untyped_storage().copy_(storage.untyped_storage())
        return result


@functools.cache
def interpreter() -> Interpreter:
    """Return the process, started at the first call."""
    return Interpreter()


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _send(pipe: BinaryIO, value: Any) -> None:
    buffer = io.BytesIO()
    # With the whole storage of each tensor, its guards too, and where in it the tensor begins.
    torch.save(value, buffer)
    pipe.write(len(buffer.getbuffer()).to_bytes(8, "little"))
    pipe.write(buffer.getbuffer())
    pipe.flush()


def _receive(pipe: BinaryIO) -> Any:
    size = pipe.read(8)
    if len(size) < 8:
        raise RuntimeError("the process of Triton's interpreter has ended")
    return torch.load(io.BytesIO(pipe.read(int.from_bytes(size, "little"))), weights_only=False)


def _mend() -> None:
    """Make the interpreter as strict about hints, and as exact in rounding, as a GPU is."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    set_attr, cast = TensorHandle.set_attr, InterpreterBuilder.cast_impl

    def checked(handle: Any, name: str, values: Sequence[int]) -> None:
        # A wrong hint faults on a GPU, or reads other elements, and there alone. In groups of as
        # many elements as the hint says, the first of each is a multiple of that.
        groups = handle.data.reshape(-1, min(values[0], handle.data.size))
        if name == "tt.divisibility":
            assert (groups[:, 0] % values[0] == 0).all(), f"{groups} for a multiple of {values}"
        elif name == "tt.contiguity":
            assert (groups == groups[:, :1] + np.arange(values[0])).all(), f"{groups}"
        elif name == "tt.constancy":
            assert (groups == groups[:, :1]).all(), f"{groups}"
        set_attr(handle, name, values)

    def rounded(builder: Any, source: Any, dtype: Any) -> Any:
        # The interpreter truncates to bfloat16, where every GPU rounds to nearest even.
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(builder, source, dtype)
        values = torch.from_numpy(source.data.copy()).to(torch.bfloat16)
        return TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)

    TensorHandle.set_attr = checked
    InterpreterBuilder.cast_impl = rounded
    InterpreterBuilder.create_fp_to_fp = lambda builder, source, dtype, mode: rounded(
        builder, source, dtype
    )


def _function(name: str) -> Callable[..., Any]:
    where, _, function = name.partition(":")
    if where.startswith("torch.ops."):
        importlib.import_module("czm_fused.ops.step")
        return getattr(getattr(torch.ops, where.removeprefix("torch.ops.")), function)
    return getattr(importlib.import_module(where), function)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    # What a kernel prints must not be taken for an answer.
    os.dup2(2, 1)
    _mend()
    # torch.empty filled with NaN, so that an element that nobody wrote shows.
    torch.use_deterministic_algorithms(True)
    while True:
        try:
            name, arguments, named = _receive(sys.stdin.buffer)
        except (RuntimeError, pickle.UnpicklingError):
            return
        result, problem = None, None
        try:
            result = _function(name)(*arguments, **named)
        except BaseException:
            problem = traceback.format_exc()
        _send(answers, (result, _tensors(arguments), problem))


if __name__ == "__main__":
    # Not this file's folder, but the tests'.
    sys.path[0] = str(TESTS)
    _serve()
