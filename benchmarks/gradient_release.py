"""Count what gradients cost a training step in memory, with and without `GradientRelease`.

Counts of the CPU's allocator, the same at every run; see README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import accumulate

import torch
from throughput.arguments import output, positive
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from czm_fused import FusedCZMSGD, convert, czm_param_groups
from czm_fused.gradient_release import GradientRelease
from czm_fused.models import cifar_resnet

# Images of few pixels, so that gradients, not activations, are what a backward pass holds.
IMAGE_SIZE = 32
MODELS = ("resnet110", "resnet50", "vgg16")


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
        model: one of `MODELS`.
        batch: images.
        released: whether gradients are released in backward.
    """

    def __init__(self, model: str, batch: int, released: bool) -> None:
        self.model = build(model)
        self.optimizer = FusedCZMSGD(czm_param_groups(self.model), lr=1e-3, momentum=0.9)
        self.images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE)
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

    def rows(self) -> dict[str, int]:
        """Return the bytes of gradients at their peak, and of all that a step allocates."""
        self.gradient_peak = 0
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self()
        # As they come: the profiler's own sums leave out what an operator has counted already.
        events = profiler.profiler.kineto_results.events()
        changes = [
            (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
        ]
        peak = max(accumulate(nbytes for _, nbytes in sorted(changes)))
        return {"gradient_bytes": self.gradient_peak, "allocated_bytes": peak}

    def _count(self, _: Tensor) -> None:
        storages = {
            param.grad.untyped_storage()._cdata: param.grad.untyped_storage().nbytes()
            for param in self.model.parameters()
            if param.grad is not None
        }
        self.gradient_peak = max(self.gradient_peak, sum(storages.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print a table, write the rows; return 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=positive(int), default=8, help="images (default: 8)")
    parser.add_argument("--json", type=output, help="write the rows to this file")
    options = parser.parse_args(arguments)

    rows = []
    print(f"{'model':12}{'gradients':>12}{'at their peak, MB':>20}{'a step allocates, MB':>24}")
    for model in options.model:
        for released in (False, True):
            step = Step(model, options.batch, released)
            row = {
                "model": model,
                "batch": options.batch,
                "image_size": IMAGE_SIZE,
                "gradients": "released" if released else "kept",
                "parameter_bytes": sum(p.nbytes for p in step.model.parameters()),
                **step.rows(),
            }
            rows.append(row)
            peak, allocated = row["gradient_bytes"] / 1e6, row["allocated_bytes"] / 1e6
            print(f"{model:12}{row['gradients']:>12}{peak:20.1f}{allocated:24.1f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
