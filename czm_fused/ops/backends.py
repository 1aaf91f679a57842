"""Which implementation runs: what is available here, what `auto` picks, and why not the others."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from dataclasses import dataclass

import torch

BACKENDS = ("cpu", "cuda", "triton", "reference")
ENVIRONMENT_VARIABLE = "CZM_FUSED_BACKEND"

_log = logging.getLogger("czm_fused")

_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# ROCm's devices are "cuda" to torch.
_TRITON_DEVICES = ("cuda", "xpu")
_PREFERENCE_ELSEWHERE = ("triton", "reference")
_BUILD_REMEDY = "reinstall with CZM_FUSED_BUILD={0}, which prints why it cannot build it"


@functools.cache
def _native_module_problem(name: str) -> str | None:
    try:
        importlib.import_module(f"czm_fused._C_{name}")
    except ImportError as error:
        if importlib.util.find_spec(f"czm_fused._C_{name}") is None:
            return f"the native {name} module is not built; {_BUILD_REMEDY.format(name)}"
        return f"the native {name} module does not load ({error}); {_BUILD_REMEDY.format(name)}"
    return None


@functools.cache
def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install czm-fused[gpu]"
    return None


def interpreting_triton() -> bool:
    """Whether Triton kernels run under the interpreter, where they take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def problem(backend: str, device_type: str) -> str | None:
    """Say in words why `backend` cannot run on `device_type`, or None if it can."""
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
    return _native_module_problem(backend)


def choose(device: torch.device, requested: str | None = None) -> str:
    """Return the backend that runs an operator on `device`.

    Args:
        device: where the tensors are.
        requested: `"auto"`, one of `BACKENDS`, or None for the environment variable
            `CZM_FUSED_BACKEND` (itself `"auto"` by default).

    Raises:
        ValueError: the name is none of these.
        RuntimeError: a backend asked for by name cannot run here; the message says the remedy.
    """
    if requested is None or requested == "auto":
        requested = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    return _choose(device.type, requested)


@functools.cache
def _choose(device_type: str, requested: str) -> str:
    if requested == "auto":
        preference = _PREFERENCE.get(device_type, _PREFERENCE_ELSEWHERE)
        for backend in preference:
            reason = problem(backend, device_type)
            if reason is None:
                return backend
            _log.warning("backend %s is not used on %s: %s", backend, device_type, reason)
    if requested not in BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(('auto', *BACKENDS))}, but was {requested!r}"
        )
    reason = problem(requested, device_type)
    if reason is not None:
        raise RuntimeError(f"backend {requested!r} cannot run on {device_type} tensors: {reason}")
    return requested


@dataclass(frozen=True)
class BackendReport:
    """What `backends()` found.

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
