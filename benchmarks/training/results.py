"""The rows, and the table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from czm_fused._internal.text import format_table

KEYS = (
    "model",
    "provider",
    "options",
    "device",
    "batch",
    "seeds",
    "workers",
    "p20_us",
    "p50_us",
    "p80_us",
    "images_per_second",
    "input_us",
    "input_share",
    "seconds_200_epochs",
    "speedup",
    "speedup_of_defaults",
)

Row = dict[str, Any]

_CIFAR_IMAGES = 50_000
_EPOCHS = 200


def row(
    model: str,
    provider: str,
    options: str,
    device: str,
    batch: int,
    seeds: int,
    workers: int,
    percentiles: dict[str, float],
    input_us: float,
) -> Row:
    """Return a row without its speed-ups, which need the others.

    Args:
        percentiles: of the time of a step (of all seeds), in microseconds, as `report` makes them.
        input_us: of a step's input alone.
    """
    step = percentiles["p50_us"]
    values = {
        "model": model,
        "provider": provider,
        "options": options,
        "device": device,
        "batch": batch,
        "seeds": seeds,
        "workers": workers,
        **percentiles,
        "images_per_second": seeds * batch / step * 1e6,
        "input_us": input_us,
        "input_share": seeds * input_us / step,
        "seconds_200_epochs": _EPOCHS * -(-_CIFAR_IMAGES // batch) * step / 1e6,
        "speedup": None,
        "speedup_of_defaults": None,
    }
    return {key: values[key] for key in KEYS}


def compare(rows: Sequence[Row]) -> None:
    """Fill the speed-ups in: a row's images a second over those of the fastest plain loop.

    `speedup` is over the plain loop with the row's options (a CUDA graph, which the plain loop has
    none of, apart), `speedup_of_defaults` over the plain loop without options.
    """

    def fastest(options: str) -> float | None:
        found = [
            each["images_per_second"]
            for each in rows
            if each["provider"] == "pytorch" and each["options"] == options
        ]
        return max(found, default=None)

    defaults = fastest("float32")
    for each in rows:
        alike = [name for name in each["options"].split("+") if name != "cuda_graph"]
        like = fastest("+".join(alike) or "float32")
        speed = each["images_per_second"]
        each["speedup"] = None if like is None else speed / like
        each["speedup_of_defaults"] = None if defaults is None else speed / defaults


def table(rows: Sequence[Row]) -> str:
    """Lay rows out in columns, for a terminal."""
    cells = [
        ["provider", "options", "seeds", "workers", "p20 ms", "p50 ms", "p80 ms", "images/s",
         "input", "200 epochs", "x pytorch", "x its defaults"]
    ]  # fmt: skip
    for each in rows:
        cells.append(
            [
                each["provider"],
                each["options"],
                str(each["seeds"]),
                str(each["workers"]),
                *(f"{each[key] / 1e3:.2f}" for key in ("p20_us", "p50_us", "p80_us")),
                f"{each['images_per_second']:.0f}",
                f"{each['input_share']:.1%}",
                f"{each['seconds_200_epochs']:.0f} s",
                *(_ratio(each[key]) for key in ("speedup", "speedup_of_defaults")),
            ]
        )
    return format_table(cells, right_aligned=range(2, len(cells[0])))


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
