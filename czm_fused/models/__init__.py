"""The networks of the reference training."""

from .cifar_resnet import CIFARResNet, blocks_per_stage, cifar_resnet

__all__ = ["CIFARResNet", "blocks_per_stage", "cifar_resnet"]
