"""Steps without memory, or in a graph; modules that are scripted, traced, exported, compiled."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from czm_fused import (
    CZMBasicBlock,
    CZMConv1d,
    CZMConv2d,
    CZMConv3d,
    FusedCZMSGD,
    center_,
    convert,
    exp_scale,
)
from czm_fused.functional import add_relu_noise
from czm_fused.models import cifar_resnet
from czm_fused.nn import ReLU6
from small_training import CZM, PLAIN, assert_equal, backward, network, on_every_backend, weights


@on_every_backend
@pytest.mark.parametrize(
    "options", [{}, {"dampening": 0.5}, {"capturable": True}, PLAIN, {"fused": True}], ids=str
)
def test_steps_of_fake_tensors(options, backend):
    with FakeTensorMode():
        model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(80, 3))
        optimizer = FusedCZMSGD(model.parameters(), **CZM, **options, backend=backend)
        for _ in range(2):
            backward(model, 0)
            optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        assert all(isinstance(value, FakeTensor) for value in states)
        assert optimizer.state[model[0].weight]["momentum_buffer"].shape == (5, 3, 3, 3)


def test_steps_of_real_parameters_within_a_mode_of_fake_ones():
    model, twin = network(), network()
    optimizers = [FusedCZMSGD(m.parameters(), **CZM) for m in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        backward(each, 0)
        optimizer.step()
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizers[0].step()
    optimizers[1].step()
    assert_equal(weights(model), weights(twin))


def test_steps_on_the_meta_device():
    with torch.device("meta"):
        model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    model(torch.ones(4, 3, 6, 6, device="meta")).sum().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["log_scale"].is_meta


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_rates_of_one_element(shape, compiled):
    torch._dynamo.reset()
    model, twin = network(), network()
    rate = torch.full(shape, 0.1, dtype=torch.float64)
    optimizer = FusedCZMSGD(model.parameters(), **{**CZM, "lr": rate})
    other = FusedCZMSGD(twin.parameters(), **CZM)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, other)]
    step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
    for seed in range(3):
        for each, its_step in ((model, step), (twin, other.step)):
            backward(each, seed)
            its_step()
        for schedule in schedules:
            schedule.step()
    assert_equal(weights(model), weights(twin))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MODULES = {
    "CZMConv1d": (lambda: CZMConv1d(3, 4, 3), IMAGES[:, :, 0]),
    "CZMConv2d": (lambda: CZMConv2d(3, 4, 3, padding="same", bias=False, stem=True), IMAGES),
    "CZMConv3d": (lambda: CZMConv3d(3, 4, 3), IMAGES.unsqueeze(2).repeat(1, 1, 4, 1, 1)),
    "CZMBasicBlock": (lambda: CZMBasicBlock(3, 4, stride=2, amplitude=0.1), IMAGES),
    "cifar_resnet": (lambda: cifar_resnet(8, noise=0.1), IMAGES),
    "converted": (
        lambda: convert(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            noise=0.1,
            example_input=IMAGES,
        ),
        IMAGES,
    ),
    "pretrained": (
        lambda: convert(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), from_pretrained=True),
        IMAGES,
    ),
}
CAPTURES = {
    "script": lambda model, x: torch.jit.script(model),
    "trace": torch.jit.trace,
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "compile": lambda model, x: torch.compile(model, backend="eager", fullgraph=True),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_modules_are_captured(name, training, capture):
    """In the mode that they are in, as dropout is."""
    if capture == "trace" and training:
        pytest.skip("torch.jit.trace compares two runs, which draw other noise")
    make, x = MODULES[name]
    torch.manual_seed(0)
    model = make().train(training)
    captured = CAPTURES[capture](copy.deepcopy(model), x)
    outputs = []
    for each in (model, captured):
        torch.manual_seed(1)
        outputs.append(each(x))
    torch.testing.assert_close(outputs[1], outputs[0])
    outputs[1].square().sum().backward()


class CallsTheTail(nn.Module):
    def forward(self, x):
        return add_relu_noise(x, residual=x, amplitude=0.1, training=self.training)


@pytest.mark.parametrize("training", [False, True])
def test_calls_of_the_functional_tail_are_traced_by_fx(training):
    model = CallsTheTail().train(training)
    outputs = []
    for each in (model, copy.deepcopy(torch.fx.symbolic_trace(model))):
        torch.manual_seed(1)
        outputs.append(each(IMAGES))
    assert torch.equal(*outputs)


def centered():
    shapes = ((3, 6, 3, 1, 0, 1, 3), (6, 4, 1), (4, 4, 3, 1, 0, 1, 4))
    model = nn.Sequential(*(CZMConv2d(*shape) for shape in shapes))
    center_(model, IMAGES)
    return model


TRACED = {
    "relu6": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ReLU6()),
    "exp_scale": lambda: exp_scale(nn.Conv2d(3, 4, 3)),
    "CZMBasicBlock": lambda: CZMBasicBlock(3, 4, amplitude=0.1),
    "centered": centered,
}


@pytest.mark.filterwarnings("ignore:.*(torch.jit|torch.onnx|legacy):DeprecationWarning")
@pytest.mark.parametrize("name", TRACED)
def test_traces_can_be_saved_and_exported_to_onnx(name):
    model, file = TRACED[name]().eval(), io.BytesIO()
    torch.jit.save(torch.jit.trace(model, IMAGES), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(IMAGES), model(IMAGES))
    torch.onnx.export(model, (IMAGES,), io.BytesIO(), dynamo=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_of_centered_convolutions_has_no_doubts():
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.trace(centered(), IMAGES)
