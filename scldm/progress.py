"""Progress that a person can read: a bar in a terminal and in a notebook, one line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from html import escape
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY_S = 60.0
DRAWN_EVERY_S = 0.25  # in a notebook, whose browser gets every bar as a message


class Progress:
    """Context manager: `with Progress("train vae", total=2_000, unit="steps") as bar: bar.advance(1, "nll 532.1")`.

    what: the stage
    total: how many units there are
    unit: their name, in the plural
    shown: False on all ranks but the first
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, shown: bool = True) -> None:
        self.what, self.total, self.unit, self.shown = what, total, unit, shown
        self.started_at, self.done = done, done
        self.note = ""
        self.bar: RichProgress | None = None
        self.shown_in_notebook: Any = None

    def __enter__(self) -> Progress:
        self.start = self.last_line = time.monotonic()
        if self.shown and in_notebook():
            from IPython.display import HTML, display  # there, since the notebook is

            self.shown_in_notebook = display(HTML(self._html(self.start)), display_id=True)
        elif self.shown and sys.stderr.isatty():
            self.bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(f"{self.unit}  {{task.fields[rate]}}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(self.what, total=self.total, completed=self.done, note="", rate="")
            self.bar.start()
        return self

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """n more units are done. `note` is shown beside them."""
        self.done += n
        self.note = self.note if note is None else note
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, advance=n, note=self.note, rate=self._rate(now))
        elif self.shown_in_notebook:
            if now - self.last_line >= DRAWN_EVERY_S:
                self.last_line = now
                self._draw(now)
        elif now - self.last_line >= LINE_EVERY_S and self.done < self.total:
            self.last_line = now
            self._line(now)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()
        elif self.shown_in_notebook:
            self._draw(time.monotonic())
        else:
            self._line(time.monotonic())

    def _rate(self, now: float) -> str:
        rate = (self.done - self.started_at) / max(now - self.start, 1e-9)
        return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"

    def _draw(self, now: float) -> None:
        """Draw the notebook's bar anew, in its place."""
        from IPython.display import HTML

        self.shown_in_notebook.update(HTML(self._html(now)))

    def _html(self, now: float) -> str:
        return f'<progress value="{self.done}" max="{self.total}"></progress> {escape(self._text(now))}'

    def _line(self, now: float) -> None:
        if self.shown:
            print(self._text(now), file=sys.stderr, flush=True)

    def _text(self, now: float) -> str:
        left = (self.total - self.done) * (now - self.start) / max(self.done - self.started_at, 1)
        parts = [f"{self.what}: {self.done:,} of {self.total:,} {self.unit}", self._rate(now)]
        parts.append(f"{left:.0f} s left" if self.done < self.total else f"{now - self.start:.1f} s")
        return ", ".join([*parts, self.note] if self.note else parts)


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel. It does not import IPython: where there is a notebook, that was.
    Elsewhere another thread may be about to, as that which imports mlflow."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return hasattr(shell(), "kernel") if shell else False
