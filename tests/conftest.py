"""How tests import the scripts of benchmarks/, which a source distribution may lack, and shard."""

import importlib
from pathlib import Path

import pytest
import torch

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


@pytest.fixture
def fully_shard(tmp_path):
    """Return torch's function of this name, in a process group of this process alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch is built without torch.distributed, or without gloo")
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield fully_shard
    torch.distributed.destroy_process_group()
