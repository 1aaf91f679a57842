"""The training loop that everybody writes: BatchNorm, DataLoader, torchvision, torch.optim.SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from czm_fused.models import blocks_per_stage
from czm_fused.training import data
from czm_fused.training.trainer import float32_products

from .images import CLASSES, PillowDataSet
from .speed import Speed


class Unit(nn.Module):
    """The residual unit of He et al. for CIFAR, with option-A shortcuts."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.stride = 1 if before == width else 2
        self.missing = width - before
        self.conv1 = nn.Conv2d(before, width, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.missing:
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.missing))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


def network(depth: int) -> nn.Module:
    """Return the ResNet of `depth` layers, initialised as He et al. do."""
    widths = [16] + [width for width in (16, 32, 64) for _ in range(blocks_per_stage(depth))]
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(Unit(before, width) for before, width in zip(widths, widths[1:], strict=False)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class PlainTraining:
    """The plain loop over `images`, an epoch at a time.

    Args:
        depth: of the network.
        images: on the CPU.
        batch: images a step.
        device: where the network is.
        speed: the options of czm-train, with the same meaning.
        workers: processes that load; 0 loads between the steps.
        lr: learning rate.
    """

    provider = "pytorch"

    def __init__(
        self,
        depth: int,
        images: data.Images,
        batch: int,
        device: torch.device,
        speed: Speed,
        workers: int = 0,
        lr: float = 0.1,
    ) -> None:
        torch.manual_seed(0)
        self.speed = speed
        self.device = device
        self.layout = torch.channels_last if speed.channels_last else torch.contiguous_format
        built: Any = network(depth)
        self.model: nn.Module = built.to(device, memory_format=self.layout)
        self._run = torch.compile(self.model) if speed.compile else self.model
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4
        )
        self.loader = torch.utils.data.DataLoader(
            PillowDataSet(images),
            batch,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        self.workers = workers

    def epoch(self) -> float:
        """Train on every image once; return the mean loss."""
        with float32_products(self.speed.tf32):
            return self._epoch()

    def input(self) -> None:
        """Load every image once, and train on none."""
        for images, labels in self.loader:
            images.to(self.device, memory_format=self.layout, non_blocking=True)
            labels.to(self.device, non_blocking=True)

    def _epoch(self) -> float:
        self.model.train()
        losses = []
        for images, labels in self.loader:
            images = images.to(self.device, memory_format=self.layout, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            self.optimizer.zero_grad()
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.speed.autocast != "off"
            ):
                loss = F.cross_entropy(self._run(images), labels)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())
