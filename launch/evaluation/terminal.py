"""Tables in the terminal, as every evaluation prints them."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def console(width: int = 112) -> Console:
    """At least so wide: a narrow terminal then wraps, and hides no digits. Labels are text, not markup."""
    return Console(width=max(Console().width, width), highlight=False, markup=False, emoji=False)


def started(title: str, columns: Sequence[str], names: Sequence[str] = ("",)) -> Table:
    """A table without rows: columns of names on the left, then those of numbers."""
    table = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name, no_wrap=True)
    for column in columns:  # a long title takes two lines, and no digit is cut off
        table.add_column(column, justify="right", min_width=7)
    return table
