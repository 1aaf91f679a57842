"""Time what the host does in a step on a GPU, without one: the launches are left out.

See README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from common import plot, tensors, timing
from common.agreement import DisagreementError
from common.options import Options, parse
from common.rows import Results, frame
from common.steps import FusedCZM, Settings
from common.table import table
from torch import Tensor

from czm_fused.ops import backends
from czm_fused.ops.step import plan
from czm_fused.ops.step.cuda import MANY_WORDS, CudaStep, Launch, LaunchArguments
from czm_fused.ops.step.descriptors import StepTensor
from czm_fused.ops.step.tensors import native_module
from czm_fused.ops.step.triton import TritonStep

SETTINGS = Settings(lr=1e-6, luma=5e-4)


@dataclass(kw_only=True)
class HostOptions(Options):
    """Options of the benchmark of the host's time."""

    model: Literal["resnet110", "resnet50", "vgg16"] = "resnet110"
    """Whose tensors."""
    rounds: int = 5000
    """Steps of each provider."""

    def check(self) -> None:
        """Check what the types do not."""
        super().check()
        self.at_least(1, "rounds")
        if self.device != "cpu":
            raise ValueError("--device: launches are left out, so nothing runs on a GPU; use cpu")
        if native_module() is None:
            raise ValueError("the package's native cpu module is not built; install the package")


class UnlaunchedCudaStep(CudaStep):
    """Does everything but the launches, and keeps what they would be given."""

    launched: list[LaunchArguments]

    def _run(self, launch: Launch, arguments: LaunchArguments) -> None:
        self.launched = [arguments]

    def _is_capturing(self) -> bool:
        return False

    def _most_words(self) -> int:
        return MANY_WORDS


class UnlaunchedTritonStep(TritonStep):
    """Does everything but the launches, and keeps what they would be given."""

    launched: tuple[Tensor, Tensor]

    def __init__(self, planned: Sequence[StepTensor | None], device: torch.device) -> None:
        super().__init__(planned, device)
        self._launches = [self._keep]  # type: ignore[list-item]

    def _keep(self, items: Tensor, arguments: Tensor, *_: object) -> None:
        self.launched = (items, arguments)


_STEPS: dict[str, Any] = {"cuda": UnlaunchedCudaStep, "triton": UnlaunchedTritonStep}


@contextlib.contextmanager
def unlaunched() -> Iterator[list[Any]]:
    """Let the plans that are made here launch nothing; gives the list of their steps."""
    made: list[Any] = []

    def make_runner(
        backend: str, planned: Sequence[StepTensor | None], device: torch.device
    ) -> tuple[Any, Any]:
        made.append(_STEPS[backend](planned, device))
        return made[-1], made[-1].descriptors

    with (
        mock.patch.object(plan, "make_runner", make_runner),
        mock.patch.object(backends, "choose", lambda device, backend="auto": backend),
    ):
        yield made


class Floor(torch.optim.Optimizer):
    """Does what no step that reads live tensors by torch's public interface can leave out.

    That is torch's wrapper of `step`, a gradient of each parameter, an address of each tensor, and
    the parameters' version counters.

    Args:
        params: the parameters.
        state: the tensors of their state.
        read: returns the sum of the addresses of a list of tensors.
    """

    def __init__(
        self, params: list[Tensor], state: list[Tensor], read: Callable[[list[Tensor]], int]
    ) -> None:
        super().__init__(params, {})
        self._params, self._state, self._read = params, state, read
        self.sum = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        grads = list(map(attrgetter("grad"), self._params))
        self.sum = self._read([*self._params, *grads, *self._state])
        torch.autograd.graph.increment_version(self._params)


def addresses() -> Callable[[list[Tensor]], int]:
    """Compile and return what reads the addresses of a list of tensors, and returns their sum."""
    from torch.utils.cpp_extension import load

    source = Path(__file__).parent / "common" / "addresses.cpp"
    module: Any = load("czm_addresses", [str(source)])
    api = torch.Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]
    return lambda found: module.addresses(api, found)


def _rate_changes(provider: FusedCZM) -> Callable[[], None]:
    group = provider.optimizer.param_groups[0]
    rates = itertools.cycle(SETTINGS.lr * factor for factor in np.linspace(0.5, 1, 100).tolist())

    def step() -> None:
        group["lr"] = next(rates)
        provider.step()

    return step


def _require(name: str, found: object, expected: object) -> None:
    if found != expected:
        raise DisagreementError(f"{name} was not given the addresses of the tensors")


def measure(results: Results, options: HostOptions) -> None:
    """Check that each provider reads what it should, and time it.

    Raises:
        DisagreementError: one does not.
    """
    shapes = tensors.parameter_shapes(options.model)
    device, generator = options.torch_device, torch.Generator().manual_seed(0)
    weights, grads = (
        make(shapes, torch.float32, device, generator)
        for make in (tensors.make_weights, tensors.make_grads)
    )
    read = addresses()
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    with unlaunched() as made:
        for backend in _STEPS:
            provider = FusedCZM(backend, weights, grads, SETTINGS)
            provider.step()
            calls[backend, "constant"] = provider.step
            calls[backend, "changes"] = _rate_changes(provider)
        wanted = [grad.data_ptr() for grad in grads]
        cuda, triton = made
        _require("cuda", np.frombuffer(cuda.launched[0].grads, np.int64).tolist(), wanted)
        _require("triton", triton.launched[1][: len(grads)].tolist(), wanted)

        params = list(provider.weights())
        states = provider.optimizer.state.values()
        state = [each for its in states for each in its.values()]
        for name, its_state in (("floor", state), ("floor_without_state", [])):
            floor = Floor(params, its_state, read)
            floor.step()
            everything = sum(each.data_ptr() for each in [*params, *grads, *its_state])
            _require(name, floor.sum, everything % 2**64)
            calls[name, "constant"] = floor.step
        timer = timing.ClockTimer(device)
        for (name, rate), call in calls.items():
            # Each in rounds of its own: another's tensors would empty the caches.
            host = timing.time_rounds([call], timer, options.rounds, float("inf"))[1]
            results.add(options.model, name, "host", "us", host[:, 0], rate=rate)
    results.add(options.model, "floor", "tensors", "tensors", 2 * len(params) + len(state))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a provider does not read what it should."""
    options = parse(HostOptions, arguments, "Time what the host does in a step on a GPU.")
    results = Results("host_time", options.torch_device, options.json)
    print(results.machine, end="\n\n", flush=True)
    try:
        measure(results, options)
    except DisagreementError as error:
        print(error, file=sys.stderr)
        return 1
    index = ("provider", "rate")
    print(table(frame(results.rows), index))
    if options.plot:
        host = frame(row for row in results.rows if row.metric == "host")
        titles = {"host": "time of the host in a step"}
        plot.compare(host, options.plot, ["host"], "floor", index, titles, ours="cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())
