"""The completion of a shell for `czm-train` and its commands."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, subcommand

from .cli import CommandLine, read
from .figures import Figures
from .table1 import Table1
from .tune import Tune


@dataclass(frozen=True, kw_only=True)
class Everything(CommandLine):
    """All options of `czm-train`, and of its commands."""

    command: OmitArgPrefixes[
        OmitSubcommandPrefixes[
            Annotated[Table1, subcommand("table1", default=Table1())]
            | Annotated[Figures, subcommand("figures")]
            | Annotated[Tune, subcommand("tune", default=Tune())]
        ]
    ]


def main(arguments: Sequence[str]) -> None:
    """Print the completion for the shell that `--tyro-print-completion SHELL` names."""
    script = io.StringIO()
    try:
        with redirect_stdout(script):
            read(Everything, arguments, default=Everything(command=Table1()))
    finally:
        # The lines of a description would each be offered as an option.
        print(
            re.sub(r"COMPLETION_SPEC = .*", lambda m: m[0].replace(r"\n", " "), script.getvalue())
        )
