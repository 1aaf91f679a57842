"""The CUDA kernels on the host under sanitizers, and what these catch when it is planted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_on_host import build

pytestmark = pytest.mark.simulated

SCRIPT = Path(__file__).resolve().parent / "run_cases.py"

ASAN_OPTIONS = "detect_leaks=0:verify_asan_link_order=0"
TSAN_OPTIONS = "halt_on_error=1:die_after_fork=0:symbolize=0"


def runtime(library):
    """Return the sanitizer's runtime, which must be loaded before Python."""
    found = subprocess.run(
        ["c++", f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler comes without {library}")
    return found


def run_under(libraries, module, task):
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(map(runtime, libraries)),
        "ASAN_OPTIONS": ASAN_OPTIONS,
        "TSAN_OPTIONS": TSAN_OPTIONS,
        "OMP_NUM_THREADS": "1",
        # Where this process has the package from.
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    probe = [sys.executable, "-c", "pass"]
    if subprocess.run(probe, env=environment, capture_output=True).returncode != 0:
        pytest.skip(f"Python does not start with {' and '.join(libraries)} here")
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(module), task],
        env=environment,
        capture_output=True,
        text=True,
    )


def built(name):
    """Return the path of a module of the kernels."""
    reason = build.obstacle()
    if reason is not None:
        pytest.skip(f"the CUDA kernels cannot be built for the host: {reason}")
    return build.build(name)


@pytest.fixture(scope="module")
def under_address_sanitizer():
    module = built("address")
    return lambda task: run_under(("libasan.so", "libubsan.so"), module, task)


@pytest.fixture(scope="module")
def under_thread_sanitizer():
    module = built("thread")
    return lambda task: run_under(("libtsan.so",), module, task)


def test_step_has_no_address_or_undefined_behaviour_errors(under_address_sanitizer):
    run = under_address_sanitizer("matrix")
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.endswith("done\n")
    assert "runtime error" not in run.stderr


def test_a_read_beyond_a_tensor_is_caught(under_address_sanitizer):
    run = under_address_sanitizer("overread")
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr
    assert "READ of size" in run.stderr


def test_step_has_no_races_but_has_one_without_any_of_its_barriers(under_thread_sanitizer):
    run = under_thread_sanitizer("barriers")
    assert run.returncode == 0 and run.stdout.endswith("done\n"), run.stderr[-4000:]
    results = [line for line in run.stdout.splitlines() if "without barrier" in line]
    missed = [line for line in results if line.endswith("missed")]
    assert len(results) > 30 and not missed, missed
