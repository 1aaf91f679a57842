"""Train convolutional networks without BatchNorm, at the price of plain SGD."""

from czm_fused import functional
from czm_fused.centering import center_, uncenter_
from czm_fused.conversion import convert, plan_conversion
from czm_fused.gradient_release import GradientRelease
from czm_fused.groups import czm_param_groups
from czm_fused.init import czm_init_
from czm_fused.nn import CZMBasicBlock, CZMConv1d, CZMConv2d, CZMConv3d, exp_scale
from czm_fused.ops.backends import backends
from czm_fused.optim import FusedCZMSGD
from czm_fused.version import __version__

__all__ = [
    "CZMBasicBlock",
    "CZMConv1d",
    "CZMConv2d",
    "CZMConv3d",
    "FusedCZMSGD",
    "GradientRelease",
    "__version__",
    "backends",
    "center_",
    "convert",
    "czm_init_",
    "czm_param_groups",
    "exp_scale",
    "functional",
    "plan_conversion",
    "uncenter_",
]
