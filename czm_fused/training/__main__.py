"""`czm-train`, also `python -m czm_fused.training`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from . import checkpoint
from .cli import parse
from .errors import TrainingError
from .run import run

BAD_INPUT = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit status.

    Args:
        arguments: of the command line, `sys.argv`'s by default.

    Returns:
        0 after a complete run, 2 when the input is bad or the loss diverges, 130 after Ctrl-C.
    """
    folder = None
    try:
        invocation = parse(arguments)
        folder = Path(invocation.settings.out)
        run(invocation.settings, resumed=invocation.resumed)
    except TrainingError as error:
        print(f"czm-train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        if folder is not None and (folder / checkpoint.FILE_NAME).exists():
            hint = f"continue with: czm-train --resume {folder}"
        else:
            hint = "nothing was saved yet"
        print(f"czm-train: interrupted; {hint}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
