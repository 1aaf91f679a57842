"""The CUDA kernels on the host: built with ninja, plain or under a sanitizer, for CPU tensors."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

# Two warps do what blocks of any size do, and quicker; eight form all groups that the GPU forms.
SMALL_BLOCK, WHOLE_BLOCK = 64, 256


@dataclass(frozen=True)
class Variant:
    """How the kernels are built.

    Attributes:
        flags: of the compiler.
        threads: of a block.
    """

    flags: str
    threads: int = SMALL_BLOCK


VARIANTS = {
    "small": Variant("-O2"),
    "whole": Variant("-O2", WHOLE_BLOCK),
    # Not optimised, since that takes longer than what it saves.
    "address": Variant(
        "-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined "
        "-fno-sanitize-recover=undefined"
    ),
    "thread": Variant("-O1 -g1 -fno-omit-frame-pointer -fsanitize=thread -DCZM_TWO_KERNELS"),
}

RULES = """\
builddir = {folder}
flags = -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -Wall $
  -Wno-unknown-pragmas -DCZM_HAS_FMA {includes}
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
  more = {flags} -DCZM_HOST_MODULE=czm_host_{name} -DCZM_BLOCK_THREADS={threads} $
    -DCZM_FILTER_THREADS={threads}
build czm_host_{name}{suffix}: link kernels_{name}.o blocks.o
  more = {flags}
"""


def obstacle() -> str | None:
    """Say why the kernels cannot be built here, or None."""
    if not CSRC.exists():
        return "there is no csrc beside the tests"
    if shutil.which("c++") is None:
        return "there is no C++ compiler"
    if _ninja() is None:
        return "there is no ninja; pip install czm-fused[dev]"
    return None


@functools.cache
def build(name: str) -> Path:
    """Build `czm_host_<name>`, one of `VARIANTS`, and return its path."""
    includes = [HERE / "include", CSRC, Path(torch.__file__).parent / "include"]
    includes.append(Path(sysconfig.get_path("include")))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folder = _folder()
    text = RULES.format(
        folder=folder,
        includes=" ".join(
            f"-isystem {path}" if "torch" in str(path) else f"-I{path}" for path in includes
        ),
        compiler="c++",
        here=HERE,
    )
    for module, variant in VARIANTS.items():
        text += MODULE.format(
            name=module, here=HERE, flags=variant.flags, threads=variant.threads, suffix=suffix
        )
    target = f"czm_host_{name}{suffix}"
    with _locked(folder):
        (folder / "build.ninja").write_text(text)
        command = [_ninja(), "-C", str(folder), target]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the CUDA kernels do not compile for the host:\n{done.stdout}")
    return folder / target


def _folder() -> Path:
    """Return where this tree's modules are built, so that later sessions find them."""
    key = hashlib.sha256(repr((HERE, torch.__version__, sys.version)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"czm_fused_cuda_on_host_{key}"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process build at a time."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _ninja() -> str | None:
    beside_python = Path(sys.executable).parent / "ninja"
    return str(beside_python) if beside_python.exists() else shutil.which("ninja")


def load(path: Path) -> ModuleType:
    """Import a module that `build` has made."""
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def kernels(name: str) -> ModuleType:
    """Return the kernels of a variant, built and imported."""
    return load(build(name))
