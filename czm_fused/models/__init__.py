"""The networks of the reference training."""

from .cifar_resnet import NOISE_ON, CIFARResNet, blocks_per_stage, cifar_resnet

__all__ = ["NOISE_ON", "CIFARResNet", "blocks_per_stage", "cifar_resnet"]
