"""The command line of `czm-train`, made by tyro from the dataclasses of options."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields
from itertools import dropwhile, pairwise, takewhile
from pathlib import Path
from typing import Any, TypeVar

from . import checkpoint
from .config import Config, check_resumed, from_saved, known, option
from .errors import TrainingError, explained

T = TypeVar("T")
C = TypeVar("C", bound="Options")


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """The options of runs on a command line, and a file of them."""

    config: str | None = None
    """A YAML file of options, such as lr: 0.2; the command line overrides it."""


@dataclass(frozen=True, kw_only=True)
class CommandLine(Options):
    """Train a CIFAR residual network without BatchNorm (arXiv 1911.13173), or with.

    czm-train table1 trains the paper's Table 1, czm-train figures draws its figures, czm-train tune
    searches the options: each has a --help of its own. --tyro-print-completion SHELL prints the
    completion for a shell, --version the version."""

    resume: str | None = None
    """Go on from this checkpoint or folder of a run, without a value from --out. Its options apply;
    --epochs (of steps), --device (of the same kind), --out, --backend, --cuda-graph and where data
    are may change."""
    overwrite: bool = False
    """Replace the run that --out holds, if any."""


def read(kind: type[T], arguments: Sequence[str], prog: str = "czm-train", **keywords: Any) -> Any:
    """Read `arguments` into the dataclass `kind`, or raise TrainingError with one line.

    Raises SystemExit after help or a completion was printed.
    """
    import tyro

    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(kind, args=arguments, prog=prog, **keywords)
    except SystemExit as stop:
        if not stop.code:
            raise
    # tyro draws a box: a title, the message, and more below a rule.
    lines = [line.strip("│╰╯─- ") for line in box.getvalue().splitlines()[1:]]
    message = " ".join(takewhile(bool, dropwhile(lambda line: not line, lines)))
    options = fields(kind)  # type: ignore[arg-type]
    names = [option(field.name) for field in options]
    flags = [option(field.name) for field in options if field.type == "bool"]
    for name in arguments if message.startswith("Unrecognized") else ():
        # tyro takes --no-flip and --batch_size as well.
        spelled = name.partition("=")[0].replace("_", "-").replace("--no-", "--", 1)
        close = difflib.get_close_matches(spelled, names, 1)
        if name.startswith("--") and close and close[0] != spelled:
            message += f"; did you mean {close[0]}?"
        elif "=" in name and spelled in flags:
            message += f"; {spelled} takes no value"
    raise TrainingError(f"{message.rstrip('.')}; see {prog} --help")


def parse(
    kind: type[C], arguments: Sequence[str], base: Sequence[str] = (), prog: str = "czm-train"
) -> C:
    """Return the options in `arguments`, over those of a YAML file, of `base`, and the defaults."""
    path = _value_of("--config", arguments)
    if path:
        prog, base = f"{prog} --config {path}", [*base, *to_arguments(_yaml(path, kind))]
    arguments = [*base, *arguments]
    chosen = (_value_of(name, arguments) for name in ("--method", "--dataset"))
    options: C = read(kind, arguments, prog, default=kind(**known(*chosen)))
    return options


def parse_run(arguments: Sequence[str]) -> tuple[CommandLine, Path | None]:
    """Return the options of a run, and the checkpoint that it resumes or None."""
    # A bare --resume resumes what is in --out.
    arguments = [
        "--resume=" if each == "--resume" and follower.startswith("-") else each
        for each, follower in pairwise([*arguments, "-"])
    ]
    resume = _value_of("--resume", arguments)
    if resume is None:
        return parse(CommandLine, arguments), None
    file = Path(resume or parse(CommandLine, arguments).run_folder)
    file = file / checkpoint.FILE_NAME if file.is_dir() else file
    saved = from_saved(checkpoint.load(file).get("config"))
    base = to_arguments({**saved.as_dict(), "out": file.parent})
    line = parse(CommandLine, arguments, base)
    check_resumed(line, saved)
    return line, file


def to_arguments(values: Mapping[str, Any]) -> list[str]:
    """Return the command line of options by name; None stands for the default."""
    found = []
    for name, value in values.items():
        if isinstance(value, bool):
            found.append(option(name if value else f"no_{name}"))
        elif isinstance(value, (list, tuple)):
            found += [option(name), *map(str, value)]
        elif value is not None:
            found.append(f"{option(name)}={value}")
    return found


def _value_of(name: str, arguments: Sequence[str]) -> str | None:
    """Return the last value that `arguments` give the option `name`, before all are read."""
    found = [
        follower if each == name else each.partition("=")[2]
        for each, follower in pairwise([*arguments, ""])
        if each.partition("=")[0] == name
    ]
    return found[-1] if found else None


def _yaml(path: str, kind: type[Options]) -> dict[str, Any]:
    import yaml

    with explained(f"cannot read --config {path}"):
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        if not isinstance(values, dict):
            raise ValueError("it must hold lines as lr: 0.2, one an option")
        for name in {"config", "resume"} & values.keys():
            raise ValueError(f"{name} must be given on the command line, not in a file")
        # YAML reads off as a boolean, which is also a word of some options.
        flags = {field.name for field in fields(kind) if field.type == "bool"}
        return {
            str(name): "off" if value is False and name not in flags else value
            for name, value in values.items()
        }
