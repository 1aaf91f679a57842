"""Chooses the implementation that runs an operator, and explains why another cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

BACKENDS = ("cpu", "cuda", "triton", "reference")
ENVIRONMENT_VARIABLE = "CZM_FUSED_BACKEND"

_log = logging.getLogger("czm_fused")

_PREFERENCE = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
    "meta": ("reference",),
}
# ROCm's devices are "cuda" to torch.
_TRITON_DEVICES = ("cuda", "xpu")
_PREFERENCE_ELSEWHERE = ("triton", "reference")
# Filters of 20,480 weights take 80 KB of a block's shared memory; a device before it has 64 KB.
_LEAST_CAPABILITY = (8, 0)
_BUILD_REMEDY = "reinstall with CZM_FUSED_BUILD={0}, which prints why it cannot build it"
_PACKAGE = Path(__file__).resolve().parents[1]


def choose(device: torch.device, requested: str | None = None) -> str:
    """Return the backend that runs an operator on `device`, with its native module loaded.

    Args:
        device: where the tensors are.
        requested: `"auto"`, one of `BACKENDS`, or None for the environment variable
            `CZM_FUSED_BACKEND` (itself `"auto"` by default). `"auto"` takes the fastest backend
            that can run and logs, once, why it passes over a faster one.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: a backend asked for by name cannot run here; the message says the remedy.
    """
    if requested is None or requested == "auto":
        requested = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    return _choose(device.type, _capability(device.type, device.index), requested)


@functools.cache
def _choose(device_type: str, capability: tuple[int, int] | None, requested: str) -> str:
    if requested == "auto":
        for backend in _PREFERENCE.get(device_type, _PREFERENCE_ELSEWHERE):
            reason = _problem(backend, device_type, capability)
            if reason is None:
                return backend
            _log.warning("backend %s is not used on %s: %s", backend, device_type, reason)
    if requested not in BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(('auto', *BACKENDS))}, but was {requested!r}"
        )
    reason = _problem(requested, device_type, capability)
    if reason is not None:
        raise RuntimeError(f"backend {requested!r} cannot run on {device_type} tensors: {reason}")
    return requested


def problem(backend: str, device_type: str) -> str | None:
    """Return the reason why `backend` cannot run on the current device of a type, or None.

    To be sure that a native module loads, this loads it. Loading only adds kernels for the backend
    of that name: it does not change the backend that any operator runs on.
    """
    return _problem(backend, device_type, _capability(device_type, None))


def _problem(backend: str, device_type: str, capability: tuple[int, int] | None) -> str | None:
    if backend == "reference":
        return None
    if backend == "triton":
        if device_type == "cpu" and not interpreting_triton():
            return "triton runs CPU tensors only under its interpreter; set TRITON_INTERPRET=1"
        if device_type not in ("cpu", *_TRITON_DEVICES):
            return f"triton runs on {' and '.join(_TRITON_DEVICES)} devices, not on {device_type}"
        return _triton_problem()
    if device_type != backend:
        return f"the {backend} backend takes {backend} tensors, not {device_type}"
    reason = _native_module_problem(backend)
    if reason is None and capability is not None:
        return _capability_problem(capability)
    return reason


@functools.cache
def _native_module_problem(name: str) -> str | None:
    module = f"czm_fused._C_{name}"
    try:
        importlib.import_module(module)
    except ImportError as error:
        if importlib.util.find_spec(module) is not None:
            return f"the native {name} module does not load ({error}); {_BUILD_REMEDY.format(name)}"
        shadowed = _shadowed_package(name)
        if shadowed is not None:
            return (
                f"the native {name} module is not built in {_PACKAGE}, which shadows the installed "
                f"package {shadowed}; start Python from another folder"
            )
        return f"the native {name} module is not built; {_BUILD_REMEDY.format(name)}"
    return None


def _shadowed_package(name: str) -> Path | None:
    """Return a czm_fused later on `sys.path` that has the native module which this one lacks."""
    for entry in sys.path:
        package = Path(entry or ".").resolve() / "czm_fused"
        if package != _PACKAGE and any(package.glob(f"_C_{name}.*")):
            return package
    return None


@functools.cache
def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install czm-fused[gpu]"
    return None


@functools.cache
def _capability(device_type: str, index: int | None) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA device, None for any other device."""
    if device_type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(index)


def _capability_problem(capability: tuple[int, int]) -> str | None:
    """Return the reason why the CUDA module cannot run on a device of this capability, or None."""
    needed = "{}.{}".format(*capability)
    if capability < _LEAST_CAPABILITY:
        return f"the native cuda module needs compute capability 8.0, and the device's is {needed}"
    built_for: str = importlib.import_module("czm_fused._C_cuda").architectures
    if not built_for or any(_runs_on(name, capability) for name in built_for.split(",")):
        return None
    return (
        f"the native cuda module is built for compute capability {built_for}, and the device's is "
        f"{needed}; reinstall with TORCH_CUDA_ARCH_LIST={needed}"
    )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Return True if a binary for `architecture`, such as `9.0` or `12.0+PTX`, runs on a device.

    Machine code runs on the same major version from its minor version on, machine code of an
    architecture with the suffix `a` on that version alone; PTX is compiled by the driver for any
    newer device.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture)
    if match is None:
        return False
    version = int(match[1]), int(match[2])
    if match[3] == "a":
        return version == capability
    if version[0] == capability[0] and version[1] <= capability[1]:
        return True
    return match[4] is not None and match[3] == "" and version <= capability


def interpreting_triton() -> bool:
    """Return True if Triton kernels run under the interpreter, where they take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class BackendReport:
    """The answer of `backends()`.

    Attributes:
        auto: the backend that `auto` picks, by device type.
        unavailable: why a backend cannot run here, by backend.
    """

    auto: dict[str, str]
    unavailable: dict[str, str]

    def __str__(self) -> str:
        lines = [f"auto on {device}: {backend}" for device, backend in self.auto.items()]
        for backend in BACKENDS:
            lines.append(f"{backend}: {self.unavailable.get(backend, 'available')}")
        return "\n".join(lines)


def backends() -> BackendReport:
    """Report which backends can run here, what `auto` picks, and why not the others.

    The environment variable `CZM_FUSED_BACKEND` (`auto`, `cpu`, `cuda`, `triton` or `reference`)
    replaces `auto`'s choice.
    """
    device_types = ["cpu"]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.accelerator.is_available():
        device_types.append(accelerator.type)
    unavailable = {}
    for backend in BACKENDS:
        home = {"cpu": "cpu", "cuda": "cuda"}.get(backend, device_types[-1])
        reason = problem(backend, home)
        if reason is None and home not in device_types:
            reason = f"torch finds no {home} device on this machine"
        if reason is not None:
            unavailable[backend] = reason
    return BackendReport(
        auto={device: choose(torch.device(device)) for device in device_types},
        unavailable=unavailable,
    )
