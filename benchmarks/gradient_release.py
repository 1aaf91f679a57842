"""Count what gradients cost a training step in memory, with and without `GradientRelease`.

Counts of the CPU's allocator, the same at every run; see README.md beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from common import plot
from common.counting import peak_bytes
from common.options import Options, parse
from common.rows import Results, frame
from common.table import table
from torch import Tensor, nn

from czm_fused import FusedCZMSGD, convert, czm_param_groups
from czm_fused.gradient_release import GradientRelease
from czm_fused.models import cifar_resnet

# Images of few pixels, so that gradients, not activations, are what a backward pass holds.
IMAGE_SIZE = 32


@dataclass(kw_only=True)
class ReleaseOptions(Options):
    """Options of the benchmark of gradient release."""

    model: tuple[Literal["resnet110", "resnet50", "vgg16"], ...] = (
        "resnet110", "resnet50", "vgg16",
    )  # fmt: skip
    """The networks."""
    batch: int = 8
    """Images a step."""

    def check(self) -> None:
        """Check what the types do not."""
        super().check()
        self.at_least(1, "batch")


def build(model: str) -> nn.Module:
    """Return a network without BatchNorm, always from the same seed.

    Raises:
        ImportError: torchvision is not installed, and the model is one of its.
    """
    torch.manual_seed(0)
    if model == "resnet110":
        return cifar_resnet(110)
    from torchvision import models

    return convert(getattr(models, model.replace("vgg16", "vgg16_bn"))(), gain=0.8)


class Step:
    """A training step of one model, and how much memory it takes.

    Args:
        model: one of the networks of `ReleaseOptions`.
        batch: images.
        device: where the network is.
        released: release gradients in backward.
    """

    def __init__(self, model: str, batch: int, device: torch.device, released: bool) -> None:
        self.model = build(model).to(device)
        self.optimizer = FusedCZMSGD(czm_param_groups(self.model), lr=1e-3, momentum=0.9)
        self.images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        self.gradient_peak = 0
        for param in self.model.parameters():
            param.register_post_accumulate_grad_hook(self._count)
        if released:
            GradientRelease(self.optimizer)
        # State is made in the first step, and belongs to no later one.
        self()

    def __call__(self) -> None:
        """Run forward, backward and the optimizer's step."""
        self.model(self.images).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peaks(self) -> dict[str, int]:
        """Return the bytes of gradients at their peak, and of all that a step allocates."""
        self.gradient_peak = 0
        allocated = peak_bytes(self, self.images.device)
        return {"gradient_bytes": self.gradient_peak, "allocated_bytes": allocated}

    def _count(self, _: Tensor) -> None:
        storages = {
            param.grad.untyped_storage()._cdata: param.grad.untyped_storage().nbytes()
            for param in self.model.parameters()
            if param.grad is not None
        }
        self.gradient_peak = max(self.gradient_peak, sum(storages.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0."""
    options = parse(ReleaseOptions, arguments, "Count what gradients cost a step in memory.")
    device = options.torch_device
    results = Results("gradient_release", device, options.json)
    for model in options.model:
        for provider in ("czm_kept", "czm_released"):
            step = Step(model, options.batch, device, provider == "czm_released")
            counts = {"parameter_bytes": sum(p.nbytes for p in step.model.parameters())}
            for metric, nbytes in (counts | step.peaks()).items():
                config = {"batch": options.batch, "image_size": IMAGE_SIZE}
                results.add(model, provider, metric, "bytes", nbytes, **config)
    print(table(frame(results.rows)))
    if options.plot:
        titles = {"gradient_bytes": "gradients", "allocated_bytes": "all that a step allocates"}
        rows = frame(results.rows)
        plot.compare(rows, options.plot, list(titles), "czm_kept", titles=titles, ours="czm_rel")
    return 0


if __name__ == "__main__":
    sys.exit(main())
