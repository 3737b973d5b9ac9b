"""One training run, or two beside each other, as one self-contained HTML page.

The page is written from facts alone, which launch/report.py reads from run folders. A run has a name, a headline,
sentences on where it is weak, rows of text by group, curves, settings, and its last preview as a PNG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scldm.evaluate.figures import drawn
from scldm.evaluate.figures.curves import run_curves, run_panels
from scldm.evaluate.report import environment
from scldm.evaluate.report_tables import DASH, Cell, Head, Table

ABOUT = {
    "data": " The set as tracking noted it when the run began. Without tracking, as it lies there now.",
    "throughput": " Medians over the logged rows.",
    "environment": " Of the last start.",
}


def run_page(runs: Sequence[Mapping[str, Any]]) -> str:
    curves = {run["name"]: run["curves"] for run in runs}
    images = {"run_curves": drawn(lambda: run_curves(curves))} if run_panels(list(curves.values())) else {}
    previews = {f"preview_{k}": run["preview"] for k, run in enumerate(runs) if run["preview"]}
    images |= previews
    title = f"Training run {runs[0]['name']}" if len(runs) == 1 else " and ".join(curves)
    heads = [[Head(""), *(Head(name, kind="name") for name in curves)]]
    groups = list(dict.fromkeys(group for run in runs for group in run["groups"]))
    facts = [(group, Table(heads, [("", beside([run["groups"].get(group, {}) for run in runs]))])) for group in groups]
    settings = beside([run["settings"] for run in runs])
    differ = [row for row in settings if len({cell.text for cell in row[1:]}) > 1]
    same = [row for row in settings if row not in differ]
    settings_by = [("different", differ), ("the same", same)] if len(runs) > 1 else [("", settings)]
    page = environment(images).get_template("run.html.j2")
    named = [(name, runs[int(name.removeprefix("preview_"))]["name"]) for name in previews]
    return page.render(
        previews=named, runs=runs, title=title, facts=facts, about=ABOUT, settings=Table(heads, settings_by)
    )


def beside(runs: Sequence[Mapping[str, str]]) -> list[list[Cell]]:
    """A row for each name that some run has, with the text of each run."""
    names = list(dict.fromkeys(name for run in runs for name in run))
    return [[Cell(name), *(Cell(run.get(name, DASH), kind="name") for run in runs)] for name in names]
