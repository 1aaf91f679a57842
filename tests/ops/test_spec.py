"""The one list of hyperparameters and state against the structs of the C++ kernels."""

import importlib
import re
from pathlib import Path

import pytest

from czm_fused.ops.step import spec, tensors
from helpers.step_backends import CPU

CSRC = Path(__file__).resolve().parents[2] / "csrc"
needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="the C++ sources are not here")
needs_native = pytest.mark.skipif(
    CPU.obstacle is not None, reason="the native cpu module is not built"
)


def fields(file, macro):
    """Return the names that a list of fields in a C++ header has, in order."""
    text = (CSRC / file).read_text()
    body = re.search(rf"#define {macro}\(FIELD\)((?:.*\\\n)*.*)", text)[1]
    names = []
    for macro_or_name in re.finditer(r"(CZM_STATES)\(FIELD\)|FIELD\((\w+)\)", body):
        names += fields(file, macro_or_name[1]) if macro_or_name[1] else [macro_or_name[2]]
    return tuple(names)


@needs_sources
@pytest.mark.parametrize(
    ("file", "macro", "ours"),
    [
        ("descriptors.h", "CZM_DESCRIPTOR_FIELDS", spec.DESCRIPTOR_FIELDS),
        ("descriptors.h", "CZM_STATES", spec.STATE_NAMES),
        ("update_rule.h", "CZM_HYPERPARAMETERS", spec.HYPERPARAMETER_NAMES),
    ],
)
def test_cpp_fields(file, macro, ours):
    assert fields(file, macro) == ours


@needs_native
@pytest.mark.parametrize("name", ["DESCRIPTOR_FIELDS", "HYPERPARAMETER_NAMES"])
@pytest.mark.parametrize("first", [1, 3])
def test_native_module_with_swapped_names_is_refused(name, first, monkeypatch):
    names = list(getattr(spec, name))
    names[first], names[first + 1] = names[first + 1], names[first]
    monkeypatch.setattr(tensors, name, tuple(names))
    tensors.native_module.cache_clear()
    try:
        with pytest.raises(ImportError, match=f"{names[first + 1]!r} where .* {names[first]!r}"):
            tensors.native_module()
    finally:
        tensors.native_module.cache_clear()


@pytest.mark.parametrize("name", spec.HYPERPARAMETER_NAMES)
def test_triton_reads_hyperparameters_by_the_same_index(name):
    pytest.importorskip("triton")
    rule = importlib.import_module("czm_fused.ops.step.triton_rule")
    assert getattr(rule, f"_{name.upper()}").value == spec.HYPERPARAMETER_NAMES.index(name)


@pytest.mark.parametrize("name", ["param", *spec.STATE_NAMES])
def test_triton_reads_addresses_by_the_same_index(name):
    pytest.importorskip("triton")
    kernel = importlib.import_module("czm_fused.ops.step.triton_kernel")
    names = {"momentum_buffer": "_MOMENTUM_BUFFER"}
    constant = getattr(kernel, names.get(name, f"_{name.upper()}"))
    assert constant.value == spec.FIELD[name]
