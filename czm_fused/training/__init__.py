"""The reference training: the paper's CIFAR residual networks, with and without BatchNorm."""
