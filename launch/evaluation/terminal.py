"""Tables in the terminal, as every evaluation prints them."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST = 1_000  # characters of a line, which no table has


def console(width: int = 112) -> Console:
    """At least so wide: a narrow terminal then wraps, and hides no digits. A file or pipe gets tables as wide as they
    are. Labels are text, not markup."""
    here = Console()
    width = max(here.width, width) if here.is_terminal else WIDEST
    return Console(width=width, highlight=False, markup=False, emoji=False)


def started(title: str, columns: Sequence[str], names: Sequence[str] = ("",), min_width: int = 7) -> Table:
    """A table without rows: columns of names on the left, then those of numbers of at least so many characters."""
    table = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name, no_wrap=True)
    for column in columns:  # a long title takes two lines, and no digit is cut off
        table.add_column(column, justify="right", min_width=min_width)
    return table
