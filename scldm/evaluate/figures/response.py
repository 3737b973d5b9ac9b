"""How cells respond to a condition: log-fold change of every gene, generated against real, contrast by contrast."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scldm.evaluate.figures.looks import BASELINE, FAINT, GENERATED, GRID, INK, REAL, WIDTH, handle, label, number
from scldm.evaluate.response import FIGURE_GENES

PANELS = 12
MOST_COLUMNS = 4


def drawn_responses(evaluation: dict) -> dict[str, dict]:
    """condition -> its response, where some contrast had enough cells."""
    return {condition: of for condition, of in evaluation["response"].items() if of["contrasts"]}


def drawn_contrasts(response: dict) -> list[dict]:
    """Those with the most test cells, at most 12."""
    return sorted(response["contrasts"], key=lambda c: -sum(c["n_cells"]["test"].values()))[:PANELS]


def contrast_name(contrast: dict) -> str:
    """Such as `B cells: stim against ctrl`."""
    group = " · ".join(contrast["group"].values())
    change = f"{contrast['other']} against {contrast['control']}"
    return f"{group}: {change}" if group else change


def beside_ceiling(title: str, score: dict, interval: bool = False) -> str:
    """Such as `slope 0.81 (real 1.01)`, with the interval where there is one."""
    if score["value"] is None:
        return f"{title} can't be told"
    reach = f" [{number(score['low'], 2)}, {number(score['high'], 2)}]" if interval and "low" in score else ""
    real = "" if score["ceiling"] is None else f" (real {number(score['ceiling'], 2)})"
    return f"{title} {number(score['value'], 2)}{reach}{real}"


def responses(evaluation: dict) -> Figure:
    """Small multiples, at most 12 a condition: one point a gene, the slope as a line, slope and r with those of real
    cells."""
    found = drawn_responses(evaluation)
    shown = {condition: drawn_contrasts(of) for condition, of in found.items()}
    columns = MOST_COLUMNS if max(map(len, shown.values())) >= MOST_COLUMNS else MOST_COLUMNS - 1
    rows = {condition: -(-len(contrasts) // columns) for condition, contrasts in shown.items()}
    heights = [0.9 + n * (0.7 + 0.82 * WIDTH / columns) for n in rows.values()]
    fig = Figure(figsize=(WIDTH, sum(heights)))
    parts = fig.subfigures(len(found), 1, height_ratios=heights, squeeze=False)
    handles = [
        handle("genes that change most in real cells", GENERATED, markersize=4),
        handle("other genes", BASELINE, markersize=3, alpha=0.6),
    ]
    for part, (condition, of) in zip(parts.ravel(), found.items(), strict=True):
        n, every = len(shown[condition]), len(of["contrasts"])
        cut = f", and below the {n} with most cells of {every}" if n < every else ""
        told = ", ".join(beside_ceiling(name, of["pooled"][name], interval=True) for name in ("slope", "r"))
        if of["unseen"]:
            told += f", unseen: {beside_ceiling('slope', of['unseen']['slope'], interval=True)}"
        title = f"{label(condition)}, {'trained' if of['unseen'] else 'all'} contrasts: {told}{cut}"
        part.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold", color=BASELINE)
        axes = part.subplots(rows[condition], columns, squeeze=False).ravel()
        for ax in axes[n:]:
            ax.set_visible(False)
        for ax, contrast in zip(axes, shown[condition], strict=False):
            _panel(ax, contrast)
        part.legend(handles=handles, loc="outside lower left", ncols=2)
    return fig


def _panel(ax: Axes, contrast: dict) -> None:
    x, y = (np.array(contrast["genes"][source]) for source in ("test", "generated"))
    first = min(FIGURE_GENES // 2, len(x) // 5)  # genes stand in the order of their |z|
    high = 1.08 * max(np.abs(x).max(), np.abs(y).max(), 1e-9)
    ax.axhline(0, color=GRID, linewidth=0.8)
    ax.axvline(0, color=GRID, linewidth=0.8)
    ax.plot([-high, high], [-high, high], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.scatter(x[first:], y[first:], s=7, color=BASELINE, alpha=0.45, linewidths=0)
    ax.scatter(x[:first], y[:first], s=14, color=GENERATED, alpha=0.75, linewidths=0)
    scores = contrast["scores"]
    slope = scores["slope"]["value"]
    if slope is not None:
        ax.plot([-high, high], [-slope * high, slope * high], color=GENERATED, linewidth=1.2)
    told = "\n".join(beside_ceiling(name, scores[name]) for name in ("slope", "r"))
    ax.text(0.04, 0.96, told, transform=ax.transAxes, va="top", fontsize=9)
    group = " · ".join(contrast["group"].values())
    change = f"{label(contrast['other'], 16)} against {label(contrast['control'], 12)}"
    ax.set_title(f"{label(group, 30)}\n{change}" if group else change, fontsize=10)
    ax.set(xlim=(-high, high), ylim=(-high, high), aspect="equal")
    ax.set_xlabel("log fold change, real", color=REAL)
    ax.set_ylabel("log fold change, generated", color=GENERATED)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    ax.spines[["left", "bottom"]].set_color(FAINT)
