"""The package's types, as the strict mypy run of a program that uses it meets them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import czm_fused

pytest.importorskip("mypy")


def test_a_strict_run_without_our_configuration(tmp_path):
    """Errors within the package count, as they do for an editable installation."""
    shutil.copy(Path(__file__).parent / "typing" / "usage.py", tmp_path)
    package = Path(czm_fused.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "usage.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(package)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
