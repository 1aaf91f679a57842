"""The options that all benchmarks share, and their command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch

_Options = TypeVar("_Options", bound="Options")

_PICTURES = (".png", ".svg", ".pdf")


@dataclass(kw_only=True)
class Options:
    """Options of every benchmark; each adds its own."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the work runs."""
    threads: int | None = None
    """Threads of torch; its own choice by default."""
    json: Path | None = None
    """File for the rows, one JSON object a line."""
    plot: Path | None = None
    """File for the picture: .png, .svg or .pdf."""

    @property
    def torch_device(self) -> torch.device:
        """The device, with its number where it is a GPU."""
        if self.device == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.device)

    def check(self) -> None:
        """Check what the types do not; subclasses add to it.

        Raises:
            ValueError: an option cannot be used; the message names it.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device on this machine")
        self.at_least(1, "threads")
        for name in ("json", "plot"):
            path = getattr(self, name)
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"--{name}: the folder {path.parent} does not exist; make it")
        if self.plot is not None and self.plot.suffix not in _PICTURES:
            raise ValueError(f"--plot must end in {', '.join(_PICTURES)}, but was {self.plot}")

    def at_least(self, least: float, *names: str) -> None:
        """Check that options, where they are given, are numbers of `least` or more.

        Raises:
            ValueError: one is smaller.
        """
        for name in names:
            given = getattr(self, name)
            if given is not None and not given >= least:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be at least {least}, but was {given}")


def parse(kind: type[_Options], arguments: Sequence[str] | None, description: str) -> _Options:
    """Return the options that a command line gives; set torch's threads by them.

    Exits with status 2 and one line on stderr if an option cannot be used.

    Args:
        kind: the options of the benchmark.
        arguments: the command line; None for the program's own.
        description: the first line of the help.
    """
    import tyro

    options = tyro.cli(kind, args=arguments, description=description)
    try:
        options.check()
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    if options.threads:
        torch.set_num_threads(options.threads)
    return options
