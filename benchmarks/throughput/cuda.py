"""What only CUDA has: a compiled floor, steps replayed from a graph, the profiler's kernels."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .providers import Provider, Settings, TorchSGD


class CompiledSGD(TorchSGD):
    """`torch.optim.SGD` whose step Inductor compiled."""

    backend = "inductor"

    def __init__(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], settings: Settings
    ) -> None:
        super().__init__("sgd_compiled", weights, grads, settings, foreach=True)
        self.step = torch.compile(self.optimizer.step)
        for _ in range(3):
            self.step()


class GraphedStep:
    """Another provider's step, on the same weights, replayed from a CUDA graph."""

    def __init__(self, provider: Provider) -> None:
        self.name = f"{provider.name}_graph"
        self.backend = provider.backend
        self._provider = provider
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                provider.step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            provider.step()
        self.step = self._graph.replay

    def configure(self, settings: Settings) -> None:
        raise NotImplementedError("a captured step keeps its settings")

    def weights(self) -> Sequence[Tensor]:
        return self._provider.weights()


def extra_providers(
    providers: Sequence[Provider],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    settings: Settings,
) -> tuple[list[Provider], list[str]]:
    """Build the compiled floor, and graphs of fused SGD and of every native `czm_fused`.

    Returns:
        Those that could be built, and for each of the others a message.
    """
    builders: dict[str, Callable[[], Provider]] = {
        "sgd_compiled": partial(CompiledSGD, weights, grads, settings)
    }
    for provider in providers:
        if provider.name == "sgd_fused" or provider.backend in ("cuda", "triton"):
            name = f"{provider.name}_graph ({provider.backend})"
            builders[name] = partial(GraphedStep, provider)
    built: list[Provider] = []
    problems: list[str] = []
    for name, build in builders.items():
        try:
            built.append(build())
        # Compilers and drivers raise anything; one that fails must not cost the others.
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
    return built, problems


def device_work(step: Callable[[], object], steps: int = 10) -> dict[str, float]:
    """Return the device's time in a step, in microseconds, and its launches, as the profiler saw.

    Kernels count as launches; copies and fills are counted apart.

    Args:
        step: is run `steps` times.
        steps: of which the mean is taken.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [event["dur"] for event in events if event.get("cat") == "kernel"]
    copies = [
        event["dur"] for event in events if event.get("cat") in ("gpu_memcpy", "gpu_memset")
    ]
    return {
        "device_us": (sum(kernels) + sum(copies)) / steps,
        "launches": len(kernels) / steps,
        "copies": len(copies) / steps,
    }
