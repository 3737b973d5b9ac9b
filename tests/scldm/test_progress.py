"""Progress without a terminal: a line a minute and one at the end, on the rank that shows it."""

from __future__ import annotations

import sys
import types

import pytest

from scldm import progress
from scldm.progress import Progress


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_one_line_a_minute_and_one_at_the_end(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    with Progress("train vae", total=2_000, unit="steps") as bar:
        for _ in range(20):
            clock.now += 6.5
            bar.advance(100, "nll 532.1")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "train vae: 1,000 of 2,000 steps, 15/s, 65 s left, nll 532.1",
        "train vae: 2,000 of 2,000 steps, 15/s, 130.0 s, nll 532.1",
    ]


def test_the_rate_counts_only_what_this_run_did(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    with Progress("encode", total=1_000, unit="cells", done=900) as bar:
        clock.now += 10
        bar.advance(50)
    assert capsys.readouterr().err == "encode: 950 of 1,000 cells, 5/s, 10 s left\n"


def test_other_ranks_are_silent(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    with Progress("encode", total=2, unit="cells", shown=False) as bar:
        clock.now += 100
        bar.advance(2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("encode", total=3, unit="cells") as bar:
        bar.advance(3, "done so far")
        assert bar.bar is not None
    shown = capsys.readouterr().err
    assert "encode" in shown
    assert "3/3" in shown
    assert "done so far" in shown


class Notebook:
    """Stands for IPython within a kernel; what a browser would show, drawing by drawing."""

    def __init__(self) -> None:
        self.drawn: list[str] = []
        self.kernel = self
        self.display = self.update = self.draw

    def get_ipython(self) -> Notebook:
        return self

    def HTML(self, text: str) -> str:
        return text

    def draw(self, text: str, display_id: bool = False) -> Notebook:
        self.drawn.append(text)
        return self


def test_a_notebook_gets_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    notebook = Notebook()
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    with Progress("encode", total=400, unit="cells") as bar:
        for _ in range(4):
            clock.now += 0.2
            bar.advance(100, "<b>")
    first, *_, last = notebook.drawn
    assert first == '<progress value="0" max="400"></progress> encode: 0 of 400 cells, 0/s, 0 s left'
    assert '<progress value="400" max="400"></progress> encode: 400 of 400 cells' in last
    assert last.endswith("&lt;b&gt;")
    assert len(notebook.drawn) == 4  # the first, two of four in time, and the last
    assert capsys.readouterr().err == ""


def test_ipython_in_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook()
    del notebook.kernel
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    assert not progress.in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not progress.in_notebook()


def test_an_ipython_that_another_thread_imports_meanwhile_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))  # as mlflow's import leaves it for a while
    assert not progress.in_notebook()
