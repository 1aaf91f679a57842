"""Check and time single operators on one layer: the step, add_relu_noise and exp_scale.

`pytest benchmarks` checks that every form agrees with the eager one. Run as a script, this file
checks, then times them with torch.utils.benchmark. See README.md beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from common import plot
from common.agreement import DisagreementError, require
from common.options import Options, parse
from common.rows import Results, frame
from common.steps import FusedCZM, Settings, TorchSGD, available_backends
from common.table import table
from common.tensors import make_grads, make_weights
from torch import Tensor
from torch.utils.benchmark import Timer

from czm_fused.functional import add_relu_noise
from czm_fused.ops import exp_scale
from czm_fused.ops.backends import choose

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
LAYERS = [(16, 16, 3, 3), (64, 64, 3, 3), (512, 512, 3, 3), (256, 64, 1, 1), (64, 3, 7, 7)]
ACTIVATIONS = [(128, 16, 32, 32), (128, 64, 8, 8)]
SETTINGS = Settings(lr=1e-6, luma=5e-4)
# Large enough that a part of the method that is missing moves weights far beyond rounding.
CHECKED = Settings(lr=0.1, luma=0.05)
AMPLITUDE = 0.1
# Of float32: a product and two sums of numbers of size 1 to 10.
BOUND = 40 * torch.finfo(torch.float32).eps


@dataclass(kw_only=True)
class OperatorOptions(Options):
    """Options of the benchmark of single operators."""

    seconds: float = 1.0
    """Of timing for each operator, shape and form."""

    def check(self) -> None:
        """Check what the types do not."""
        super().check()
        self.at_least(0, "seconds")


@dataclass
class Case:
    """One operator on one shape.

    Attributes:
        name: of the operator and its direction.
        shape: of the layer's weight or activation.
        device: where it is.
        forms: what is compared, by name; the last one is eager.
        results: what each form computes, the last one's as reference.
    """

    name: str
    shape: tuple[int, ...]
    device: str
    forms: Mapping[str, Callable[[], object]]
    results: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))} {self.device}"

    def check(self) -> None:
        """Compare every form with the eager one.

        Raises:
            DisagreementError: one differs by more than rounding.
        """
        *others, eager = self.results
        for form in others:
            for actual, expected in zip(self.results[form], self.results[eager], strict=True):
                difference = (actual - expected).detach().abs().max()
                error = float(difference / expected.detach().abs().max())
                require(form, f"{eager} in {self}", error, BOUND)


def step_case(shape: tuple[int, ...], device: str) -> Case:
    """One layer's `step()` on every backend, and in fused torch SGD, which computes another."""
    generator = torch.Generator().manual_seed(0)
    where = [torch.Size(shape)], torch.float32, torch.device(device), generator
    weights, grads = make_weights(*where), make_grads(*where)
    backends = [*available_backends(torch.device(device)), "reference"]
    steps = {name: FusedCZM(name, weights, grads, SETTINGS) for name in dict.fromkeys(backends)}
    checked = {name: FusedCZM(name, weights, grads, CHECKED) for name in steps}
    for provider in checked.values():
        provider.step()
    sgd = TorchSGD("sgd_fused", weights, grads, SETTINGS, fused=True)
    forms: dict[str, Callable[[], object]] = {
        f"czm_{name}": provider.step for name, provider in steps.items()
    }
    results = {f"czm_{name}": list(each.weights()) for name, each in checked.items()}
    return Case("step", shape, device, {**forms, "sgd_fused": sgd.step}, results)


def _relu_mul(x: Tensor, residual: Tensor) -> Tensor:
    noise = torch.empty(x.shape[:2], device=x.device).uniform_(1 - AMPLITUDE, 1 + AMPLITUDE)
    return torch.relu(x + residual) * noise[:, :, None, None]


def _add_relu_noise(x: Tensor, residual: Tensor) -> Tensor:
    return add_relu_noise(x, residual, AMPLITUDE)


def _exp_mul(direction: Tensor, log_scale: Tensor) -> Tensor:
    return log_scale.exp().view(-1, 1, 1, 1) * direction


def _differentiable_cases(
    name: str, fused: Callable[..., Tensor], eager: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> Iterator[Case]:
    """Yield the forward and the backward pass of an operator, fused and eager."""
    shape, device = tuple(inputs[0].shape), inputs[0].device.type
    forms = {"czm_fused": fused, "eager": eager}
    outputs: dict[str, Sequence[Tensor]] = {}
    backward: dict[str, Callable[[], Sequence[Tensor]]] = {}
    for form, function in forms.items():
        # The same noise in both.
        torch.manual_seed(0)
        output = function(*inputs)
        outputs[form] = [output.detach()]
        grad = torch.ones_like(output)
        backward[form] = partial(torch.autograd.grad, output, inputs, grad, retain_graph=True)
    calls = {form: partial(function, *inputs) for form, function in forms.items()}
    yield Case(f"{name} forward", shape, device, calls, outputs)
    gradients = {form: call() for form, call in backward.items()}
    yield Case(f"{name} backward", shape, device, backward, gradients)


def add_relu_noise_cases(shape: tuple[int, ...], device: str) -> Iterator[Case]:
    """Yield the tail of a residual unit, against relu and mul."""
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(2)]
    yield from _differentiable_cases("add_relu_noise", _add_relu_noise, _relu_mul, inputs)


def exp_scale_cases(shape: tuple[int, ...], device: str) -> Iterator[Case]:
    """Yield the materialisation W = exp(g) V, against exp and mul."""
    choose(torch.device(device))
    v = torch.randn(shape, device=device, requires_grad=True)
    g = torch.zeros(shape[0], device=device, requires_grad=True)
    yield from _differentiable_cases("exp_scale", exp_scale.exp_scale.apply, _exp_mul, [v, g])


def cases(device: str) -> Iterator[Case]:
    """Yield every operator on every shape."""
    for shape in LAYERS:
        yield step_case(shape, device)
        yield from exp_scale_cases(shape, device)
    for shape in ACTIVATIONS:
        yield from add_relu_noise_cases(shape, device)


@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_step(device: str, shape: tuple[int, ...]) -> None:
    step_case(shape, device).check()


@pytest.mark.parametrize("shape", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_add_relu_noise(device: str, shape: tuple[int, ...]) -> None:
    for case in add_relu_noise_cases(shape, device):
        case.check()


@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_exp_scale(device: str, shape: tuple[int, ...]) -> None:
    for case in exp_scale_cases(shape, device):
        case.check()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a form computes something else."""
    options = parse(OperatorOptions, arguments, "Check and time single operators on one layer.")
    results = Results("test_ops", options.torch_device, options.json)
    for case in cases(options.device):
        try:
            case.check()
        except DisagreementError as error:
            print(error, file=sys.stderr)
            return 1
        shape = "x".join(map(str, case.shape))
        for form, call in case.forms.items():
            # torch's Timer runs on one thread unless told otherwise.
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            times = timer.blocked_autorange(min_run_time=options.seconds).times
            microseconds = [each * 1e6 for each in times]
            results.add(f"{case.name} {shape}", form, "time", "us", microseconds)
    print(table(frame(results.rows)))
    if options.plot:
        plot.compare(frame(results.rows), options.plot, ["time"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
