"""Decides which native modules are built here, and says why the others are not."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MODULES = ("cpu", "cuda")
MINIMUM_TORCH = (2, 11)
ENVIRONMENT_VARIABLE = "CZM_FUSED_BUILD"
INSTALLED_TOOLKITS = Path("/usr/local")

# What must be built for each value of the environment variable; the rest is built if it can be.
REQUIRED = {"auto": (), "none": (), "cpu": ("cpu",), "cuda": ("cpu", "cuda")}

# Undoes what -ffast-math and -Ofast ask for, when it comes after them.
STRICT_MATH = (
    "-fno-fast-math",
    "-fno-unsafe-math-optimizations",
    "-fno-associative-math",
    "-fno-reciprocal-math",
    "-fno-finite-math-only",
    "-fsigned-zeros",
)


@dataclass(frozen=True)
class Surroundings:
    """What a build finds around itself.

    Attributes:
        requested: value of `CZM_FUSED_BUILD`.
        compiler: the C++ compiler, as it describes itself, None if there is none.
        torch: version of the torch to build against, None if none can be imported.
        torch_cuda: version of CUDA that torch was built with, None for a torch without CUDA.
        cuda_home: root of the CUDA toolkit, None if there is none.
        nvcc: version of the toolkit's nvcc.
        cuda_sources: whether `csrc/cuda` holds kernels.
    """

    requested: str
    compiler: str | None
    torch: str | None
    torch_cuda: str | None
    cuda_home: Path | None
    nvcc: str | None
    cuda_sources: bool


def version_tuple(version: str) -> tuple[int, int]:
    """Return (major, minor) of a version such as `2.11.0+cu130`."""
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    return int(major), int(minor)


def supports_torch(version: str) -> bool:
    """Return whether the sources compile against this version of torch."""
    return version_tuple(version) >= MINIMUM_TORCH


def requested_build() -> str:
    """Return the value of `CZM_FUSED_BUILD`.

    Raises:
        SystemExit: the value is none of auto, none, cpu and cuda.
    """
    requested = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if requested not in REQUIRED:
        raise SystemExit(
            f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(REQUIRED)}, but was {requested!r}"
        )
    return requested


def find_compiler() -> str | None:
    """Return the C++ compiler that torch's build helper will call, as it describes itself.

    None if it is not there.

    Raises:
        SystemExit: CXX is not a command line.
    """
    named = os.environ.get("CXX") or "c++"
    try:
        command = shlex.split(named)
    except ValueError as error:
        raise SystemExit(
            f"CXX must be a command, but was {named!r} ({error}); correct its quotes"
        ) from None
    if not command or shutil.which(command[0]) is None:
        return None
    answer = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return next(iter(answer.stdout.splitlines()), command[0])


def is_cuda_toolkit(root: Path) -> bool:
    """Return whether a folder holds both the CUDA compiler and its headers.

    One alone is not enough: an nvcc on PATH may be a wrapper outside its toolkit, and torch's own
    dependencies bring headers without a compiler.
    """
    return (root / "bin/nvcc").is_file() and (root / "include/cuda_runtime.h").is_file()


def nvcc_version(cuda_home: Path) -> str | None:
    """Return the release of a toolkit's nvcc, such as `13.0`, None if it cannot be run."""
    try:
        answer = subprocess.run(
            [cuda_home / "bin/nvcc", "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release (\d+\.\d+)", answer.stdout)
    return release[1] if release and answer.returncode == 0 else None


def find_cuda_home(torch_cuda: str) -> Path | None:
    """Return the CUDA toolkit to build with, preferring one of the same major version as torch's.

    A toolkit whose nvcc cannot be run comes last. `CUDA_HOME` (or `CUDA_PATH`), where it is set, is
    the only candidate.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        candidates = [Path(named)]
    else:
        folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
        on_path = [shutil.which("nvcc", path=folder) for folder in folders if folder]
        candidates = [Path(nvcc).resolve().parents[1] for nvcc in on_path if nvcc]
        candidates.append(INSTALLED_TOOLKITS / "cuda")
        candidates += sorted(INSTALLED_TOOLKITS.glob("cuda-*"), reverse=True)
    toolkits = [root for root in dict.fromkeys(candidates) if is_cuda_toolkit(root)]
    versions = {root: nvcc_version(root) for root in toolkits}
    major = version_tuple(torch_cuda)[0]
    running = [root for root in toolkits if versions[root]]
    matching = [root for root in running if version_tuple(versions[root])[0] == major]
    return next(iter(matching or running or toolkits), None)


def default_architectures(nvcc: str) -> str:
    """Return the GPU architectures to compile for where TORCH_CUDA_ARCH_LIST is not set."""
    # Blackwell (10.0 in data centres, 12.0 in workstations) is known to nvcc since 12.8.
    return "8.0;9.0;10.0;12.0+PTX" if version_tuple(nvcc) >= (12, 8) else "8.0;9.0+PTX"


def architecture_list(named: str) -> str:
    """Return the architectures of a TORCH_CUDA_ARCH_LIST such as `8.0;9.0+PTX`, comma-separated.

    Empty if it names some by their marketing names: what the binary holds is then not known.
    """
    names = [name for name in re.split(r"[;,\s]+", named) if name]
    known = all(re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", name) for name in names)
    return ",".join(names) if known else ""


def obstacles(found: Surroundings) -> dict[str, str | None]:
    """Say for each native module why it cannot be built, or None where it can."""
    cpu = _cpu_obstacle(found)
    return {"cpu": cpu, "cuda": cpu or _cuda_obstacle(found)}


def _cpu_obstacle(found: Surroundings) -> str | None:
    if found.requested == "none":
        return f"{ENVIRONMENT_VARIABLE}=none"
    if found.compiler is None:
        return "no C++ compiler found; install one, or name it in CXX"
    if found.torch is None:
        return "torch cannot be imported by the build; install torch first"
    if not supports_torch(found.torch):
        return f"torch {found.torch} is older than {'.'.join(map(str, MINIMUM_TORCH))}"
    return None


def _cuda_obstacle(found: Surroundings) -> str | None:
    if found.requested == "cpu":
        return f"{ENVIRONMENT_VARIABLE}=cpu"
    if not found.cuda_sources:
        return "csrc/cuda holds no kernels"
    if found.torch_cuda is None:
        return f"torch {found.torch} is built without CUDA"
    if found.cuda_home is None:
        return (
            "no CUDA toolkit found, with both bin/nvcc and include/cuda_runtime.h; "
            "install one, or name it in CUDA_HOME"
        )
    if found.nvcc is None:
        return (
            f"nvcc in {found.cuda_home} cannot be run; reinstall that toolkit, or name another in "
            "CUDA_HOME"
        )
    if version_tuple(found.nvcc)[0] != version_tuple(found.torch_cuda)[0]:
        return (
            f"nvcc in {found.cuda_home} is {found.nvcc}, but torch {found.torch} needs "
            f"CUDA {version_tuple(found.torch_cuda)[0]}; name such a toolkit in CUDA_HOME"
        )
    return None


def report(found: Surroundings, unbuilt: dict[str, str], architectures: str | None) -> str:
    """Return the block that says what was built, with what, and why the rest was not.

    Args:
        found: the build's surroundings.
        unbuilt: the reason for each module that was not built.
        architectures: the GPU architectures the CUDA module was compiled for.
    """
    built_with = {
        "cpu": f"{found.compiler}, torch {found.torch}",
        "cuda": f"nvcc {found.nvcc} for {architectures}, torch {found.torch}",
    }
    lines = [f"czm-fused native modules ({ENVIRONMENT_VARIABLE}={found.requested})"]
    for module in MODULES:
        outcome = (
            f"not built: {unbuilt[module]}"
            if module in unbuilt
            else f"built with {built_with[module]}"
        )
        lines.append(f"  _C_{module}: {outcome}")
    return "\n".join(lines)
