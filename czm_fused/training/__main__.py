"""`czm-train`, also `python -m czm_fused.training`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from . import checkpoint
from .cli import parse
from .errors import TrainingError
from .run import run_together
from .sweep import commands

BAD_INPUT = 2
INTERRUPTED = 130

COMMANDS = {"table1": commands.table1, "figures": commands.figures}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit status.

    The first argument may name one of `COMMANDS`, which gets the rest; otherwise one run is
    trained.

    Args:
        arguments: of the command line, `sys.argv`'s by default.

    Returns:
        0 on success, 2 when the input is bad or the loss diverges, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = COMMANDS.get(arguments[0]) if arguments else None
    invocation = None
    try:
        if command is not None:
            command(arguments[1:])
        else:
            invocation = parse(arguments)
            run_together(invocation.runs)
    except TrainingError as error:
        print(f"czm-train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        if command is not None:
            hint = "the same command goes on from here"
        elif invocation is not None and any(
            Path(settings.out, checkpoint.FILE_NAME).exists() for settings, _ in invocation.runs
        ):
            hint = f"continue with: czm-train {invocation.to_resume}"
        else:
            hint = "nothing was saved yet"
        print(f"czm-train: interrupted; {hint}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
