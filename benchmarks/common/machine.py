"""The record of the machine and software that a measurement belongs to."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

# The class has an attribute named torch.
_Device = torch.device


@dataclass(frozen=True)
class Machine:
    """What a row depends on beside its own configuration.

    Attributes:
        device: type of the device, "cpu" or "cuda".
        processor: name of the CPU or the GPU that ran the work.
        threads: of torch.
        torch: version of torch.
        commit: of this repository, with "-dirty" if files differ from it.
    """

    device: str
    processor: str
    threads: int
    torch: str
    commit: str

    @classmethod
    def of(cls, device: _Device) -> Machine:
        """Return the record of this machine, for work on `device`."""
        is_cuda = device.type == "cuda"
        return cls(
            device=device.type,
            processor=torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            commit=_commit(),
        )

    def __str__(self) -> str:
        return (
            f"{self.processor}, {self.threads} threads, torch {self.torch}, commit {self.commit}"
        )


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
