"""A shard set as one self-contained HTML page: the text of describe.py, and figures. No block is read.

The figures are computed here, as marks at places. templates/set.html.j2 writes them as SVG, and escapes every text.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_pipeline.format.describe import MANY, cells_by_label, describe_text
from data_pipeline.format.schema import Manifest, cell_column_path, gene_column_path
from data_pipeline.stores import opened
from scldm.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
WIDTH = 640  # of a figure


def describe_html(url: str, manifest: Manifest) -> str:
    """The text, and figures of splits, labels, library sizes, expressed genes and gene means."""
    files = FileSystemLoader(TEMPLATES)
    env = Environment(loader=files, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return env.get_template("set.html.j2").render(
        url=url, text=describe_text(url, manifest), width=WIDTH, figures=figures(url, manifest)
    )


def figures(url: str, manifest: Manifest) -> list[Figure]:
    found = []
    filled = [s for s in manifest.splits if s.n_cells]
    if manifest.kind == "cells":
        for column, title in (
            ("total_counts", "library size (counts a cell)"),
            ("n_expressed", "expressed genes a cell"),
        ):
            values = _load(url, cell_column_path(column))
            groups = [values[s.first_cell : s.first_cell + s.n_cells] for s in filled]
            found.append(histogram(groups, [s.name for s in filled], title))
        mean = _load(url, gene_column_path("mean"))
        found.append(scatter(mean, _load(url, gene_column_path("fraction_expressed"))))
    for name in manifest.conditions.names:
        table = cells_by_label(manifest, name)
        labels = manifest.conditions.labels[name]
        largest = np.argsort(-table.sum(axis=1), kind="stable")[: 2 * MANY]
        more = f", the {len(largest)} largest of {len(labels)} labels" if len(largest) < len(labels) else ""
        splits = [s.name for s in manifest.splits]
        found.append(bars([labels[k] for k in largest], table[largest], splits, name + more))
    return found


def _load(url: str, path: str) -> np.ndarray:
    with opened(f"{url.rstrip('/')}/{path}") as file:
        data = file.read()
    try:  # out of the store's hands: a damaged file is not a store that is away
        return np.load(io.BytesIO(data))
    except (ValueError, EOFError) as error:
        raise InputError(f"{url}: {path} is damaged ({error}). scldm shards verify says what else is") from None


# --- marks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """An SVG element: its tag, its attributes, and its text."""

    tag: str
    where: Mapping[str, str | int]
    text: str = ""


@dataclass(frozen=True)
class Figure:
    """title, height in pixels, and marks, the later above the earlier"""

    title: str
    height: int
    marks: Sequence[Mark] = ()


def _text(x: str | int, y: int, text: str, anchor: str = "start") -> Mark:
    return Mark("text", {"x": x, "y": y, "text-anchor": anchor}, text)


def _bar(x: str | int, y: int, width: str | int, height: int, colour: str) -> Mark:
    return Mark("rect", {"x": x, "y": y, "width": width, "height": height, "fill": colour})


def _colour(k: int) -> str:
    return COLOURS[k % len(COLOURS)]


def _legend(names: Sequence[str], y: int) -> list[Mark]:
    marks = []
    for k, name in enumerate(names):
        marks += [_bar(130 * k, y, 10, 10, _colour(k)), _text(130 * k + 14, y + 9, name)]
    return marks


# --- figures -------------------------------------------------------------------------------------------------------


def histogram(groups: Sequence[np.ndarray], names: Sequence[str], title: str) -> Figure:
    """Densities on a logarithmic axis, one line a group."""
    low = np.log10(max(min(g.min() for g in groups), 1))
    high = max(np.log10(max(g.max() for g in groups)), low + 0.1)
    edges = np.linspace(low, high, 61)
    marks = _legend(names, 24)
    heights = [np.histogram(np.log10(np.maximum(g, 1)), edges)[0] / max(len(g), 1) for g in groups]
    top = max(h.max() for h in heights)
    for k, h in enumerate(heights):
        points = " ".join(f"{10 + 600 * (i + 0.5) / 60:.1f},{210 - 160 * v / top:.1f}" for i, v in enumerate(h))
        line = {"fill": "none", "stroke": _colour(k), "stroke-width": "1.5", "points": points}
        marks.append(Mark("polyline", line))
    for x in np.linspace(low, high, 5):
        at = 10 + 600 * (x - low) / (high - low)
        marks.append(_text(f"{at:.0f}", 228, f"{10**x:,.0f}", "middle"))
    return Figure(title, 240, marks)


def scatter(mean: np.ndarray, fraction: np.ndarray) -> Figure:
    """Genes: mean count against share of expressing cells. Up to 3,000 of them, evenly by rank."""
    seen = np.flatnonzero(mean > 0)
    chosen = seen[np.argsort(mean[seen])][:: max(len(seen) // 3000, 1)]
    if not len(chosen):
        return Figure("no gene is expressed in the training cells", 40)
    x, y = np.log10(mean[chosen]), fraction[chosen]
    spread = max(x.max() - x.min(), 0.1)
    marks = []
    for a, b in zip(x, y):
        cx, cy = f"{10 + 600 * (a - x.min()) / spread:.1f}", f"{210 - 180 * b:.1f}"
        marks.append(Mark("circle", {"cx": cx, "cy": cy, "r": "1.2", "fill": COLOURS[0]}))
    for at, anchor, value in ((10, "start", x.min()), (610, "end", x.max())):
        marks.append(_text(at, 228, f"{10**value:.2g}", anchor))
    silent = len(mean) - len(seen)
    return Figure(f"genes: mean count and share of expressing cells ({silent:,} are not expressed)", 240, marks)


def bars(labels: Sequence[str], table: np.ndarray, splits: Sequence[str], title: str) -> Figure:
    """Cells of each label, stacked by split."""
    marks, scale = _legend(splits, 24), 400 / max(table.sum(axis=1).max(), 1)
    for row, (label, n) in enumerate(zip(labels, table)):
        y, x = 44 + 16 * row, 180.0
        marks.append(_text(174, y + 10, label[:28], "end"))
        for k, cells in enumerate(n):
            marks.append(_bar(f"{x:.1f}", y, f"{cells * scale:.1f}", 12, _colour(k)))
            x += cells * scale
        marks.append(_text(f"{x + 4:.1f}", y + 10, f"{n.sum():,}"))
    return Figure(title, 52 + 16 * len(labels), marks)
