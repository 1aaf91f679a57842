"""A network and a task that it learns in a few steps: what the tests with other libraries share."""

import torch
from torch import nn
from torch.nn import functional as F

from czm_fused import FusedCZMSGD, czm_param_groups
from czm_fused.models import cifar_resnet

STEPS = 16
BATCH = 16


def task():
    """Return images `(64, 1, 8, 8)` and in which quadrant of each there is light, `(64,)`."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    images = 0.1 * torch.randn(64, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    # Batches of every class, in an order of no meaning.
    order = torch.randperm(64, generator=generator)
    return images[order], labels[order]


def network(seed=0):
    torch.manual_seed(seed)
    # The mean of all places cannot tell where the light is.
    trunk = cifar_resnet(8, in_channels=1).units
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), trunk, nn.Flatten(), nn.Linear(256, 4)
    )


def optimizer_of(model, **options):
    return FusedCZMSGD(czm_param_groups(model, stem="0"), lr=0.05, momentum=0.9, **options)


def batches(steps, begin=0):
    images, labels = task()
    for number in range(begin, begin + steps):
        part = slice(number * BATCH % 64, number * BATCH % 64 + BATCH)
        yield images[part], labels[part]


def loss_of(model):
    images, labels = task()
    with torch.no_grad():
        return F.cross_entropy(model(images).float(), labels).item()


def train(model, optimizer, steps=STEPS, begin=0):
    for images, labels in batches(steps, begin):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def assert_same(actual, expected):
    """Hold that two structures of tensors are equal, bit for bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
