"""Time the optimizer step of FusedCZMSGD against its rivals and against torch's SGD.

See README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from throughput import agreement, cuda, models, report, timing
from throughput.arguments import output, positive, present_device
from throughput.providers import (
    FusedCZM,
    Provider,
    Settings,
    TorchSGD,
    available_backends,
    czm_providers,
    sgd_providers,
)

from czm_fused.ops.backends import BACKENDS, choose

TIMED = Settings(lr=1e-6, luma=5e-4)
"""The learning rate keeps weights where they are for thousands of steps on the same gradients."""

BARE_SECONDS = 5.0

DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass
class Results:
    """What a run found.

    Attributes:
        rows: one a provider, with the keys `report.KEYS`.
        details: one a provider and one for each extra of CUDA: the rows' first five keys and what
            else was measured.
        problems: what went wrong without stopping the run, in words.
    """

    rows: list[report.Row] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def measure(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    backends: Sequence[str],
    rounds: int,
    seconds: float,
) -> Results:
    """Check every CZM provider on the tensors of `model`, then time all providers.

    Raises:
        agreement.DisagreementError: a provider does not compute the paper's step.
    """
    results = Results()
    shapes = models.parameter_shapes(model)
    generator = torch.Generator().manual_seed(0)
    weights = models.make_weights(shapes, dtype, device, generator)
    grads = models.make_grads(shapes, dtype, device, generator)

    czm = czm_providers(backends, weights, grads, TIMED)
    sgd = sgd_providers(weights, grads, TIMED)
    shares = agreement.check(czm, weights, grads)
    shares += agreement.errors(sgd, weights, grads, min_filter_dim=math.inf)
    rowed = [*czm, *sgd]
    for provider in rowed:
        provider.configure(TIMED)
    extras: list[Provider] = []
    if device.type == "cuda":
        extras, results.problems = cuda.extra_providers(rowed, weights, grads, TIMED)
    timed = [*rowed, *extras]
    copy_gbps = timing.copy_bandwidth(device)
    synchronize = timing.synchronizer(device)
    wall, host = timing.time_rounds([p.step for p in timed], synchronize, rounds, seconds)

    bare_us = _bare_times(backends, shapes, dtype, device, rounds)

    floor = float(np.median(wall[:, [p.name for p in rowed].index("sgd_fused")]))
    for index, provider in enumerate(timed):
        row = _row(model, provider, dtype, device, shapes, wall[:, index], floor)
        if index < len(rowed):
            results.rows.append(row)
        detail: dict[str, Any] = {
            **row,
            "rounds": len(wall),
            "host_p50_us": float(np.median(host[:, index])),
            "copy_gbps": copy_gbps,
            "share_of_copy": row["gbps"] / copy_gbps,
        }
        if index < len(rowed):
            detail["error_share_of_tolerance"] = shares[index]
            if (provider.name, provider.backend) in bare_us:
                detail["bare_p50_us"] = bare_us[provider.name, provider.backend]
        if provider.name == "czm_fused":
            detail |= timing.python_time(provider.step, synchronize, rounds)
        if device.type == "cuda":
            detail |= cuda.device_work(provider.step)
            if detail["launches"] == 0:
                results.problems.append(f"{provider.name}: the profiler saw no kernel")
            else:
                gbps = row["bytes"] / detail["device_us"] / 1e3
                detail |= {"device_gbps": gbps, "device_share_of_copy": gbps / copy_gbps}
        results.details.append(detail)
    return results


def _bare_times(
    backends: Sequence[str],
    shapes: Sequence[torch.Size],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> dict[tuple[str, str], float]:
    """Time steps of as many tensors, of one weight each: the call itself, with warm caches.

    Returns:
        The median until `step()` returned, in microseconds, of each fused provider and backend.
    """
    single = [torch.Size([1] * len(shape)) for shape in shapes]
    generator = torch.Generator().manual_seed(0)
    weights = models.make_weights(single, dtype, device, generator)
    grads = models.make_grads(single, dtype, device, generator)
    fused = [backend for backend in backends if backend != "reference"]
    steppers: list[Provider] = [FusedCZM(backend, weights, grads, TIMED) for backend in fused]
    steppers.append(TorchSGD("sgd_fused", weights, grads, TIMED, fused=True))
    synchronize = timing.synchronizer(device)
    times = {}
    for provider in steppers:
        _, host = timing.time_rounds([provider.step], synchronize, rounds, BARE_SECONDS)
        times[provider.name, provider.backend] = float(np.median(host))
    return times


def _row(
    model: str,
    provider: Provider,
    dtype: torch.dtype,
    device: torch.device,
    shapes: Sequence[torch.Size],
    times: np.ndarray,
    floor: float,
) -> report.Row:
    values = report.percentiles(times)
    moved = report.step_bytes(shapes, dtype, provider.name.startswith("czm"))
    row = {
        "model": model,
        "provider": provider.name,
        "backend": provider.backend,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        **values,
        "bytes": moved,
        "gbps": moved / values["p50_us"] / 1e3,
        "ratio_to_sgd_fused": values["p50_us"] / floor,
    }
    return {key: row[key] for key in report.KEYS}


def _print(results: Results) -> None:
    print(report.table(results.rows))
    for detail in results.details:
        who = f"{detail['provider']} ({detail['backend']})"
        notes = []
        if "error_share_of_tolerance" in detail:
            share = detail["error_share_of_tolerance"]
            notes.append(f"largest error {share:.2g} of the tolerance")
            if not share <= 1:
                notes.append("NOT A FLOOR: torch does not compute SGD here")
        if "python_p50_us" in detail:
            notes.append(
                f"Python beyond the native launch {detail['python_p50_us']:.0f} us "
                f"(launch {detail['launch_p50_us']:.0f} us)"
            )
        if "bare_p50_us" in detail:
            notes.append(f"tensors of one weight each {detail['bare_p50_us']:.0f} us")
        if "device_gbps" in detail:
            notes.append(
                f"host {detail['host_p50_us']:.0f} us, device {detail['device_us']:.0f} us, "
                f"{detail['launches']:g} launches and {detail['copies']:g} copies, "
                f"{detail['device_share_of_copy']:.0%} of the copy bandwidth"
            )
        if notes:
            print(f"  {who}: {'; '.join(notes)}")
    detail = results.details[0]
    print(f"  {detail['rounds']} rounds; a large copy ran at {detail['copy_gbps']:.1f} GB/s")
    print(flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", nargs="+", default=["resnet110"], choices=(*models.MODELS, "all"),
        help=f"whose parameter shapes; all: {', '.join(models.NAMED)} (default: resnet110)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument(
        "--backend", nargs="+", choices=BACKENDS,
        help="of czm_fused (default: every available one)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=positive(int), default=300, help="rounds at most (default: 300)"
    )
    parser.add_argument(
        "--seconds", type=positive(float), default=60.0,
        help="for each model and dtype, after how long no further round begins (default: 60)",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive(int), help="of torch (default: torch's own)")
    parser.add_argument("--json", type=output, metavar="FILE", help="write the rows")
    parser.add_argument(
        "--details", type=output, metavar="FILE",
        help="write the machine and all that was measured beside the rows, as JSON",
    )  # fmt: skip
    parser.add_argument("--plot", type=output, metavar="FILE.png", help="draw the medians")
    return parser


def _backends(requested: Sequence[str] | None, device: torch.device) -> list[str]:
    if requested:
        return [choose(device, name) for name in dict.fromkeys(requested)]
    return available_backends(device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a provider disagrees with the oracle or an extra fails."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = present_device(parser, options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        backends = _backends(options.backend, device)
        if options.plot:
            report.require_matplotlib()
    except (ImportError, RuntimeError) as error:
        parser.error(str(error))

    names = [n for name in options.model for n in (models.NAMED if name == "all" else [name])]
    facts = report.machine(device)
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n", end="\n\n", flush=True)
    everything = Results()
    for model, dtype in itertools.product(dict.fromkeys(names), dict.fromkeys(options.dtype)):
        try:
            results = measure(
                model, getattr(torch, dtype), device, backends, options.steps, options.seconds
            )
        except (agreement.DisagreementError, ImportError) as error:
            print(f"{model}, {dtype}: {error}", file=sys.stderr)
            return 1
        _print(results)
        for problem in results.problems:
            print(f"{model}, {dtype}: {problem}", file=sys.stderr)
        everything.rows += results.rows
        everything.details += results.details
        everything.problems += results.problems

    if options.json:
        options.json.write_text(json.dumps(everything.rows, indent=1) + "\n")
    if options.details:
        details = {
            "machine": facts,
            "measurements": everything.details,
            "problems": everything.problems,
        }
        options.details.write_text(json.dumps(details, indent=1) + "\n")
    if options.plot:
        report.plot(everything.rows, facts, options.plot)
    return 1 if everything.problems else 0


if __name__ == "__main__":
    sys.exit(main())
