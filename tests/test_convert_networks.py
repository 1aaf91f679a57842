"""convert on the networks of torchvision and timm."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from czm_fused import FusedCZMSGD, convert, czm_param_groups
from helpers.conversion import actions, converted, evaluated, randomised, relative_difference


def weights_of_convolutions(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))


def torchvision_network(name):
    models = pytest.importorskip("torchvision.models")
    # GoogLeNet's own initialisation takes longer than all of the test.
    options = {"init_weights": False} if name == "googlenet" else {}
    return getattr(models, name)(num_classes=10, **options)


def timm_network(name):
    return pytest.importorskip("timm").create_model(name, num_classes=10)


NETWORKS = [
    pytest.param(build, name, norms, id=f"{library}-{name}")
    for library, build, names in (
        (
            "torchvision",
            torchvision_network,
            {
                "resnet18": 20,
                "resnet34": 36,
                "resnet50": 53,
                "resnext50_32x4d": 53,
                "wide_resnet50_2": 53,
                "vgg16_bn": 13,
                "mobilenet_v2": 52,
                "densenet121": 121,
                "googlenet": 59,
            },
        ),
        ("timm", timm_network, {"resnet50": 53, "regnety_002": 44}),
    )
    for name, norms in names.items()
]


@pytest.mark.parametrize("build, name, norms", NETWORKS)
def test_networks_train_without_batch_norm(build, name, norms):
    torch.manual_seed(0)
    model = build(name)
    weights = weights_of_convolutions(model)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 7])
    plan = converted(model, example_input=images[:1])

    assert set(actions(plan).values()) == {"removed"} and len(plan.changes) == norms
    assert weights_of_convolutions(model) == weights
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    assert not any("running" in key or "num_batches" in key for key in model.state_dict())
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            # 0.8, to the rounding of a norm of at most 4608 squares: 4608 * 2^-24 < 3e-4.
            norms_of_filters = module.weight.detach().flatten(1).norm(dim=1)
            torch.testing.assert_close(
                norms_of_filters, torch.full_like(norms_of_filters, 0.8), rtol=3e-4, atol=0
            )

    groups = czm_param_groups(model)
    assert [f"{each}.weight" for each in plan.stem] == groups[0]["param_names"]
    optimizer = FusedCZMSGD(groups, lr=0.01, momentum=0.9)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        output = model(images)
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        sum(F.cross_entropy(each, labels) for each in outputs).backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert evaluated(model, images).isfinite().all()

    program = torch.export.export(model.eval(), (images,))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("conv" in operator for operator in operators)
    assert not [operator for operator in operators if "norm" in operator]


@pytest.mark.parametrize("build, name, norms", NETWORKS)
def test_pretrained_networks_compute_the_same(build, name, norms):
    torch.manual_seed(0)
    model = randomised(build(name))
    images = torch.randn(2, 3, 32, 32)
    expected = evaluated(model, images)
    plan = converted(model, from_pretrained=True)
    assert len(plan.changes) == norms
    assert set(actions(plan).values()) <= {"folded", "affine"}
    assert ("affine" in actions(plan).values()) == (name == "densenet121")
    # The bar of the project. Rounding gives about 1e-6.
    assert relative_difference(evaluated(model, images), expected) <= 1e-4


@pytest.mark.parametrize("from_pretrained", [False, True])
def test_timm_batch_norm_keeps_its_activation(from_pretrained):
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        layers.BatchNormAct2d(4, act_layer=nn.PReLU),
        nn.Conv2d(4, 4, 3),
        layers.BatchNormAct2d(4, apply_act=False, drop_layer=nn.Dropout),
        nn.ReLU(),
        layers.BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Dropout),
    )
    model = randomised(model)
    images = torch.randn(2, 3, 8, 8)
    expected = evaluated(model, images)
    convert(model, example_input=images, from_pretrained=from_pretrained)
    kinds = [type(module).__name__ for module in model]
    assert kinds == ["Conv2d", "PReLU", "Conv2d", "Dropout", "ReLU", "Sequential"]
    assert [type(module).__name__ for module in model[5]][-2:] == ["Dropout", "SiLU"]
    if from_pretrained:
        # Some ten operators on numbers about 1, in float32: below 100 * 2^-24.
        assert relative_difference(evaluated(model, images), expected) < 6e-6
