"""The Triton kernels without a GPU: their tests, run in a process where Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("file", ["test_interpreted_step.py", "test_interpreted_operators.py"])
def test_under_the_interpreter(file):
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider",
            str(Path(__file__).parent / "interpreted" / file),
        ],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CZM_FUSED_BACKEND": "triton",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    if result.returncode != 0:
        pytest.fail(f"{result.stdout}\n{result.stderr}", pytrace=False)
