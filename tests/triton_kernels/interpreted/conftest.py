"""What every interpreted test watches, and what it mends."""

import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@pytest.fixture(autouse=True)
def hints_are_true(monkeypatch):
    """A wrong hint of alignment faults on a GPU, and there alone."""
    set_attr = TensorHandle.set_attr

    def checked(handle, name, values):
        if name == "tt.divisibility":
            assert (handle.data % values[0] == 0).all(), f"{handle.data} for a multiple of {values}"
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
