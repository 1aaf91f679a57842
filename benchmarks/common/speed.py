"""The options of speed of a training, and which of their combinations are measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Speed:
    """Options of `czm-train`, with its names and defaults."""

    channels_last: bool = False
    autocast: str = "off"
    tf32: bool = False
    compile: bool = False
    cuda_graph: bool = False

    def __str__(self) -> str:
        on = {name: value for name, value in asdict(self).items() if value not in (False, "off")}
        # A choice goes by what was chosen, a switch by its own name.
        return "+".join(name if value is True else value for name, value in on.items()) or "float32"

    def settings(self) -> dict[str, Any]:
        """Return them as settings of `czm-train`."""
        return asdict(self)


def combinations(device: torch.device, compiled: bool) -> dict[str, Speed]:
    """Return what is measured on `device`, by name; under torch.compile only if asked for."""
    bfloat16: dict[str, Any] = {"autocast": "bfloat16"}
    found = [
        Speed(),
        Speed(channels_last=True),
        Speed(**bfloat16),
        Speed(channels_last=True, **bfloat16),
    ]
    if device.type == "cuda":
        found += [
            Speed(tf32=True),
            Speed(cuda_graph=True),
            Speed(tf32=True, cuda_graph=True),
            Speed(tf32=True, channels_last=True, cuda_graph=True),
            Speed(channels_last=True, cuda_graph=True, **bfloat16),
        ]
    if compiled:
        found += [Speed(compile=True), Speed(channels_last=True, compile=True, **bfloat16)]
        if device.type == "cuda":
            found += [
                Speed(channels_last=True, compile=True, cuda_graph=True, **bfloat16),
                Speed(tf32=True, compile=True, cuda_graph=True),
            ]
    return {str(each): each for each in found}
