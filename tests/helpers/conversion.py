"""Helpers of the tests of convert: networks as if trained, and their comparison."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from czm_fused import convert, plan_conversion
from czm_fused.conversion import ConversionPlan

IMAGE = torch.zeros(1, 3, 8, 8)

ARGUMENTS_OF_PLAN = ("example_input", "stem", "from_pretrained")


class Function(nn.Module):
    """A network given by its modules and a function of them and the input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs=4, outputs=4, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **{"bias": False, **options})


def randomised(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and parameters as if it had been trained."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return model


def evaluated(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(*inputs)


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def converted(model: nn.Module, **options) -> ConversionPlan:
    """Convert `model` with the paper's gain, and return the plan that was carried out."""
    arguments = {key: options[key] for key in options if key in ARGUMENTS_OF_PLAN}
    plan = plan_conversion(model, **arguments)
    if not plan.from_pretrained:
        options.setdefault("gain", 0.8)
    assert convert(model, **options) is model
    return plan


def actions(plan: ConversionPlan) -> dict[str, str]:
    return {change.name: change.action for change in plan.changes}


def remarks(plan: ConversionPlan) -> dict[str, str]:
    return {change.name: change.remark for change in plan.changes}
