"""`czm-train`, also `python -m czm_fused.training`."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from ..version import __version__
from .errors import TrainingError

BAD_INPUT = 2
INTERRUPTED = 130
CLOSED_OUTPUT = 141

COMMANDS = ("table1", "figures", "tune")

_ASCII = {"±": "+-", "×": "x", "‖": "||", "─": "-", "│": "|", "…": "..."}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit status.

    The first argument may name one of `COMMANDS`, which gets the rest; otherwise one run is
    trained.

    Args:
        arguments: of the command line, `sys.argv`'s by default.

    Returns:
        0 on success, 2 when the input is bad or the loss diverges, 130 after Ctrl-C, 141 when the
        reader of the output has gone.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    hint: Callable[[], str] = lambda: "the same command goes on from here"  # noqa: E731
    _prepare_terminal()
    try:
        if arguments == ["--version"]:
            print(f"czm-train {__version__}")
        elif arguments and arguments[0] in COMMANDS:
            import_module(f".sweep.{arguments[0]}", __package__).main(arguments[1:])
        else:
            from .cli import parse
            from .run import run

            hint = lambda: "nothing was saved yet"  # noqa: E731
            config, resumed = parse(arguments)
            saved = Path(config.out, "checkpoint.pt")
            hint = lambda: (  # noqa: E731
                f"continue with: czm-train --resume {config.out}"
                if saved.exists()
                else "nothing was saved yet"
            )
            run(config, resumed=resumed)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_OUTPUT
    except (TrainingError, OSError) as error:
        _complain(f"error: {error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        _complain(f"interrupted; {hint()}")
        return INTERRUPTED
    return 0


def _complain(message: str) -> None:
    print(f"czm-train: {' '.join(message.split())}", file=sys.stderr)


def _prepare_terminal() -> None:
    """Let text that the terminal's encoding lacks be printed in ASCII, and plots need no window."""
    os.environ["MPLBACKEND"] = "agg"

    def to_ascii(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        missing = error.object[error.start : error.end]
        return "".join(_ASCII.get(each, "?") for each in missing), error.end

    codecs.register_error("czm_ascii", to_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="czm_ascii")


if __name__ == "__main__":
    sys.exit(main())
