"""The backend that runs an operator, and how the choice is explained."""

from __future__ import annotations

import logging
import subprocess
import sys
import types

import pytest
import torch

from czm_fused.ops import add_relu_noise, backends, exp_scale
from helpers import triton_interpreter

x = torch.ones(2, 3, 4)
ARGUMENTS = {
    "add_relu_noise": (x, x, None),
    "add_relu_noise_backward": (x, x, None),
    "exp_scale": (x, torch.zeros(2)),
    "exp_scale_backward": (x, x, torch.zeros(2)),
}
CALLS = {name: getattr(torch.ops.czm_fused, name) for name in ARGUMENTS}
needs_native = pytest.mark.skipif(
    backends.problem("cpu", "cpu") is not None, reason="the native CPU module is not built"
)


@pytest.fixture(autouse=True)
def fresh_choice():
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


def operators_run(call, arguments) -> list[str]:
    with torch.profiler.profile() as profile:
        call(*arguments)
    return [event.name for event in profile.events()]


@needs_native
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_environment_variable_steers_each_operator(name, backend, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, backend)
    ran = operators_run(CALLS[name], ARGUMENTS[name])
    assert (f"czm_fused::{name}_native" in ran) == (backend != "reference")


@pytest.mark.simulated
@pytest.mark.skipif(
    triton_interpreter.obstacle() is not None, reason=str(triton_interpreter.obstacle())
)
def test_operators_and_their_gradients_dispatch_to_triton():
    launches, grad = triton_interpreter.interpreter().call("helpers.triton_dispatch:run_both")
    assert launches == 4
    torch.testing.assert_close(grad, torch.ones(2, 3))


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_asked_for_by_name_that_cannot_run_raises(name, backend, monkeypatch):
    if backends.problem(backend, "cpu") is None:
        pytest.skip("Triton's interpreter runs here")
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, backend)
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run on cpu tensors: "):
        CALLS[name](*ARGUMENTS[name])


def test_an_unknown_backend_is_named(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="backend must be one of auto, cpu, .*, but was 'fast'"):
        exp_scale.exp_scale(*ARGUMENTS["exp_scale"])


def test_auto_falls_back_and_says_why_once(monkeypatch, caplog):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_native_module_problem", lambda name: "it is not there")
    with caplog.at_level(logging.WARNING, "czm_fused"):
        ran = operators_run(CALLS["exp_scale"], ARGUMENTS["exp_scale"])
        operators_run(CALLS["exp_scale"], ARGUMENTS["exp_scale"])
    assert "czm_fused::exp_scale_native" not in ran
    assert [record.getMessage() for record in caplog.records] == [
        "backend cpu is not used on cpu: it is not there"
    ]


FIRST_AND_SECOND = """
import torch
from czm_fused.ops import {name} as module
x = torch.ones(2, 3, 4)
arguments = (x, x, None) if "{name}" == "add_relu_noise" else (x, torch.zeros(2))
runs = []
for _ in range(2):
    with torch.profiler.profile() as profile:
        {call}(*arguments)
    names = [event.name for event in profile.events()]
    runs.append([name for name in names if name.startswith("czm_fused::")])
assert runs[0] == runs[1], runs
assert "czm_fused::{name}_native" in runs[0], runs
"""


@needs_native
@pytest.mark.parametrize("name", ["add_relu_noise", "exp_scale"])
@pytest.mark.parametrize("call", ["torch.ops.czm_fused.{name}", "module.{name}"])
def test_first_call_of_a_process_runs_what_the_second_runs(name, call, monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    code = FIRST_AND_SECOND.format(name=name, call=call.format(name=name))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        ("8.0,9.0,10.0,12.0+PTX", (8, 6), True),
        ("8.0,9.0,10.0,12.0+PTX", (7, 5), False),
        ("8.0,9.0,10.0,12.0+PTX", (12, 1), True),
        ("8.0,9.0,10.0,12.0+PTX", (13, 0), True),
        ("8.0,9.0,10.0+PTX", (12, 0), True),
        ("8.0,9.0", (12, 0), False),
        ("8.6", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("", (8, 6), True),
        ("7.5", (7, 5), False),
    ],
)
def test_auto_takes_cuda_only_where_the_binary_runs(built_for, capability, runs, monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setitem(
        sys.modules, "czm_fused._C_cuda", types.SimpleNamespace(architectures=built_for)
    )
    monkeypatch.setattr(backends, "_native_module_problem", lambda name: None)
    monkeypatch.setattr(backends, "_triton_problem", lambda: None)
    monkeypatch.setattr(backends, "_capability", lambda device_type, index: capability)
    device = torch.device("cuda", 0)
    assert backends.choose(device) == ("cuda" if runs else "triton")
    if not runs:
        remedy = "reinstall with TORCH_CUDA_ARCH_LIST={}.{}".format(*capability)
        if capability < (8, 0):
            remedy = "needs compute capability 8.0, and the device's is 7.5"
        with pytest.raises(RuntimeError, match=remedy):
            backends.choose(device, "cuda")


def test_a_shadowed_package_is_named(monkeypatch, tmp_path):
    installed = tmp_path / "czm_fused"
    installed.mkdir()
    (installed / "_C_absent.abi3.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    reason = backends._native_module_problem.__wrapped__("absent")
    assert str(backends._PACKAGE) in reason
    assert f"shadows the installed package {installed}; start Python from another" in reason


def test_every_backend_overflows_and_underflows_alike_in_exp_scale(monkeypatch):
    log_scale = torch.tensor([89.0, -110.0, 60.0, -60.0, float("inf"), -float("inf")])
    direction = torch.tensor([[0.0, 1.0, -1.0], [1e30, 1.0, 0.0]]).repeat(3, 1)
    grad = torch.tensor([[1e20, 1e-20, 3e15], [1e-30, 2.0, 1e20]]).repeat(3, 1)
    results = []
    for backend in ("cpu", "reference"):
        if backends.problem(backend, "cpu") is None:
            monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, backend)
            weight = CALLS["exp_scale"](direction, log_scale)
            results.append((weight, *CALLS["exp_scale_backward"](grad, direction, log_scale)))
    for result in results:
        torch.testing.assert_close(result, results[-1], rtol=1e-6, atol=0, equal_nan=True)


def test_functional_form_is_the_operator(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    ran = operators_run(add_relu_noise.add_relu_noise, ARGUMENTS["add_relu_noise"])
    assert not [name for name in ran if name.startswith("czm_fused")]
