import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "cuda/shim"), str(TESTS / "ops")]

import host_kernels  # noqa: E402


@pytest.fixture(scope="session")
def build_host_kernels(request):
    """A function of a sanitizer's name (or "plain") that builds the kernels for the host."""
    reason = host_kernels.obstacle()
    if reason is not None:
        pytest.skip(f"the CUDA kernels cannot be built for the host: {reason}")
    folder = request.config.cache.mkdir("cuda_on_host")
    return lambda name: host_kernels.build(folder, name)
