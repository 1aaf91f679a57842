"""Time the optimizer step of FusedCZMSGD against its rivals and against torch's SGD.

See README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import counting, plot, tensors, timing
from common.agreement import DisagreementError, require
from common.options import Options, parse
from common.rows import Results, Row, frame
from common.steps import (
    FusedCZM,
    Provider,
    Settings,
    TorchSGD,
    available_backends,
    czm_providers,
    sgd_providers,
)
from common.table import table
from torch import Tensor

from czm_fused.ops.backends import choose
from czm_fused.ops.step import reference
from czm_fused.ops.step.spec import compute_dtype

TIMED = Settings(lr=1e-6, luma=5e-4)
"""The learning rate keeps weights where they are for thousands of steps on the same gradients."""

CHECKED = Settings(lr=0.1, luma=0.05)
"""Large enough that a part of the method that is missing moves weights far beyond rounding."""

CHECKED_STEPS = 3
BARE_SECONDS = 5.0
# Of a stored number in a step: the weight and its momentum, and in the eager form dV and W too.
_STORED_ROUNDINGS = 4
# Of float32 in a step, sums over a filter apart: the equations have no more operations in a chain.
_ARITHMETIC_ROUNDINGS = 16


@dataclass(kw_only=True)
class StepOptions(Options):
    """Options of the benchmark of the step."""

    model: tuple[Literal["resnet110", "resnet50", "vgg16", "vgg16_features", "all"], ...] = (
        "resnet110",
    )
    """Whose tensors; all: resnet110, resnet50 and vgg16."""
    dtype: tuple[Literal["float32", "float64", "bfloat16", "float16"], ...] = ("float32",)
    """Of weights and gradients."""
    backend: tuple[Literal["reference", "cpu", "cuda", "triton"], ...] = ()
    """Of czm_fused; every one that runs on the device by default."""
    steps: int = 300
    """Rounds at most."""
    seconds: float = 60.0
    """For each model, dtype and cache state, after how long no round begins; 0: no timing."""

    def check(self) -> None:
        """Check what the types do not."""
        super().check()
        self.at_least(1, "steps")
        self.at_least(0, "seconds")
        try:
            for name in self.backend:
                choose(self.torch_device, name)
        except (ImportError, RuntimeError) as error:
            raise ValueError(str(error)) from error


def measure(
    results: Results, model: str, dtype: torch.dtype, device: torch.device, options: StepOptions
) -> list[str]:
    """Check every CZM provider on the tensors of `model`, then time all providers.

    Returns:
        What failed without stopping the run: a sentence for each.

    Raises:
        DisagreementError: a provider does not compute the paper's step.
    """
    backends = list(dict.fromkeys(options.backend)) or available_backends(device)
    shapes = tensors.parameter_shapes(model)
    weights, grads = _draw(shapes, dtype, device)
    rowed: list[Provider] = [
        *czm_providers(backends, weights, grads, TIMED),
        *sgd_providers(weights, grads, TIMED),
    ]
    errors = check(rowed, weights, grads)
    for provider in rowed:
        provider.configure(TIMED)
    problems: list[str] = []
    extras: list[Provider] = []
    if device.type == "cuda" and options.seconds > 0:
        extras, problems = extra_providers(rowed, weights, grads)

    def add(provider: Provider, metric: str, unit: str, values: Any, **config: Any) -> None:
        config = {"backend": provider.backend, "dtype": _name(dtype), **config}
        results.add(model, provider.name, metric, unit, values, **config)

    for provider, error in zip(rowed, errors, strict=True):
        add(provider, "error_share", "of tolerance", error)
    for provider in [*rowed, *extras]:
        add(provider, "bytes", "bytes", step_bytes(shapes, dtype, provider))
        if device.type == "cuda":
            work = counting.device_work(provider.step)
            for metric, value in work.items():
                add(provider, metric, "us" if metric == "profiled" else metric, value)
            if work["launches"] == 0:
                problems.append(f"{provider.name}: the profiler saw no kernel")
    if options.seconds > 0:
        for cache, timer in timing.timers(device).items():
            copy = timing.copy_bandwidth(device, timer)
            config = {"backend": "torch", "dtype": "uint8", "cache": cache}
            results.add(model, "copy", "bandwidth", "GB/s", copy, **config)
            _time(add, [*rowed, *extras], shapes, dtype, timer, cache, options)
        _time_hosts(add, rowed, shapes, dtype, device, options.steps)
    return problems


def _time(
    add: Callable[..., None],
    providers: Sequence[Provider],
    shapes: Sequence[torch.Size],
    dtype: torch.dtype,
    timer: timing.Timer,
    cache: str,
    options: StepOptions,
) -> None:
    done, host = timing.time_rounds(
        [provider.step for provider in providers], timer, options.steps, options.seconds
    )
    for index, provider in enumerate(providers):
        add(provider, "step", "us", done[:, index], cache=cache)
        if isinstance(timer, timing.EventTimer):
            add(provider, "host", "us", host[:, index], cache=cache)
        gbps = step_bytes(shapes, dtype, provider) / done[:, index] / 1e3
        add(provider, "bandwidth", "GB/s", gbps, cache=cache)


def _time_hosts(
    add: Callable[..., None],
    providers: Sequence[Provider],
    shapes: Sequence[torch.Size],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> None:
    """Time the call itself: steps of as many tensors of one weight each, with warm caches."""
    weights, grads = _draw([torch.Size([1] * len(shape)) for shape in shapes], dtype, device)
    fused = [p.backend for p in providers if p.name == "czm_fused" and p.backend != "reference"]
    bare: list[Provider] = [FusedCZM(backend, weights, grads, TIMED) for backend in fused]
    bare.append(TorchSGD("sgd_fused", weights, grads, TIMED, fused=True))
    timer = timing.ClockTimer(device)
    for provider in bare:
        # Each in rounds of its own: another's step would empty the caches.
        _, host = timing.time_rounds([provider.step], timer, rounds, BARE_SECONDS)
        add(provider, "bare", "us", host[:, 0])


def step_bytes(shapes: Sequence[torch.Size], dtype: torch.dtype, provider: Provider) -> int:
    """Return the bytes that a step cannot help but move.

    Gradient, weight and momentum are read, weight and momentum written; CZM reads and writes the
    log-scale and its momentum of every filter as well, float32 (float64 for float64 weights).
    """
    total = 5 * dtype.itemsize * sum(shape.numel() for shape in shapes)
    if provider.name.startswith("czm"):
        filters = sum(shape[0] for shape in shapes if len(shape) > 2)
        total += 4 * max(dtype.itemsize, 4) * filters
    return total


def check(
    providers: Sequence[Provider], weights: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[float]:
    """Compare fresh providers with the oracle in float64, tensor by tensor.

    torch's SGD must not agree: where it does not compute SGD, its row says so.

    Returns:
        For each provider, its largest error as a share of the tolerance.

    Raises:
        DisagreementError: the error of a CZM provider is above the tolerance, or not a number.
    """
    for provider in providers:
        provider.configure(CHECKED)
        for _ in range(CHECKED_STEPS):
            provider.step()
    found = [provider.weights() for provider in providers]
    errors = np.zeros(len(providers))
    with torch.no_grad():
        for number, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
            # One tensor at a time: VGG16 in float64 would be some gigabytes.
            expected = {czm: _oracle(weight, grad, czm) for czm in (True, False)}
            for index, provider in enumerate(providers):
                right = expected[provider.name.startswith("czm")]
                error = (found[index][number].double() - right).abs().max()
                # np.maximum keeps NaN.
                share = error.item() / tolerance(weight, right)
                errors[index] = np.maximum(errors[index], share)
    for provider, share in zip(providers, errors, strict=True):
        if provider.name.startswith("czm"):
            name = f"{provider.name} ({provider.backend})"
            require(name, "the paper's step", share, 1.0)
    return [float(each) for each in errors]


def tolerance(weight: Tensor, expected: Tensor) -> float:
    """Return by how much rounding can move a weight of this tensor in `CHECKED_STEPS` steps.

    In each step a number is rounded `_STORED_ROUNDINGS` times to the weights' precision u and
    `_ARITHMETIC_ROUNDINGS` times to the arithmetic's precision v, and the sums over the n weights
    of a filter add a random walk of sqrt(n) roundings. Each is at most u or v times the largest
    weight plus the largest displacement; the latter counts once a step, because an error of the
    momentum enters every later update.
    """
    stored = torch.finfo(weight.dtype).eps / 2
    arithmetic = torch.finfo(compute_dtype(weight.dtype)).eps / 2
    sums = math.sqrt(math.prod(weight.shape[1:])) if weight.dim() > 2 else 0.0
    step_error = _STORED_ROUNDINGS * stored + (_ARITHMETIC_ROUNDINGS + sums) * arithmetic
    largest = expected.abs().max() + CHECKED_STEPS * (expected - weight).abs().max()
    return CHECKED_STEPS * step_error * largest.item()


def _oracle(weight: Tensor, grad: Tensor, is_czm: bool) -> Tensor:
    expected, grad = weight.to(torch.float64, copy=True), grad.to(torch.float64)
    momentum_buffer = torch.zeros_like(expected)
    options: dict[str, Any] = {"lr": CHECKED.lr, "momentum": CHECKED.momentum}
    state: tuple[Tensor, ...] = ()
    if is_czm and weight.dim() > 2:
        log_scale = reference.initial_log_scale(expected)
        state = (log_scale, torch.zeros_like(log_scale))
        options |= {"zmg": CHECKED.zmg, "luma": CHECKED.luma}
    for _ in range(CHECKED_STEPS):
        reference.step_(expected, grad, momentum_buffer, *state, **options)
    return expected


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
    providers: Sequence[Provider], weights: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[list[Provider], list[str]]:
    """Build the compiled floor, and graphs of fused SGD and of every native `czm_fused`.

    Returns:
        Those that could be built, and for each of the others a message.
    """
    builders: dict[str, Callable[[], Provider]] = {
        "sgd_compiled": partial(CompiledSGD, weights, grads, TIMED)
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


def _draw(
    shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    where = (list(shapes), dtype, device, generator)
    return tensors.make_weights(*where), tensors.make_grads(*where)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the time of a step with warm caches, as a share of fused SGD's."""
    warm = frame(row for row in rows if row.config.get("cache") == "warm")
    warm["model"] += ", " + warm["dtype"]
    label = ("provider", "backend")
    titles = {"step": "time of a step"}
    plot.compare(warm, path, ["step"], "sgd_fused", label, titles, ours="czm_fused")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a provider disagrees with the oracle or an extra fails."""
    options = parse(StepOptions, arguments, "Time the optimizer step against torch's SGD.")
    device = options.torch_device
    names = [n for name in options.model for n in (tensors.NAMED if name == "all" else [name])]
    results = Results("step_throughput", device, options.json)
    print(results.machine, end="\n\n", flush=True)
    problems = []
    for model, dtype in itertools.product(dict.fromkeys(names), dict.fromkeys(options.dtype)):
        begin = len(results.rows)
        try:
            found = measure(results, model, getattr(torch, dtype), device, options)
        except (DisagreementError, ImportError) as error:
            print(f"{model}, {dtype}: {error}", file=sys.stderr)
            return 1
        rows = frame(results.rows[begin:])
        index = ("provider", "backend", "cache")
        print(table(rows, index, "sgd_fused", ("step",)), end="\n\n", flush=True)
        problems += [f"{model}, {dtype}: {problem}" for problem in found]
    for problem in problems:
        print(problem, file=sys.stderr)
    if options.plot and options.seconds > 0:
        draw(results.rows, options.plot)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
