"""How tests import the scripts of benchmarks/, which a source distribution may lack."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark_script(monkeypatch):
    """Return what imports a module of benchmarks/ by its name."""
    if not (BENCHMARKS / "common").exists():
        pytest.skip("no benchmarks beside the tests")
    pytest.importorskip("tyro")
    pytest.importorskip("pandas")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module
