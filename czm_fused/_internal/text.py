"""Tables and lists of names, for objects that print a decision."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Collection, Sequence
from html import escape
from itertools import accumulate


class Tabular:
    """Prints as a table with notes below it, and shows as one in a notebook."""

    notes: tuple[str, ...]
    _right_aligned: Collection[int] = ()

    def _rows(self) -> list[tuple[str, ...]]:
        """Return the cells, the first row of them the header."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join([format_table(self._rows(), self._right_aligned), *self.notes])

    def _repr_html_(self) -> str:
        return format_html(self._rows(), self.notes)


def format_table(rows: Sequence[Sequence[str]], right_aligned: Collection[int] = ()) -> str:
    """Return `rows`, the first of them the header, in aligned columns.

    On a terminal that is too narrow the last columns are left out, and named below.

    Args:
        rows: the cells, as many in each row.
        right_aligned: the indices of the columns whose cells end at the same place.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ends = accumulate(width + 2 for width in widths)
    shown = max(1, sum(end - 2 <= _available_width() for end in ends))
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if column in right_aligned else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row[:shown], widths, strict=False))
        )
        lines.append("  ".join(cells).rstrip())
    if shown < len(widths):
        lines.append(f"(too narrow for: {', '.join(rows[0][shown:])})")
    return "\n".join(lines)


def _available_width() -> float:
    """Return the columns of the terminal that is printed to, if it is one."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if is_terminal else math.inf


def shorten(names: Sequence[str], most: int = 3) -> str:
    """Return the first `most` names, and how many there are if there are more."""
    return ", ".join(names[:most]) + (f", ... ({len(names)})" if len(names) > most else "")


def format_html(rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return `rows`, the first of them the header, and `notes` below as HTML for a notebook."""
    head, *body = rows
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{table}</tbody></table>{paragraphs}"


def article(noun: str) -> str:
    """Return the indefinite article of `noun`."""
    return "an" if noun[:1] in "AEIOUaeiou" else "a"
