"""Time czm-train's step loop, with each option of speed, against a plain PyTorch loop.

See README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from throughput import report, timing
from throughput.arguments import at_least, output, positive, present_device
from training import agreement, gpu, images, results
from training.czm import CZMTraining
from training.options import Options, combinations
from training.plain import PlainTraining

from czm_fused.models import blocks_per_stage
from czm_fused.training.data import Images
from czm_fused.training.errors import TrainingError

# Weights stay where they are for thousands of steps.
TIMED = {"lr": 1e-4}
# Enough to learn something in a few steps; a compiled network draws other noise.
CHECKED = {"lr": 0.01}
# Deep networks with BatchNorm amplify rounding a thousandfold in these few steps.
CHECKED_DEPTH = 8

Maker = Callable[..., agreement.Training]


def makers(
    depth: int,
    source: Images,
    batch: int,
    device: torch.device,
    all_options: Sequence[Options],
    workers: Sequence[int],
) -> list[Maker]:
    """Return what makes each training that is compared, given its learning rate and noise."""
    found: list[Maker] = []
    for options in all_options:
        where = (depth, source, batch, device, options)
        for method in ("czmig", "bn"):
            found.append(partial(_czm, method, *where))
        if not options.cuda_graph:
            found += [partial(_plain, *where, workers=count) for count in workers]
    return found


def _czm(
    method: str,
    depth: int,
    source: Images,
    batch: int,
    device: torch.device,
    options: Options,
    noise: float | None = None,
    lr: float = 0.4,
) -> CZMTraining:
    given: dict[str, object] = {"lr": lr}
    if method == "czmig":
        given["head_lr"] = lr
        if noise is not None:
            given["noise"] = noise
    return CZMTraining(method, depth, source, batch, device, options, **given)


def _plain(*where: Any, workers: int, noise: float | None = None, lr: float = 0.1) -> PlainTraining:
    return PlainTraining(*where, workers=workers, lr=lr)


def measure(
    trainings: Sequence[agreement.Training],
    model: str,
    batch: int,
    steps: int,
    device: torch.device,
    seconds: float,
    rounds: int,
) -> list[results.Row]:
    """Time short epochs of all trainings in interleaved rounds, then their input alone.

    Args:
        trainings: what is compared.
        model: its name, for the rows.
        batch: images a step.
        steps: in a short epoch.
        device: where.
        seconds: for how long; a sixth of it for the input.
        rounds: how many at most.
    """
    synchronize = timing.synchronizer(device)
    wall, _ = timing.time_rounds([t.epoch for t in trainings], synchronize, rounds, 5 * seconds / 6)
    inputs, _ = timing.time_rounds([t.input for t in trainings], synchronize, rounds, seconds / 6)
    rows = []
    for number, training in enumerate(trainings):
        rows.append(
            results.row(
                model,
                training.provider,
                str(training.options),
                device.type,
                batch,
                training.seeds,
                training.workers,
                report.percentiles(wall[:, number] / steps),
                report.percentiles(inputs[:, number] / steps)["p50_us"],
            )
        )
    results.compare(rows)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=positive(int), default=20, help="6n + 2 (default: 20)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR",
        help="train on images of DIR/train/<class>/ (default: synthetic ones)",
    )  # fmt: skip
    parser.add_argument("--batch", type=at_least(int, 2), default=128, help="default: 128")
    parser.add_argument(
        "--steps", type=positive(int), default=8,
        help="in the short epoch that is timed (default: 8)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=at_least(int, 0), nargs="+", default=[0, 2], metavar="N",
        help="of the plain loop's DataLoader, a row each (default: 0 2)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true", help="measure rows under torch.compile as well"
    )
    parser.add_argument(
        "--options", nargs="+", metavar="NAME",
        help="measure these rows alone, such as channels_last+bfloat16 (default: all)",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive(int), help="of torch (default: torch's own)")
    parser.add_argument(
        "--rounds", type=positive(int), default=200, help="at most (default: 200)"
    )
    parser.add_argument(
        "--seconds", type=positive(float), default=300.0,
        help="after how long no further round begins (default: 300)",
    )  # fmt: skip
    parser.add_argument("--json", type=output, metavar="FILE", help="write the rows")
    parser.add_argument(
        "--details", type=output, metavar="FILE",
        help="write the machine, and with --device cuda where its time goes, as JSON",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a training does not train what it should."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = present_device(parser, options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        blocks_per_stage(options.depth)
        count = options.steps * options.batch
        if options.data_dir:
            source = images.from_folder(options.data_dir, count)
        else:
            source = images.synthetic(count)
    except (ValueError, TrainingError) as error:
        parser.error(str(error))

    chosen = combinations(device, options.compile or bool(options.options))
    if options.options:
        by_name = {str(each): each for each in chosen}
        unknown = set(options.options) - set(by_name)
        if unknown:
            parser.error(f"--options has no {', '.join(unknown)}: choose from {', '.join(by_name)}")
        chosen = [by_name[name] for name in dict.fromkeys(options.options)]

    facts = report.machine(device)
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n", end="\n\n", flush=True)
    workers = list(dict.fromkeys(options.workers))
    data = (source, options.batch, device, chosen, workers)
    try:
        shallow = makers(CHECKED_DEPTH, *data)
        agreement.check([partial(each, noise=0.0, **CHECKED) for each in shallow])
    except agreement.DisagreementError as error:
        print(f"training_throughput: {error}", file=sys.stderr)
        return 1

    trainings = [each(**TIMED) for each in makers(options.depth, *data)]
    model = f"resnet{options.depth}"
    rows = measure(
        trainings, model, options.batch, options.steps, device, options.seconds, options.rounds
    )
    print(results.table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.details:
        details: dict[str, Any] = {"machine": facts}
        if device.type == "cuda":
            details["breakdown"] = [
                {key: row[key] for key in results.KEYS[:7]}
                | gpu.breakdown(training.epoch, options.steps)
                for row, training in zip(rows, trainings, strict=True)
            ]
        options.details.write_text(json.dumps(details, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
