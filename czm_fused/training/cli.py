"""The command line of `czm-train`, made from `Config`."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from . import checkpoint
from .config import (
    Config,
    ResolvedConfig,
    check_resumed,
    defaults_of,
    from_saved,
    option,
    with_values,
)
from .errors import TrainingError
from .run import prepare_folder

T = TypeVar("T")

DESCRIPTION = """\
Train a CIFAR residual network without BatchNorm (arXiv 1911.13173), or with.

czm-train table1 trains the paper's Table 1, czm-train figures draws its figures, czm-train tune
searches the options: each has a --help of its own. --tyro-print-completion SHELL prints the
completion for a shell."""


@dataclass(frozen=True, kw_only=True)
class CommandLine(Config):
    """The options of a run, and what the command line alone decides."""

    flip: bool = False
    """Mirror images left to right at random."""
    resume: str | None = None
    """Go on from this checkpoint or folder of a run, without a value from --out. Its options apply;
    --epochs (of steps), --device (of the same kind), --out and options of speed may change."""
    overwrite: bool = False
    """Replace the run that --out holds, if any."""
    config: str | None = None
    """A YAML file of options, such as lr: 0.2; the command line overrides it."""


@dataclass(frozen=True, kw_only=True)
class _First:
    """The options that decide the defaults of the others."""

    method: str | None = None
    dataset: str | None = None
    resume: str | None = None
    config: str | None = None


def read(
    kind: type[T], arguments: Sequence[str], *, default: T | None = None, **keywords: Any
) -> Any:
    """Read `arguments` into the dataclass `kind`, by tyro.

    Raises:
        SystemExit: tyro's, after printing help (status 0) or an error (status 2).
    """
    import tyro

    arguments = _with_value(arguments, "--resume", "")
    return tyro.cli(kind, args=arguments, default=default, **keywords)


def parse(arguments: Sequence[str]) -> tuple[ResolvedConfig, dict[str, Any] | None]:
    """Return the config of a run and the checkpoint that it resumes, or None.

    Raises:
        TrainingError: a value is out of range, does not fit the checkpoint, or would replace a run
            that nobody asked to replace.
        SystemExit: tyro's.
    """
    arguments = _with_value(arguments, "--resume", "")
    base, first = _base(arguments)
    resumed = saved = source = None
    if first.resume is not None:
        source = Path(first.resume or _resolve(_command_line(arguments, base)).out)
        resumed = checkpoint.load(source)
        source = source if source.is_dir() else source.parent
        saved = from_saved(resumed.get("config"))
        values = {**_values(saved), "out": str(source), **_yaml(first.config)}
        base = with_values(Config(), values, f"--config {first.config}")
    line = _command_line(arguments, base)
    config = _resolve(line)
    if saved is not None and source is not None:
        check_resumed(config, saved)
        prepare_folder(config, line.overwrite or Path(config.out).resolve() == source.resolve())
    else:
        prepare_folder(config, line.overwrite)
    return config, resumed


def parse_options(arguments: Sequence[str], base: Config | None = None) -> Config:
    """Return the options of `czm-train` in `arguments`, over the defaults in `base`.

    Args:
        base: None takes the defaults of the method and the data set in `arguments`.

    Raises:
        TrainingError: an option of a single run is among them, or the YAML file cannot be read.
        SystemExit: tyro's.
    """
    found, first = _base(arguments)
    if base is None:
        base = found
    else:
        base = with_values(base, _yaml(first.config), f"--config {first.config}")
    line = _command_line(arguments, base)
    if line.resume is not None or line.overwrite:
        name = "--overwrite" if line.overwrite else "--resume"
        raise TrainingError(f"{name} is for a single run: leave it out, the same command resumes")
    return Config(**_values(line))


def _base(arguments: Sequence[str]) -> tuple[Config, _First]:
    """Return the defaults of the method and the data set that `arguments` name."""
    if any(each.startswith("--tyro-") for each in arguments):
        return Config(), _First()
    first, _ = read(_First, arguments, add_help=False, return_unknown_args=True)
    values = _yaml(first.config)
    source = f"--config {first.config}"
    with_values(Config(), values, source)
    method = first.method or values.get("method", Config.method)
    dataset = first.dataset or values.get("dataset", Config.dataset)
    try:
        defaults = defaults_of(method, dataset)
    except (KeyError, TypeError):
        defaults = {}  # the whole parser names what is wrong
    return with_values(Config(), {**defaults, **values}, source), first


def _command_line(arguments: Sequence[str], base: Config) -> CommandLine:
    values = _values(base)
    values["flip"] = bool(values["flip"])
    line: CommandLine = read(
        CommandLine,
        arguments,
        default=CommandLine(**values),
        prog="czm-train",
        description=DESCRIPTION,
    )
    return line


def _values(config: Config) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(Config)}


def _resolve(line: CommandLine) -> ResolvedConfig:
    return Config(**_values(line)).resolve()


def _yaml(path: str | None) -> dict[str, Any]:
    """Return the options in the YAML file `path`.

    Raises:
        TrainingError: it cannot be read, or is no mapping.
    """
    if path is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TrainingError(f"cannot read --config {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise TrainingError(f"--config {path} must hold lines as lr: 0.2: one an option")
    return values


def _with_value(arguments: Sequence[str], name: str, value: str) -> list[str]:
    """Give the option `name` a `value` where it has none."""
    found = []
    for place, argument in enumerate(arguments):
        follower = arguments[place + 1] if place + 1 < len(arguments) else "--"
        is_bare = argument == name and follower.startswith("-")
        found.append(f"{name}={value}" if is_bare else argument)
    return found


def command_of(config: Config, base: dict[str, Any]) -> str:
    """Return the command line that trains `config`, without the options that `base` holds."""
    parts = ["czm-train"]
    for field in fields(Config):
        value = getattr(config, field.name)
        if value == base.get(field.name, field.default) or value is None:
            continue
        if isinstance(value, bool):
            parts.append(option(field.name) if value else f"--no-{option(field.name)[2:]}")
        elif isinstance(value, tuple):
            parts.append(" ".join([option(field.name), *map(str, value)]))
        else:
            parts.append(f"{option(field.name)} {value}")
    return " ".join(parts)
