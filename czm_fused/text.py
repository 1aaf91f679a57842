"""Tables and lists of names, for objects that print what was decided."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def format_table(rows: Sequence[Sequence[str]], right_aligned: Collection[int] = ()) -> str:
    """Return `rows`, the first of them the header, in aligned columns.

    Args:
        rows: the cells, as many in each row.
        right_aligned: the indices of the columns whose cells end at the same place.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if column in right_aligned else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def shorten(names: Sequence[str], most: int = 3) -> str:
    """Return the first `most` names, and how many there are if there are more."""
    return ", ".join(names[:most]) + (f", ... ({len(names)})" if len(names) > most else "")
