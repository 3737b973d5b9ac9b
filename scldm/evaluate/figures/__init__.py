"""The figures of a report, each a function of the evaluation dict that returns a matplotlib Figure.

Reading order: looks.py (colours, text), scores.py, response.py, cells.py, genes.py, curves.py. Here: all of them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

from matplotlib.figure import Figure

from scldm.evaluate.figures.cells import library_sizes, umap
from scldm.evaluate.figures.curves import drawn_panels, loss_curves
from scldm.evaluate.figures.genes import genes, marker_changes, marker_dots
from scldm.evaluate.figures.looks import style
from scldm.evaluate.figures.response import drawn_responses, responses
from scldm.evaluate.figures.scores import heat_map, scores

FIGURES: Mapping[str, Callable[[dict], Figure]] = {
    "scores": scores,
    "heat_map": heat_map,
    "responses": responses,
    "umap": umap,
    "marker_dots": marker_dots,
    "marker_changes": marker_changes,
    "genes": genes,
    "library_sizes": library_sizes,
    "loss_curves": loss_curves,
}


def has(evaluation: dict, name: str) -> bool:
    """Whether there is something to draw: no curves without runs, no heat map without combinations."""
    needed = {
        "heat_map": lambda: evaluation.get("per_combination"),
        "responses": lambda: drawn_responses(evaluation),
        "marker_dots": lambda: evaluation.get("markers"),
        "marker_changes": lambda: evaluation.get("markers"),
        "loss_curves": lambda: drawn_panels(evaluation),
    }
    return name not in needed or bool(needed[name]())


def png(evaluation: dict, name: str) -> bytes:
    """A figure in the report's style, as the bytes of a PNG file."""
    return drawn(lambda: FIGURES[name](evaluation))


def drawn(make: Callable[[], Figure]) -> bytes:
    buffer = io.BytesIO()
    with style():
        make().savefig(buffer, format="png")
    return buffer.getvalue()
