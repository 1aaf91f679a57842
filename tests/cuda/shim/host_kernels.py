"""The CUDA kernels on the host: built with ninja, plain or under a sanitizer, for CPU tensors."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from czm_fused.ops.step.cuda import CudaStep
from czm_fused.ops.step.descriptors import StepTensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"

# Two warps: what blocks of any size do, quicker.
BLOCK_THREADS = 64

SANITIZERS = {
    "plain": "-O2",
    # Not optimised, since that takes longer than what it saves.
    "address": "-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined "
    "-fno-sanitize-recover=undefined",
    "thread": "-O1 -g1 -fno-omit-frame-pointer -fsanitize=thread -DCZM_TWO_KERNELS",
}

RULES = """\
builddir = {folder}
flags = -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -Wall $
  -Wno-unknown-pragmas -DCZM_BLOCK_THREADS={threads} $
  -DCZM_FILTER_THREADS={threads} -DCZM_HAS_FMA {includes}
rule compile
  command = {compiler} $flags $more -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} -shared $more $in -o $out
build blocks.o: compile {here}/blocks.cpp
  more = -O2
"""

MODULE = """\
build kernels_{name}.o: compile {here}/kernels.cpp
  more = {flags} -DCZM_HOST_MODULE=czm_host_{name}
build czm_host_{name}{suffix}: link kernels_{name}.o blocks.o
  more = {flags}
"""


def obstacle() -> str | None:
    """Say why the kernels cannot be built here, or None."""
    if shutil.which("c++") is None:
        return "no C++ compiler"
    if _ninja() is None:
        return "no ninja; pip install czm-fused[dev]"
    return None


def build(folder: Path, name: str) -> Path:
    """Build all of `SANITIZERS` in `folder`, at once, and return the path of `czm_host_<name>`."""
    includes = [HERE / "include", CSRC, Path(torch.__file__).parent / "include"]
    includes.append(Path(sysconfig.get_path("include")))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    text = RULES.format(
        folder=folder,
        threads=BLOCK_THREADS,
        includes=" ".join(f"-isystem {path}" if "torch" in str(path) else f"-I{path}"
                          for path in includes),
        compiler="c++",
        here=HERE,
    )
    for module, flags in SANITIZERS.items():
        text += MODULE.format(name=module, here=HERE, flags=flags, suffix=suffix)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(text)
    done = subprocess.run([_ninja(), "-C", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the CUDA kernels do not compile for the host:\n{done.stdout}")
    return folder / f"czm_host_{name}{suffix}"


def _ninja() -> str | None:
    beside_python = Path(sys.executable).parent / "ninja"
    return str(beside_python) if beside_python.exists() else shutil.which("ninja")


def load(path: Path) -> ModuleType:
    """Import a module that `build` has made."""
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class HostStep(CudaStep):
    """Runs the CUDA kernel's source over CPU tensors. `kernels` is what `load` returned."""

    block_threads: ClassVar[int] = BLOCK_THREADS
    kernels: ClassVar[ModuleType]
    launches: ClassVar[int] = 0

    @staticmethod
    def _run(
        table: Tensor,
        work_items: Tensor,
        grads: Tensor,
        groups: Tensor,
        group_addresses: Tensor,
        dtype: int,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        HostStep.launches += 1
        HostStep.kernels.launch_step(
            table.data_ptr(),
            work_items.data_ptr(),
            len(work_items),
            grads.data_ptr(),
            len(grads),
            groups.data_ptr(),
            group_addresses.data_ptr(),
            len(groups),
            dtype,
            0 if grad_scale is None else grad_scale.data_ptr(),
            0 if found_inf is None else found_inf.data_ptr(),
        )


def make_host_runner(
    backend: str, tensors: Sequence[StepTensor | None], device: torch.device
) -> tuple[HostStep, np.ndarray]:
    """Stand in for `czm_fused.ops.step.plan.make_runner`."""
    step = HostStep(tensors, device)
    return step, step.descriptors
