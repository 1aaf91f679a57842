"""The options of speed, and which of their combinations are measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Options:
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


_BFLOAT16 = {"autocast": "bfloat16"}
_COMBINATIONS = (
    Options(),
    Options(channels_last=True),
    Options(**_BFLOAT16),
    Options(channels_last=True, **_BFLOAT16),
)
_ON_GPUS = (
    Options(tf32=True),
    Options(cuda_graph=True),
    Options(tf32=True, cuda_graph=True),
    Options(tf32=True, channels_last=True, cuda_graph=True),
    Options(channels_last=True, cuda_graph=True, **_BFLOAT16),
)


def combinations(device: torch.device, compiled: bool) -> list[Options]:
    """Return what is measured on `device`; those under torch.compile only if asked for."""
    found = list(_COMBINATIONS)
    if device.type == "cuda":
        found += _ON_GPUS
    if compiled:
        found += [
            Options(compile=True),
            Options(channels_last=True, compile=True, **_BFLOAT16),
        ]
        if device.type == "cuda":
            found += [
                Options(channels_last=True, compile=True, cuda_graph=True, **_BFLOAT16),
                Options(tf32=True, compile=True, cuda_graph=True),
            ]
    return found
