"""Single cells: on a map, and by their library size."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from scldm.evaluate.figures.looks import (
    FAINT,
    GRID,
    INK,
    OTHERS,
    SOURCES,
    WIDTH,
    condition_looks,
    handle,
    label,
    labels,
    look_handles,
)

LIBRARY_ROWS = 40
POINTS = 400  # cells drawn of a row


def umap(evaluation: dict) -> Figure:
    """Real test and generated cells on one UMAP. Top row: by source. Below: one row a condition, by its labels."""
    looks = condition_looks(evaluation)
    fig = Figure(figsize=(WIDTH, 3.9 * (1 + len(looks))))
    axes = fig.subplots(1 + len(looks), 3, sharex=True, sharey=True, squeeze=False)
    cells = {c["source"]: {k: np.array(c[k]) for k in ("x", "y")} for c in evaluation["map"]}
    n = sum(len(c["x"]) for c in cells.values())
    size = float(np.clip(9_000 / n, 3, 26))
    x, y = (np.concatenate([c[k] for c in cells.values()]) for k in "xy")

    color = np.concatenate([[SOURCES[source][1]] * len(c["x"]) for source, c in cells.items()])
    order = np.random.default_rng(0).permutation(n)  # neither source covers the other
    axes[0, 0].scatter(x[order], y[order], c=color[order], s=size, alpha=0.75, linewidths=0)
    axes[0, 0].set_title("both")
    for ax, (source, c) in zip(axes[0, 1:], cells.items(), strict=True):
        name, own = SOURCES[source]
        ax.scatter(x, y, s=size * 0.6, color=FAINT, alpha=0.5, linewidths=0)
        ax.scatter(c["x"], c["y"], s=size, color=own, alpha=0.75, linewidths=0)
        ax.set_title(name, color=own)

    for row, (condition, of) in zip(axes[1:], looks.items(), strict=True):
        row[0].set_axis_off()
        row[0].legend(handles=look_handles(of), loc="upper right", title=label(condition), alignment="left")
        for ax, source in zip(row[1:], evaluation["map"], strict=True):
            ax.scatter(x, y, s=size * 0.6, color=FAINT, alpha=0.5, linewidths=0)
            ax.set_title(f"{SOURCES[source['source']][0]} by {label(condition, 20)}")
            own_x, own_y, labels_n = (np.array(v) for v in (source["x"], source["y"], source["labels"][condition]))
            for t in sorted(of, key=lambda t: of[t] != OTHERS):  # the grey ones lie below
                here, (color, shape) = labels_n == t, of[t]
                ax.scatter(own_x[here], own_y[here], s=size, color=color, marker=shape, alpha=0.9, linewidths=0)
    for ax in axes.ravel():
        ax.set(xticks=[], yticks=[])
        ax.spines[["left", "bottom"]].set_color(FAINT)
    axes[0, 0].set(xlabel="UMAP 1", ylabel="UMAP 2")
    return fig


def library_groups(evaluation: dict) -> dict[str, list[str]]:
    """Row -> its combinations, most cells first. Beyond 40 rows, the last one holds all others."""
    names = list(evaluation["cells"].get("by_combination", ()))
    if not names:
        return {"all cells": []}
    shown = names if len(names) <= LIBRARY_ROWS else names[: LIBRARY_ROWS - 1]
    rest = names[len(shown) :]
    groups = [*([t] for t in shown), *([rest] if rest else [])]
    texts = labels([*shown, *([f"{len(rest)} others"] if rest else [])])
    return dict(zip(texts, groups, strict=True))


def library_sizes(evaluation: dict) -> Figure:
    """Total counts per cell, by combination if there are any, real beside generated: cells, middle half and median."""
    cells, groups = evaluation["cells"], library_groups(evaluation)
    numbers = {r: sum(cells["by_combination"][t]["compared"] for t in ts) for r, ts in groups.items() if ts}
    fig = Figure(figsize=(WIDTH, 1.2 + 0.46 * len(groups)))
    ax = fig.subplots()
    rng = np.random.default_rng(0)
    for i, c in enumerate(evaluation["map"]):
        total = np.maximum(np.array(c["total"], dtype=float), 1)
        _, color = SOURCES[c["source"]]
        for k, ts in enumerate(groups.values()):
            values = total[np.isin(c["combination"], ts)] if ts else total
            if len(values):  # the map may hold none of a small combination
                _library_row(ax, values, k + (-0.19 if i == 0 else 0.19), color, rng)
    texts = [f"{r}  ({numbers.get(r, cells['compared']):,})" for r in groups]
    ax.set_yticks(range(len(groups)), texts)
    ax.set(ylim=(len(groups) - 0.45, -0.55), xscale="log")
    ax.set_xlabel("total counts per cell over the compared genes, log scale")
    _plain_log_axis(ax)
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    for k in range(1, len(groups)):
        ax.axhline(k - 0.5, color=GRID, linewidth=0.8)
    handles = [
        Line2D([], [], color=color, marker="o", markersize=4, linewidth=9, alpha=0.6, label=name)
        for name, color in SOURCES.values()
    ]
    handles.append(handle("median", INK, "|", markersize=11, markeredgewidth=2))
    fig.legend(handles=handles, loc="outside upper right", ncols=3)
    return fig


def _library_row(ax: Axes, values: np.ndarray, y: float, color: str, rng: np.random.Generator) -> None:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    shown = values[:POINTS]
    ax.barh(y, high - low, left=low, height=0.32, color=color, alpha=0.28)
    ax.scatter(shown, y + rng.uniform(-0.12, 0.12, len(shown)), s=11, color=color, alpha=0.7, linewidths=0)
    ax.plot([middle, middle], [y - 0.17, y + 0.17], color=INK, linewidth=2)


def _plain_log_axis(ax: Axes) -> None:
    """Ticks at round numbers, written out. More of them where the axis spans less than a decade."""
    low, high = ax.get_xlim()
    steps = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [m * 10.0**p for p in range(9) for m in steps if low <= m * 10.0**p <= high]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
