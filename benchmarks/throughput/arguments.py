"""The types of the benchmarks' command-line arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def positive(kind: type) -> Callable[[str], Any]:
    """Return the argument type of numbers above 0."""
    return _number(kind, lambda value: value > 0, "above 0")


def at_least(kind: type, least: float) -> Callable[[str], Any]:
    """Return the argument type of numbers of `least` or more."""
    return _number(kind, lambda value: value >= least, f"{least} or more")


def output(text: str) -> Path:
    """Return the path of a file to write, whose folder must be there."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
    return path


def present_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """Return the device that `--device` names; end the program if this machine has none."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device on this machine")
    return device


def _number(kind: type, accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, but was {text}")
        return value

    # argparse names the type by it where the text is no number at all.
    parse.__name__ = kind.__name__
    return parse
