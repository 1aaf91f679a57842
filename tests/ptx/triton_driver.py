"""A driver of Triton whose device is the interpreter of PTX, and whose tensors are on the CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from czm_fused.ops.step.triton import TritonStep
from ptx.memory import WARP
from ptx.parsing import Kernel, Trap
from ptx.recorder import Recorder, StepMemory

_TARGET = GPUTarget("cuda", 90, WARP)
# No GPU has this number, so that kernels compiled for one are not mistaken for ours.
_DEVICE = -1
_SHARED_BYTES = 227 * 1024
_MOST_THREADS = 1024


class PtxDriver(DriverBase):
    """Compiles for an H100, and runs the PTX.

    Attributes:
        recorder: that launches go to.
    """

    recorder: Recorder

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: _PROPERTIES
        )
        self.launcher_cls = functools.partial(_launcher, self)
        self._loading = ""

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return _TARGET

    def get_current_device(self) -> int:
        return _DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def remember(
        self, module: object, function: object, name: str, files: dict[str, str], hash: str
    ) -> None:
        """Keep the PTX of the kernel that is about to be loaded; a hook of Triton's."""
        self._loading = Path(files[f"{name}.ptx"]).read_text()

    def _load(self, name: str, *_: object) -> tuple[object, Kernel, int, int, int]:
        return None, Kernel(self._loading, name), 0, 0, _MOST_THREADS


_PROPERTIES = {"max_shared_mem": _SHARED_BYTES, "multiprocessor_count": 132, "warpSize": WARP}


def _launcher(driver: PtxDriver, source: Any, metadata: Any) -> Callable[..., None]:
    """Return what Triton calls to launch a kernel."""

    def launch(
        x: int, y: int, z: int, stream: int, kernel: Kernel, packed: object, about: object,
        enter: object, leave: object, *arguments: Any,
    ) -> None:  # fmt: skip
        if (y, z) != (1, 1):
            raise Trap("the interpreter knows grids of one dimension")
        values, tensors = [], {}
        for name, kind, value in zip(
            source.signature, source.signature.values(), arguments, strict=True
        ):
            if kind == "constexpr":
                continue
            if isinstance(value, Tensor):
                tensors[name] = value
                value = value.data_ptr()
            values.append(int(value))
        driver.recorder.launch(
            kernel, values, tensors, WARP * metadata.num_warps, x, metadata.shared
        )

    return launch


@functools.cache
def _driver() -> PtxDriver:
    return PtxDriver()


@contextlib.contextmanager
def interpreted(recorder: Recorder) -> Iterator[None]:
    """Send every launch of a Triton kernel to `recorder`."""
    config, knobs = triton.runtime.driver, triton.knobs.runtime
    before, hook = config._active, knobs.kernel_load_start_hook
    driver = _driver()
    driver.recorder = recorder
    config.set_active(driver)
    knobs.kernel_load_start_hook = driver.remember
    try:
        yield
    finally:
        config._active = before
        knobs.kernel_load_start_hook = hook


class PtxTritonStep(StepMemory, TritonStep):
    """Runs the Triton step's PTX over CPU tensors."""

    def __call__(
        self, inputs: Any, hyperparameters: Any, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        with interpreted(self.recorder):
            super().__call__(inputs, hyperparameters, grad_scale, found_inf)
