"""How a typed program uses the package: for `mypy` to check, which `make lint` runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import czm_fused
from czm_fused import (
    CZMBasicBlock,
    CZMConv2d,
    FusedCZMSGD,
    convert,
    czm_init_,
    czm_param_groups,
    exp_scale,
    plan_conversion,
)
from czm_fused.conversion import Change, ConversionPlan
from czm_fused.diagnostics import Report, diagnose, watch
from czm_fused.functional import add_relu_noise
from czm_fused.groups import ParamGroups
from czm_fused.models import cifar_resnet
from czm_fused.ops.backends import BackendReport
from czm_fused.training import train

conv = CZMConv2d(3, 8, 3, stem=True)
assert_type(conv.direction, Tensor)
assert_type(conv.scale, Tensor)

model = nn.Sequential(conv, nn.BatchNorm2d(8))
plan = plan_conversion(model, stem=conv)
assert_type(plan, ConversionPlan)
assert_type(plan.left, tuple[Change, ...])
assert_type(convert(model, stem=conv, gain=0.8, noise=0.1), nn.Sequential)
module: nn.Module = model

groups = czm_param_groups(module, overrides={"rest": {"lr": 0.1, "luma": 5e-4}})
assert_type(groups, ParamGroups)
assert_type(groups.notes, tuple[str, ...])

optimizer = FusedCZMSGD(groups, lr=torch.tensor(0.4), momentum=0.9, zmg=0.85, backend="cpu")
FusedCZMSGD(module.parameters(), 0.1, 0.9, nesterov=True)
FusedCZMSGD(module.named_parameters())
FusedCZMSGD("weights")  # type: ignore[arg-type]
FusedCZMSGD(module.parameters(), backend="gpu")  # type: ignore[arg-type]
torch.optim.lr_scheduler.StepLR(optimizer, 30)
any_optimizer: torch.optim.Optimizer = optimizer

images = torch.randn(2, 3, 8, 8)
assert_type(add_relu_noise(images, None, 0.1), Tensor)
block: nn.Module = CZMBasicBlock(16, 32, stride=2, amplitude=0.1)
initialised: nn.Module = czm_init_(exp_scale(nn.Conv2d(3, 8, 3)), stem=None)
network: nn.Module = cifar_resnet(20, noise=0.1)

measured = diagnose(network, images, optimizer)
assert_type(measured, Report)
assert_type(measured.as_dict(), dict[str, float])
assert_type(measured.layers[0].rejection_db, float | None)
with watch(network, optimizer, images, log=lambda numbers, step: print(step, len(numbers))):
    pass

assert_type(czm_fused.__version__, str)
assert_type(czm_fused.backends(), BackendReport)
assert_type(train.__name__, str)
