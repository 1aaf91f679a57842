"""Time and count what a training step of a converted network costs, against BatchNorm's.

The networks are those of `convert_networks.py`, each trained as there; see README.md beside this
file for what is measured and how.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from common import plot, timing
from common.agreement import relative_error, require
from common.counting import saved_bytes
from common.options import Options, parse
from common.rows import Results, frame
from common.table import table
from conversion.networks import CLASSES, NETWORKS
from conversion.training import DEPTHWISE, Settings, build, clip_gradients, optimizer_of
from convert_networks import settings_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from czm_fused import center_

_MOST_ROUNDS = 1000
_PROVIDERS = ("batchnorm", "floor", "converted", "noisy", "centred")
# The rate does not change what a step costs; at this one, nothing diverges on noise.
_RATE = 1e-4


@dataclass(kw_only=True)
class CostOptions(Options):
    """Options of the benchmark of converted networks."""

    model: tuple[
        Literal[
            "six_layers", "vgg16_half", "resnet18", "resnet50", "mobilenet_v2", "densenet",
            "efficientnet_b0", "shufflenet_v2", "regnety_002",
        ], ...,
    ] = tuple(NETWORKS)  # type: ignore[assignment]  # fmt: skip
    """The networks."""
    batch: int = 64
    """Images a step."""
    seconds: float = 30.0
    """Of timing for each network; 0: count, do not time."""
    autocast: bool = True
    """To bfloat16, as the protocol trains all networks but the depthwise ones; else float32."""

    def check(self) -> None:
        """Check what the types do not."""
        super().check()
        self.at_least(16, "batch")
        self.at_least(0, "seconds")


class Training:
    """Training steps of one network by one method.

    Args:
        network: one of `NETWORKS`.
        provider: "batchnorm"; "floor", the network without its BatchNorm and with nothing in its
            place, under momentum SGD: no method is cheaper; "converted", by `convert` alone;
            "noisy", the same with noise 0.1; or "centred", with `center_` and all else that the
            settings of the network ask for.
        images, labels: a batch.
        use_autocast: to bfloat16.
    """

    def __init__(
        self, network: str, provider: str, images: Tensor, labels: Tensor, use_autocast: bool
    ) -> None:
        self.images, self.labels = images, labels
        method = "bn" if provider in ("batchnorm", "floor") else "czm"
        settings: dict[str, Any] = {"clip": 0.0, "noise": 0.1 if provider == "noisy" else 0.0}
        if provider == "centred":
            settings = settings_of(network, {})
        self.settings = Settings(network, method, lr=_RATE, **settings)
        self.model = build(self.settings, images).train()
        if provider == "floor":
            _without_batch_norm(self.model)
        self.optimizer = optimizer_of(self.model, self.settings)
        self.use_autocast = use_autocast

    def forward(self) -> Tensor:
        """Return the logits."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.use_autocast):
            logits: Tensor = self.model(self.images)
        return logits

    def step(self) -> None:
        """Run forward, backward, what the settings do to gradients, and the optimizer's step."""
        loss = F.cross_entropy(self.forward().float(), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        clip_gradients(self.model, self.settings)
        self.optimizer.step()

    def center(self) -> None:
        """Measure the means anew, as every `center_every` steps."""
        center_(self.model, self.images)


def _without_batch_norm(model: nn.Module) -> None:
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            # timm's holds the activation that follows it.
            setattr(model, name, getattr(child, "act", nn.Identity()))
        else:
            _without_batch_norm(child)


def _check_centred(training: Training) -> None:
    """Check that `center_` leaves the logits as they are."""
    model = training.model.eval()
    with torch.no_grad():
        before = model(training.images)
        training.center()
        after = model(training.images)
    model.train()
    # Each layer rounds its sums to 2^-24 of their size, and passes on what reached it.
    layers = sum(isinstance(each, nn.Conv2d) for each in model.modules())
    require("centred", "the converted network", relative_error(after, before), layers * 2**-20)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0."""
    options = parse(CostOptions, arguments, "Time a training step of converted networks.")
    device = options.torch_device
    results = Results("conversion_cost", device, options.json)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, 16, 16, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (options.batch,), device=device)
    for model in options.model:
        use_autocast = options.autocast and model not in DEPTHWISE
        trainings = {
            each: Training(model, each, images, labels, use_autocast) for each in _PROVIDERS
        }
        _check_centred(trainings["centred"])
        config = {"batch": options.batch, "autocast": "bfloat16" if use_autocast else "float32"}
        for provider, training in trainings.items():
            with torch.autocast(device.type, torch.bfloat16, enabled=use_autocast):
                kept = saved_bytes(training.model, images)
            results.add(model, provider, "saved_bytes", "bytes", kept, **config)
        if options.seconds:
            calls = [*(each.step for each in trainings.values()), trainings["centred"].center]
            timer = timing.ClockTimer(device)
            times, _ = timing.time_rounds(calls, timer, _MOST_ROUNDS, options.seconds)
            # Each step bears its share of measuring the means.
            times[:, -2] += times[:, -1] / trainings["centred"].settings.center_every
            for number, provider in enumerate(_PROVIDERS):
                results.add(model, provider, "step", "us", times[:, number], **config)
    rows = frame(results.rows)
    print(table(rows, baseline="batchnorm", shares=("step", "saved_bytes")))
    if options.plot and options.seconds:
        plot.compare(rows, options.plot, ["step", "saved_bytes"], "batchnorm", ours="c")
    return 0


if __name__ == "__main__":
    sys.exit(main())
