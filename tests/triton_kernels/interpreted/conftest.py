"""What every interpreted test watches, and what it mends."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@pytest.fixture(autouse=True)
def hints_are_true(monkeypatch):
    """A wrong hint of alignment faults on a GPU, and there alone."""
    set_attr = TensorHandle.set_attr

    def checked(handle, name, values):
        # Of every group of as many as the hint says, the first is a multiple of it.
        groups = handle.data.reshape(-1, min(values[0], handle.data.size))
        if name == "tt.divisibility":
            assert (groups[:, 0] % values[0] == 0).all(), f"{groups} for a multiple of {values}"
        elif name == "tt.contiguity":
            assert (groups == groups[:, :1] + np.arange(values[0])).all(), f"{groups}"
        elif name == "tt.constancy":
            assert (groups == groups[:, :1]).all(), f"{groups}"
        set_attr(handle, name, values)

    monkeypatch.setattr(TensorHandle, "set_attr", checked)


@pytest.fixture(autouse=True)
def bfloat16_is_rounded(monkeypatch):
    """The interpreter truncates to bfloat16, where every GPU rounds to nearest even."""
    cast = InterpreterBuilder.cast_impl

    def rounded(builder, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(builder, source, dtype)
        values = torch.from_numpy(source.data.copy()).to(torch.bfloat16)
        return TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_fp_to_fp",
        lambda builder, source, dtype, rounding_mode: rounded(builder, source, dtype),
    )
