"""Train nine networks with BatchNorm and converted, each at the best of three rates.

Protocol: CIFAR-10 averaged to 16 pixels, batch 64, half a cosine, flips; 5,000 training images held
out to choose the rate, at the first seed; then the test accuracy at that rate, at every seed. Each
training is one JSON row; rows that are there already are not run again, so the command goes on
where it was.

    python benchmarks/convert_networks.py --data cifar10 --out results
    python benchmarks/convert_networks.py --out results --report
    python benchmarks/convert_networks.py --data cifar10 --out results --only six_layers \
        --methods czm --set clip=0 zmg=0.85 --tag no-clipping
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import statistics
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from conversion.networks import NETWORKS
from conversion.training import DEPTHWISE, Settings, train

RATES = {"bn": (0.03, 0.1, 0.3), "czm": (0.03, 0.1, 0.2)}
RATES_WITH_NORM = (0.01, 0.02, 0.05)
"""Where all filters have gradients of the same norm, which turn them by the rate alone."""

# Weight decay in place of LUMA, and a start at a smaller spread.
_DECAY = {"target": 0.3, "bias_rate": 0.1, "weight_decay": 5e-4, "luma": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "six_layers": {"zmg": 0.7},
    "vgg16_half": {**_DECAY, "zmg": 0.98},
    "regnety_002": {**_DECAY, "clip": 4.0},
    **dict.fromkeys(DEPTHWISE, {"norm": 0.1, "bias_rate": 0.1, "weight_decay": 5e-3, "luma": 0.0}),
}
"""What differs from one converted network to the next, found on the held-out images."""

CHEAPEST_FIRST = (
    "six_layers",
    "shufflenet_v2",
    "vgg16_half",
    "mobilenet_v2",
    "densenet",
    "regnety_002",
    "resnet18",
    "efficientnet_b0",
    "resnet50",
)


class Rows:
    """The rows of a file, and those that are still to be run.

    Args:
        path: of a JSONL file, which need not exist.
        data: the images, as in `conversion.data.load`; None: nothing is run.
        tag: names the settings that a row was run with.
    """

    def __init__(self, path: Path, data: Path | None, tag: str) -> None:
        self.path = path
        self.data = data
        self.tag = tag

    def read(self) -> list[dict[str, Any]]:
        """Return all rows, of every tag."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def get(self, settings: Settings) -> dict[str, Any] | None:
        """Return the row of `settings`, after running it if it is not there yet."""
        key = {**_as_dict(settings), "tag": self.tag}
        # A setting that is newer than a row had its default there.
        defaults = _as_dict(Settings(settings.network))
        for row in self.read():
            if all({**defaults, **row}[name] == value for name, value in key.items()):
                return row
        if self.data is None:
            return None
        row = {**train(settings, self.data), "tag": self.tag, **_machine()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(_line(row), flush=True)
        return row


def _as_dict(settings: Settings) -> dict[str, Any]:
    return {each.name: getattr(settings, each.name) for each in fields(settings)}


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['network']:16} {row['method']:4} lr {row['lr']:<5g} "
        f"seed {row['seed']}  held out {row['held_out']:6.2f} %  test {row['test']:6.2f} %  "
        f"loss {row['loss']:.3f}  {row['seconds']:.0f} s"
    )


def _machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {"commit": commit, "torch": torch.__version__, "machine": platform.processor()}


def settings_of(network: str, common: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a converted network; those in `common` come before all others."""
    return {"center_every": 20, "zmg": 0.85, **SETTINGS.get(network, {}), **common}


def run(
    rows: Rows, network: str, method: str, seeds: list[int], common: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the test rows of a method on a network, one a seed, at its best rate."""
    if method == "czm":
        common = settings_of(network, common)
    rates = RATES_WITH_NORM if common.get("norm") else RATES[method]
    tried = [rows.get(Settings(network, method, lr=lr, seed=seeds[0], **common)) for lr in rates]
    finished = [row for row in tried if row is not None]
    if len(finished) < len(tried):
        return []
    best = max(finished, key=lambda row: row["held_out"])["lr"]
    tested = [rows.get(Settings(network, method, lr=best, seed=seed, **common)) for seed in seeds]
    return [row for row in tested if row is not None]


def report(tests: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Return a table of the networks: accuracies by method, the gap, the logits' ratio."""
    lines = ["| network | BatchNorm (rate) | converted (rate) | gap | logits' spread, ratio | n |"]
    lines.append("|---|---|---|---|---|---|")
    for network, methods in tests.items():
        bn, czm = methods.get("bn", []), methods.get("czm", [])
        if not bn or not czm:
            continue
        gap = _mean(bn, "test") - _mean(czm, "test")
        ratio = _mean(czm, "logits") / _mean(bn, "logits")
        lines.append(
            f"| {network} | {_cell(bn)} | {_cell(czm)} | {gap:.1f} | {ratio:.2f} "
            f"| {len(bn)}, {len(czm)} |"
        )
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _cell(rows: list[dict[str, Any]]) -> str:
    values = [row["test"] for row in rows]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation} ({rows[0]['lr']:g})"


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name not in {each.name for each in fields(Settings)}:
        raise argparse.ArgumentTypeError(f"{name!r} is no setting; see conversion/training.py")
    return name, ast.literal_eval(value)


def main() -> int:
    """Run the script, and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10: {train,test}/<class>/*.png, or a .pt")
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl")
    parser.add_argument("--only", nargs="+", choices=[*NETWORKS], default=[*CHEAPEST_FIRST])
    parser.add_argument("--methods", nargs="+", choices=[*RATES], default=[*RATES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--set", type=_setting, nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument("--tag", default="", help="name of what --set makes different")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print the table; run nothing")
    args = parser.parse_args()
    if args.data is None and not args.report:
        parser.error("--data is needed, except with --report")
    if args.data is not None and not args.data.exists():
        parser.error(f"--data: there is no {args.data}")

    torch.set_num_threads(args.threads)
    rows = Rows(args.out / "rows.jsonl", None if args.report else args.data, args.tag)
    common = {"steps": args.steps, **dict(args.set)}
    tests: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for network in args.only:
        for method in args.methods:
            tests.setdefault(network, {})[method] = run(rows, network, method, args.seeds, common)
    print(report(tests))
    return 0


if __name__ == "__main__":
    sys.exit(main())
