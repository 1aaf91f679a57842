"""Convert well-known networks and train each for a few steps on real images, without a NaN.

Prints one JSON row a network: `model, mode, image_size, batch, steps, gain, lr, lr_rest, removed,
folded, affine, left, first_loss, last_loss, finite, seconds`. The losses are means over the first
and the last five steps, null where they are not finite. Ends with status 1 if a loss, a weight or
an output is not finite.

    python benchmarks/convert_networks.py --data-dir cifar10/test --json convert.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from czm_fused import FusedCZMSGD, convert, czm_param_groups, plan_conversion

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda classes: models.resnet18(num_classes=classes),
    "resnet34": lambda classes: models.resnet34(num_classes=classes),
    "resnet50": lambda classes: models.resnet50(num_classes=classes),
    "resnext50_32x4d": lambda classes: models.resnext50_32x4d(num_classes=classes),
    "wide_resnet50_2": lambda classes: models.wide_resnet50_2(num_classes=classes),
    "vgg16_bn": lambda classes: models.vgg16_bn(num_classes=classes),
    "mobilenet_v2": lambda classes: models.mobilenet_v2(num_classes=classes),
    "densenet121": lambda classes: models.densenet121(num_classes=classes),
    "googlenet": lambda classes: models.googlenet(num_classes=classes, init_weights=False),
    "timm_resnet50": lambda classes: timm.create_model("resnet50", num_classes=classes),
    "timm_regnety_002": lambda classes: timm.create_model("regnety_002", num_classes=classes),
}


def train(
    name: str, data: ImageFolder, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Convert one network, train it, and return its row."""
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    model = NETWORKS[name](len(data.classes)).to(device)
    example = torch.zeros(1, 3, args.image_size, args.image_size, device=device)
    pretrained = args.mode == "from_pretrained"
    plan = plan_conversion(model, example_input=example, from_pretrained=pretrained)
    convert(
        model,
        example_input=example,
        from_pretrained=pretrained,
        gain=None if pretrained else args.gain,
    )
    groups = czm_param_groups(model, overrides={"rest": {"lr": args.lr_rest}})
    optimizer = FusedCZMSGD(groups, lr=args.lr, momentum=0.9)
    model.train()
    losses = []
    for images, labels in batches(data, args.batch, args.steps):
        optimizer.zero_grad()
        loss = loss_of(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights_are_finite = all(bool(p.isfinite().all()) for p in model.parameters())
    model.eval()
    with torch.no_grad():
        output_is_finite = bool(model(images.to(device)).isfinite().all())
    counts = Counter(change.action for change in plan.changes)
    return {
        "model": name,
        "mode": args.mode,
        "image_size": args.image_size,
        "batch": args.batch,
        "steps": len(losses),
        "gain": args.gain,
        "lr": args.lr,
        "lr_rest": args.lr_rest,
        **{action: counts[action] for action in ("removed", "folded", "affine", "left")},
        "first_loss": mean(losses[:5]),
        "last_loss": mean(losses[-5:]),
        "finite": all(map(math.isfinite, losses)) and weights_are_finite and output_is_finite,
        "seconds": round(time.perf_counter() - started, 1),
    }


def mean(losses: list[float]) -> float | None:
    """Return the mean to four digits, or None where JSON has no number for it."""
    value = sum(losses) / len(losses)
    return round(value, 4) if math.isfinite(value) else None


def batches(data: ImageFolder, size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `steps` shuffled batches, beginning anew when the images run out."""
    loader = DataLoader(data, size, shuffle=True, drop_last=True)
    while steps > 0:
        for batch in loader:
            yield batch
            steps -= 1
            if steps == 0:
                return


def loss_of(output: Any, labels: Tensor) -> Tensor:
    """Return the cross-entropy; GoogLeNet's two auxiliary heads count 0.3 each, as in its paper."""
    if isinstance(output, Tensor):
        return F.cross_entropy(output, labels)
    auxiliary = sum(
        F.cross_entropy(each, labels) for each in (output.aux_logits1, output.aux_logits2)
    )
    return F.cross_entropy(output.logits, labels) + 0.3 * auxiliary


def load(folder: Path, size: int) -> ImageFolder:
    """Return the images of `folder` (one sub-folder a class), resized, with values about 0."""
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((size, size), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )
    return ImageFolder(folder, transform)


def main() -> int:
    """Run the script, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="one sub-folder a class")
    parser.add_argument("--model", nargs="+", choices=[*NETWORKS, "all"], default=["all"])
    parser.add_argument("--mode", choices=["scratch", "from_pretrained"], default="scratch")
    parser.add_argument("--image-size", type=int, default=64, help="pixels (default 64)")
    parser.add_argument("--batch", type=int, default=16, help="images a step (default 16)")
    parser.add_argument("--steps", type=int, default=50, help="default 50")
    parser.add_argument("--gain", type=float, default=0.8, help="norm of a filter (default 0.8)")
    parser.add_argument("--lr", type=float, default=0.1, help="of the filters (default 0.1)")
    parser.add_argument("--lr-rest", type=float, default=0.01, help="of all else (default 0.01)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--json", type=Path, help="write the rows here, one a line")
    args = parser.parse_args()

    data = load(args.data_dir, args.image_size)
    rows = []
    for name in NETWORKS if "all" in args.model else args.model:
        rows.append(train(name, data, args, args.device))
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0 if all(row["finite"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
