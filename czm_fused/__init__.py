"""Train convolutional networks without BatchNorm, at the price of plain SGD."""

from czm_fused.ops.backends import backends
from czm_fused.optim import FusedCZMSGD
from czm_fused.version import __version__



__all__ = ["FusedCZMSGD", "__version__", "backends"]
