"""Genes: markers that tell labels apart, and every gene's moments."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from scldm.evaluate.figures.looks import (
    BASELINE,
    GENERATED,
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
    looks_of,
)

SHOWN_LABELS = 12

# --- markers -------------------------------------------------------------------------------------------------------


def shown_labels(evaluation: dict) -> list[str]:
    """The labels of the dot plot: those with markers, most test cells first, at most 12."""
    return evaluation["expression"]["types"][:SHOWN_LABELS]


def marker_dots(evaluation: dict) -> Figure:
    """Dot plot of the marker genes of each label, real above generated, on one scale."""
    expression, types = evaluation["expression"], shown_labels(evaluation)
    chosen = [m for t in types for m in evaluation["markers"] if m["type"] == t]
    columns = [expression["genes"].index(m["gene"]) for m in chosen]
    rows = [expression["types"].index(t) for t in types]
    values = {
        source: {k: np.array(v)[np.ix_(rows, columns)] for k, v in expression[source].items()} for source in SOURCES
    }
    # a gene's colour is relative to the real label that has most of it, in both panels
    top = np.maximum(values["real"]["mean"].max(0), 1e-9)
    shades = ListedColormap(mpl.colormaps["magma_r"](np.linspace(0.03, 0.85, 256)))  # black would hide the outlines
    fig = Figure(figsize=(WIDTH, max(4.2, 2.2 + 0.5 * len(types))))
    axes = fig.subplots(2, 1, sharex=True)
    grid = np.meshgrid(np.arange(len(columns)), np.arange(len(rows)))
    biggest = float(np.clip(5_500 / max(len(columns), 1), 40, 110))
    every = len(expression["types"])
    cut = f" (the {len(types)} labels with most cells of {every})" if len(types) < every else ""
    dots = None
    for ax, (source, (name, color)) in zip(axes, SOURCES.items(), strict=True):
        v = values[source]
        look = {"cmap": shades, "vmin": 0, "vmax": 1, "linewidths": 0.3, "edgecolors": BASELINE}
        dots = ax.scatter(*grid, s=biggest * v["fraction"], c=v["mean"] / top, **look)
        start = 0
        for k, t in enumerate(types):
            n = sum(m["type"] == t for m in chosen)
            ax.add_patch(Rectangle((start - 0.5, k - 0.5), n, 1, fill=False, edgecolor=INK, linewidth=0.8))
            start += n
        ax.set_title(f"{name}{cut}", color=color)
        ax.set_yticks(range(len(types)), labels(types, 30))
        ax.set(ylim=(len(types) - 0.4, -0.6), xlim=(-0.8, len(columns) - 0.2))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[1].set_xticks(range(len(columns)), [label(m["gene"], 18) for m in chosen], rotation=90, fontsize=8)
    assert dots is not None
    bar = fig.colorbar(dots, ax=axes, shrink=0.45, aspect=18, pad=0.01, extend="max", anchor=(0, 0.9))
    bar.set_label("mean log expression,\nrelative to highest real label", fontsize=9)
    bar.outline.set_visible(False)  # type: ignore[operator]
    handles = [handle(f"{100 * f:.0f} %", BASELINE, markersize=float(np.sqrt(biggest * f))) for f in (0.25, 0.5, 1.0)]
    place = {"loc": "upper left", "bbox_to_anchor": (-0.6, -0.25), "title_fontsize": 9, "alignment": "left"}
    bar.ax.legend(handles=handles, title="cells expressing", **place)
    return fig


def marker_changes(evaluation: dict) -> Figure:
    """Log2 fold change of every marker, generated against real test cells."""
    found = evaluation["markers"]
    looks = marker_looks(evaluation)
    fig = Figure(figsize=(WIDTH, 4.6))
    ax = fig.subplots()
    real, generated = (np.array([m["log2_fold_change"][s] for m in found]) for s in SOURCES)
    left, right = min(real.min(), 0.0), max(real.max(), 1.0)
    low, high = min(generated.min(), -0.5), max(generated.max(), 1.0)
    wide, tall = 0.04 * (right - left), 0.06 * (high - low)
    ax.set(xlim=(left - wide, right + 4 * wide), ylim=(low - tall, high + tall))
    ax.axhspan(low - tall, 0, color=GRID, zorder=0)
    ax.text(left, (low - tall) / 2, "not up in generated cells", va="center", color=BASELINE, fontsize=9)
    ax.axline((0, 0), slope=1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for t in sorted(looks, key=lambda t: looks[t] != OTHERS):  # the grey ones lie below
        here = np.array([m["type"] == t for m in found])
        ax.scatter(real[here], generated[here], s=40, color=looks[t][0], marker=looks[t][1], alpha=0.9)
    short = [int(k) for k in np.argsort(generated - real)[:5] if generated[k] < real[k]]
    heights = spread(generated[short], tall)  # in a column of their own, or they would write over each other
    for k, y in zip(short, heights, strict=True):
        at, line = (real[k], generated[k]), {"arrowstyle": "-", "color": BASELINE, "linewidth": 0.6}
        ax.annotate(label(found[k]["gene"], 18), at, (right + 2 * wide, y), va="center", fontsize=9, arrowprops=line)
    ax.grid()
    ax.set(xlabel="log2 fold change in real test cells", ylabel="log2 fold change in generated cells")
    fig.legend(handles=look_handles(looks), loc="outside right center", handletextpad=0.2)
    return fig


def spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """The heights, moved apart so that neighbours are at least a gap apart. Their middle and their order stay."""
    order = np.argsort(heights)
    steps = gap * np.arange(len(heights))
    above = np.maximum.accumulate(heights[order] - steps) + steps
    moved = np.empty(len(heights))
    moved[order] = above - (above.mean() - heights.mean() if len(heights) else 0)
    return moved


def marker_looks(evaluation: dict) -> dict[str, tuple[str, str]]:
    """label -> its look, as on the map, of the labels that have markers."""
    types = list(dict.fromkeys(m["type"] for m in evaluation["markers"]))
    known = condition_looks(evaluation).get(evaluation["markers_of"]["condition"]) or looks_of(types)
    return {t: look for t, look in known.items() if t in types}


# --- moments -------------------------------------------------------------------------------------------------------

MOMENTS = {
    "mean": "mean log expression",
    "variance": "variance of log expression",
    "fraction": "fraction of cells expressing",
}


def genes(evaluation: dict) -> Figure:
    """Mean, variance and fraction expressing of every judged gene, generated against real."""
    moments = evaluation["genes"]
    fig = Figure(figsize=(WIDTH, 4.1))
    for ax, (name, title) in zip(fig.subplots(1, 3), MOMENTS.items(), strict=True):
        x, y = (np.array(moments[source][name]) for source in SOURCES)
        high = 1.04 * max(x.max(), y.max())
        size = float(np.clip(12_000 / len(x), 3, 16))
        ax.plot([0, high], [0, high], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.scatter(x, y, s=size, color=GENERATED, alpha=0.45, linewidths=0, rasterized=True)
        ax.set(xlim=(-0.02 * high, high), ylim=(-0.02 * high, high), aspect="equal")
        ax.set(title=title, xlabel="real test cells", ylabel="generated cells")
        ax.text(0.04, 0.96, f"r = {evaluation['pooled'][name + '_r']['score']:.3f}", transform=ax.transAxes, va="top")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.grid()
    return fig
