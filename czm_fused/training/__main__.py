"""`czm-train`, also `python -m czm_fused.training`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ..version import __version__
from .errors import TrainingError

BAD_INPUT, INTERRUPTED, CLOSED_OUTPUT = 2, 130, 141
COMMANDS = ("table1", "figures", "tune")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do as the command line says, by default `sys.argv`'s; return the exit status.

    The status is 0 on success, 2 when the input is bad or the loss diverges, 130 after Ctrl-C, and
    141 when the reader of the output has gone.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    hint = "nothing was saved yet"
    _prepare_terminal()
    try:
        if arguments == ["--version"]:
            print(f"czm-train {__version__}")
        elif arguments and arguments[0] in COMMANDS:
            hint = "the same command goes on from here"
            import_module(f".{arguments[0]}", __package__).main(arguments[1:])
        elif arguments[:1] == ["--tyro-print-completion"]:
            import_module(".completion", __package__).main(arguments)
        else:
            from .cli import parse_run
            from .run import run

            line, resume = parse_run(arguments)
            run(line, resume=resume, overwrite=line.overwrite)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_OUTPUT
    except (TrainingError, OSError) as error:
        return _complain(BAD_INPUT, f"error: {error}")
    except ImportError as error:
        return _complain(BAD_INPUT, f"error: {error}: pip install 'czm-fused[train]'")
    except KeyboardInterrupt as stop:
        return _complain(INTERRUPTED, f"interrupted; {str(stop) or hint}")
    return 0


def _complain(status: int, message: str) -> int:
    print(f"czm-train: {' '.join(message.split())}", file=sys.stderr)
    return status


def _prepare_terminal() -> None:
    """Keep a closed output, or a character that its encoding lacks, from ending a run."""
    os.environ["MPLBACKEND"] = "agg"
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
