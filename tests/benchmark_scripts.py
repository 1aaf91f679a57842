"""How tests import the scripts of benchmarks/, which a source distribution may lack."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

needs_benchmarks = pytest.mark.skipif(
    not (BENCHMARKS / "common").exists(), reason="no benchmarks beside the tests"
)


@pytest.fixture
def benchmark_script(monkeypatch):
    """Return what imports a module of benchmarks/ by its name."""
    pytest.importorskip("tyro")
    pytest.importorskip("pandas")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module
