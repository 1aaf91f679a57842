"""The command lines of `czm-train table1` and `czm-train figures`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..cli import make_parser
from ..errors import TrainingError
from ..extras import require
from ..settings import option
from .folder import SweepFolder
from .rows import TABLE1, check_given, find

DEFAULT_FOLDER = "runs/table1"


def table1(arguments: Sequence[str]) -> None:
    """Train the rows of Table 1, or what is left of them, and print the table.

    Raises:
        TrainingError: the input is bad, or runs had to be passed over.
        SystemExit: argparse's.
    """
    known, others = _table1_parser().parse_known_args(arguments)
    given = vars(make_parser().parse_args(others))
    check_given(given)
    for name, value in (("seeds", known.seeds), ("parallel-seeds", known.parallel_seeds)):
        if value < 1:
            raise TrainingError(f"--{name} must be at least 1, but was {value}")
    rows = find(known.rows) if known.rows else list(TABLE1)
    require("scipy", "filelock")
    from .report import write_report

    folder = SweepFolder(Path(known.out))
    if known.report:
        if given:
            name = option(next(iter(given)))
            raise TrainingError(f"{name} has no effect on --report: leave it out")
        print(write_report(folder))
        return
    require("tqdm", "matplotlib", "tensorboard")
    from .runner import Sweep

    folder.open(given)
    sweep = Sweep(folder, rows, range(known.seeds), given, known.parallel_seeds)
    sweep.train()
    print("\n" + write_report(folder))
    elsewhere = [run for run in sweep.left() if run not in sweep.trouble]
    if elsewhere:
        print(f"left to the processes that train them: {len(elsewhere)} of {len(sweep.runs)} runs")
    if sweep.trouble:
        (row, seed), reason = next(iter(sweep.trouble.items()))
        raise TrainingError(
            f"passed over {len(sweep.trouble)} of {len(sweep.runs)} runs, the first of them "
            f"{folder.run_folder(row, seed)}: {reason}"
        )


def figures(arguments: Sequence[str]) -> None:
    """Draw the figures of the runs in a folder.

    Raises:
        TrainingError: there are none, or they cannot be compared.
        SystemExit: argparse's.
    """
    known = _figures_parser().parse_args(arguments)
    require("matplotlib")
    from .figures import draw

    folder = Path(known.folder)
    for path in draw(folder, Path(known.out) if known.out else folder / "figures"):
        print(path)


def _table1_parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {row.name}" for row in TABLE1)
    parser = argparse.ArgumentParser(
        prog="czm-train table1",
        usage="czm-train table1 [--out DIR] [--seeds N] [--parallel-seeds K] [--rows ROW ...]\n"
        "                        [options of czm-train]\n"
        "       czm-train table1 [--out DIR] --report",
        description="Train the rows of the paper's Table 1, by default ResNet110 on CIFAR-10, and\n"
        "print the table. Interrupted or killed, the same command goes on where it was.\n"
        "Several processes may share one folder, on several machines if its file system\n"
        "carries flock between them, as NFS does.",
        epilog=f"rows:\n{names}\n\n"
        "The options of czm-train (see czm-train --help) apply to all runs, but\n"
        "--weight-decay to BatchNorm alone, and --head-lr, --luma, --classifier-luma,\n"
        "--residual-bias, --gain and --stem to the other rows.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default=DEFAULT_FOLDER,
        help=f"holds a folder for each run (default: {DEFAULT_FOLDER})",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", default=8, help="train seeds 0 to N-1 (default: 8)"
    )
    parser.add_argument(
        "--parallel-seeds",
        type=int,
        metavar="K",
        default=1,
        help="train K seeds of a row together on one device (default: 1)",
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: all eleven")
    parser.add_argument(
        "--report",
        action="store_true",
        help="train nothing; print the table of the complete runs anywhere under --out",
    )
    return parser


def _figures_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="czm-train figures",
        description="Draw training and test accuracy over the epochs, filter magnitudes and "
        "common-mode rejection from the logs of the runs under DIR.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder",
        metavar="DIR",
        nargs="?",
        default=DEFAULT_FOLDER,
        help=f"of table1, or of several runs of czm-train (default: {DEFAULT_FOLDER})",
    )
    parser.add_argument("--out", metavar="DIR", help="for the PNG files (default: DIR/figures)")
    return parser
