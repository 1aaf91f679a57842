"""`torch.set_default_device` set to another device than that of the parameters."""

import copy

import pytest
import torch
from torch import nn

from czm_fused import (
    CZMBasicBlock,
    FusedCZMSGD,
    GradientRelease,
    convert,
    czm_init_,
    czm_param_groups,
    exp_scale,
    plan_conversion,
)
from czm_fused.diagnostics import diagnose, watch
from czm_fused.models import cifar_resnet
from small_training import assert_equal, backward, network, on_every_backend, state_of, weights

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def normalised_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )


def trained(model, backend, options, dtype, default):
    """Train with changed rates, and on from a loaded state, under a default device."""
    model.to(dtype)
    with torch.device(default):
        optimizer = FusedCZMSGD(model.parameters(), lr=0.1, **options, backend=backend)
        for rate in (0.1, 0.05):
            optimizer.param_groups[0]["lr"] = rate
            backward_on_cpu(model)
            optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        # And a first gradient, of the linear layer.
        model[4].requires_grad_(True)
        backward_on_cpu(model)
        optimizer.step()
    return weights(model), state_of(optimizer)


def backward_on_cpu(model):
    with torch.device("cpu"):
        backward(model, 0)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"capturable": True}],
    ids=str,
)
def test_steps(options, dtype, backend):
    options = {**options, "master_weights": dtype == torch.bfloat16}
    results = []
    for default in ("meta", "cpu"):
        model = network()
        model[4].requires_grad_(False)
        results.append(trained(model, backend, options, dtype, default))
    assert_equal(*results)


@pytest.mark.parametrize("compiled", [False, True])
def test_scaled_steps(compiled):
    torch._dynamo.reset()
    results = []
    for default in ("meta", "cpu"):
        model = network()
        optimizer = FusedCZMSGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        with torch.device(default):
            for found in (1.0, 0.0):
                backward_on_cpu(model)
                optimizer.grad_scale = torch.tensor(4.0, device="cpu")
                optimizer.found_inf = torch.tensor(found, device="cpu")
                step()
        results.append(weights(model))
    assert_equal(*results)


def released(model):
    release = GradientRelease(FusedCZMSGD(model.parameters(), lr=0.1, momentum=0.9))
    backward_on_cpu(model)
    release.remove()
    return weights(model)


def diagnosed(model):
    optimizer = FusedCZMSGD(czm_param_groups(model, example_input=IMAGES), lr=0.1)
    logs = []
    handle = watch(
        model, optimizer, IMAGES, log=lambda numbers, step: logs.append(numbers), every=1
    )
    model(IMAGES).square().mean().backward()
    optimizer.step()
    handle.remove()
    return [diagnose(model, IMAGES, optimizer).as_dict(), *logs]


@pytest.mark.parametrize(
    ("make", "act"),
    [
        (network, released),
        (lambda: convert(normalised_network()), diagnosed),
        (normalised_network, lambda m: weights(czm_init_(m) or m)),
        (normalised_network, lambda m: weights(czm_init_(m, example_input=IMAGES) or m)),
        (normalised_network, lambda m: weights(convert(m))),
        (normalised_network, lambda m: weights(convert(m, example_input=IMAGES))),
        (normalised_network, lambda m: weights(convert(m, from_pretrained=True))),
        (normalised_network, lambda m: convert(m, noise=0.1, example_input=IMAGES)(IMAGES)),
        (normalised_network, lambda m: str(plan_conversion(m, example_input=IMAGES))),
        (lambda: nn.Conv2d(3, 4, 3), lambda m: exp_scale(m)(IMAGES)),
        (lambda: CZMBasicBlock(3, 4, amplitude=0.1), lambda m: m(IMAGES)),
        (lambda: cifar_resnet(8), lambda m: m(IMAGES)),
    ],
)
def test_functions_of_the_package(make, act):
    results = []
    for default in ("meta", "cpu"):
        torch.manual_seed(0)
        model = make()
        with torch.device(default):
            torch.manual_seed(1)
            results.append(act(model))
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        assert_equal(*results)
