"""The PTX of the CUDA kernels, by nvcc."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from ptx.parsing import Kernel

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURE = "sm_90"
_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-ptx")

# Every kernel that a launch of the step can choose.
STEP = """
#include "cuda/step_launch.h"
namespace czm {
void launch(const StepLaunch& step) {
  choose_kernel(step, [](auto kernel, const auto& arguments, int shared_bytes) {
    kernel<<<1, kThreads, shared_bytes>>>(arguments);
  });
}
}
"""

_DTYPES = ("float", "double", "__nv_bfloat16", "__half")
_OPERATOR = """
template __global__ void add_relu_noise_kernel<{size}, {dtype}, {division}>(
    {dtype}*, const {dtype}*, const {dtype}*,
    const Noise<opmath_type<{dtype}>, {division}>, int64_t);
template __global__ void add_relu_noise_backward_kernel<{size}, {dtype}, {division}>(
    {dtype}*, const {dtype}*, const {dtype}*,
    const Noise<opmath_type<{dtype}>, {division}>, int64_t);
"""
_FILTER_OPERATOR = """
template __global__ void exp_scale_kernel<{size}, {dtype}>(
    {dtype}*, const {dtype}*, const opmath_type<{dtype}>*, int64_t);
template __global__ void exp_scale_backward_kernel<{size}, {dtype}>(
    {dtype}*, opmath_type<{dtype}>*, const {dtype}*, const {dtype}*,
    const opmath_type<{dtype}>*, int64_t);
"""
OPERATORS = "\n".join(
    [
        '#include "cuda/add_relu_noise_kernel.cuh"',
        '#include "cuda/exp_scale_kernel.cuh"',
        "namespace czm {",
        *(
            text
            for dtype in _DTYPES
            for size in ("1", f"kWidest<{dtype}>")
            for text in (
                *(
                    _OPERATOR.format(size=size, dtype=dtype, division=division)
                    for division in ("Divider", "WideDivider")
                ),
                _FILTER_OPERATOR.format(size=size, dtype=dtype),
            )
        ),
        "}",
    ]
)


def obstacle() -> str | None:
    """Say why nvcc cannot compile the kernels here, or None."""
    if not CSRC.exists():
        return "there is no csrc beside the tests"
    return None if nvcc() else "there is no nvcc"


def nvcc() -> str | None:
    """Return the compiler, which need not be on the path."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@functools.cache
def compiled(source: str) -> str:
    """Return the PTX of `source`, CUDA C++ that may include the files of csrc."""
    files = {path.relative_to(CSRC): path.read_text() for path in CSRC.rglob("*.*h")}
    flags = [*_FLAGS, f"-arch={ARCHITECTURE}"]
    key = hashlib.sha256(repr((source, flags, nvcc(), sorted(files.items()))).encode()).hexdigest()
    # Compiling takes longer than most tests, so that sessions share what it made.
    kept = Path(tempfile.gettempdir()) / "czm_fused_ptx" / f"{key}.ptx"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for path, text in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text)
            (folder / "kernels.cu").write_text(source)
            command = [nvcc(), *flags, "-I", name, "-o", "kernels.ptx", "kernels.cu"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"the CUDA kernels do not compile:\n{done.stderr}")
            kept.parent.mkdir(exist_ok=True)
            made = (folder / "kernels.ptx").read_text()
            partial = kept.with_suffix(f".{folder.name}")
            partial.write_text(made)
            partial.replace(kept)
    return kept.read_text()


@functools.cache
def kernel(text: str, *parts: str) -> Kernel:
    """Return the one entry of a module whose name has all of `parts`."""
    names = [name for name in Kernel.names(text) if all(part in name for part in parts)]
    if len(names) != 1:
        raise ValueError(f"{len(names)} entries have {parts}: {names}")
    return Kernel(text, names[0])
