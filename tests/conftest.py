"""What tests share: the processors, the scripts of benchmarks/ where there are any, sharding."""

import importlib
import os
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def pytest_configure():
    """Share the processors out among the workers of pytest-xdist, and what they start."""
    # Threads that wait for one another keep a processor, which another worker's need.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


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
