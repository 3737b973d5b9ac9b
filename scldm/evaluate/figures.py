"""The figures of a report, each a function of the evaluation dict that returns a matplotlib Figure.

One meaning, one colour, everywhere: blue is real, vermillion is generated, green is the floor, grey are the rivals. The
colours are Okabe and Ito's and Tol's "muted", which stay apart for colour-blind readers; shape or a label says it
again.

Reading order: style, what there is to draw, scores, map, markers, genes, library sizes, curves, all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from scldm.evaluate.metrics import METRICS
from scldm.evaluate.rivals import RIVALS

REAL, GENERATED, FLOOR, RIVAL = "#0072B2", "#D55E00", "#009E73", "#6E7781"
INK, FAINT, GRID = "#1F2328", "#C9CED6", "#E7EAEE"
TYPE_COLORS = ("#332288", "#DDCC77", "#117733", "#CC6677", "#88CCEE", "#882255", "#44AA99", "#AA4499", "#999933")
OTHERS = ("#A3ABB5", "o")
SOURCES = {"real": ("real test cells", REAL), "generated": ("generated cells", GENERATED)}
WIDTH = 12.0  # inches; every figure is as wide, so that type has one size on the page
SHOWN_TYPES = 12
LIBRARY_TYPES = 24

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.edgecolor": "#8A929C",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
}


@contextmanager
def style() -> Iterator[None]:
    """matplotlib with the report's look, and as it was afterwards."""
    with mpl.rc_context(STYLE):
        yield


def type_look(types: list[str]) -> dict[str, tuple[str, str]]:
    """type -> (colour, marker shape) of the first 18, whom nine colours and two shapes keep apart; the others share a
    grey."""
    n = len(TYPE_COLORS)
    told_apart = {t: (TYPE_COLORS[k % n], "o^"[k // n]) for k, t in enumerate(types[: 2 * n])}
    return {t: told_apart.get(t, OTHERS) for t in types}


def type_legend(looks: Mapping[str, tuple[str, str]]) -> list[Line2D]:
    """One handle a type that has a look of its own, and one for the rest."""
    own = [(_short(t, 34), look) for t, look in looks.items() if look != OTHERS]
    rest = len(looks) - len(own)
    own += [(f"{rest} other types", OTHERS)] * (rest > 0)
    return [Line2D([], [], marker=shape, linestyle="", color=color, label=label) for label, (color, shape) in own]


# --- what there is to draw -----------------------------------------------------------------------------------------


def score_sections(evaluation: dict) -> list[str]:
    """per_type, where some type has cells enough, and pooled."""
    return [section for section in ("per_type", "pooled") if section in evaluation]


def rivals_of(evaluation: dict) -> dict[str, tuple]:
    """The rivals that this evaluation has: without types, there are none to shuffle."""
    return {k: rival for k, rival in RIVALS.items() if k in evaluation["pooled"]["w2"]["rivals"]}


# --- scores --------------------------------------------------------------------------------------------------------


def scores(evaluation: dict) -> Figure:
    """The four main metrics, per type (where there are such) and pooled: generated cells, floor and rivals on one axis
    each."""
    main = [name for name, metric in METRICS.items() if metric.main]
    sections = score_sections(evaluation)
    fig = Figure(figsize=(WIDTH, 2.5 * len(sections)))
    axes = fig.subplots(len(sections), len(main), sharey=True, squeeze=False)
    looks = {
        "generated": ("generated cells", GENERATED, "o", 80),
        "floor": ("floor: training cells", FLOOR, "D", 50),
        **{
            k: (f"({k}) {title}", RIVAL, shape, 50)
            for (k, (title, *_)), shape in zip(rivals_of(evaluation).items(), "^sX", strict=False)
        },
    }
    for i, section in enumerate(sections):
        title = section.replace("_", " ")
        for ax, name in zip(axes[i], main, strict=True):
            row = evaluation[section][name]
            values = {"generated": (row["score"], 0.0)}
            values |= {k: (v["mean"], v["sd"]) for k, v in {"floor": row["floor"], **row["rivals"]}.items()}
            ax.axvline(row["score"], color=GENERATED, linewidth=0.8, alpha=0.5)
            for y, (key, (_, color, shape, size)) in enumerate(looks.items()):
                mean, sd = values[key]
                ax.errorbar(mean, y, xerr=sd, color=color, capsize=0, linewidth=2, alpha=0.6)
                ax.scatter(mean, y, s=size, color=color, marker=shape, zorder=3)
            ax.set_title(f"{METRICS[name].title}, {title}")
            ax.set_yticks(range(len(looks)), [label for label, *_ in looks.values()])
            ax.set_ylim(len(looks) - 0.5, -0.5)
            ax.xaxis.set_major_locator(MaxNLocator(3))
            ax.grid(axis="x")
            ax.tick_params(left=False)
            ax.margins(x=0.12)
            if name == "nn_accuracy":
                ax.axvline(0.5, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
                ax.set_xlabel("0.5 (dotted) is ideal", color=RIVAL)
            else:
                ax.set_xlabel("← closer to real test cells", color=RIVAL)
    return fig


# --- map -----------------------------------------------------------------------------------------------------------


def umap(evaluation: dict) -> Figure:
    """Real test and generated cells on one UMAP: by source, then each source alone, by type if there are types."""
    types = list(evaluation["cells"].get("by_type", ()))
    looks = type_look(types)
    fig = Figure(figsize=(WIDTH, 3.9 + 0.18 * -(-len(type_legend(looks)) // 3)))
    axes = fig.subplots(1, 3, sharex=True, sharey=True)
    cells = {c["source"]: {k: np.array(v) for k, v in c.items() if k != "source"} for c in evaluation["map"]}
    n = sum(len(c["x"]) for c in cells.values())
    size = float(np.clip(9_000 / n, 3, 26))

    x, y = (np.concatenate([c[k] for c in cells.values()]) for k in "xy")
    color = np.concatenate([[SOURCES[source][1]] * len(c["x"]) for source, c in cells.items()])
    order = np.random.default_rng(0).permutation(n)  # neither source covers the other
    axes[0].scatter(x[order], y[order], c=color[order], s=size, alpha=0.75, linewidths=0)
    axes[0].set_title("by source")
    handles = [Line2D([], [], marker="o", linestyle="", color=c, label=name) for name, c in SOURCES.values()]
    fig.legend(handles=handles, loc="outside lower left", ncols=2, handletextpad=0.2, columnspacing=1.2)

    for ax, (source, c) in zip(axes[1:], cells.items(), strict=True):
        ax.scatter(x, y, s=size * 0.6, color=FAINT, alpha=0.5, linewidths=0)
        name, own = SOURCES[source]
        if not types:
            ax.scatter(c["x"], c["y"], s=size, color=own, alpha=0.75, linewidths=0)
        for t in reversed(types):  # the grey ones lie below
            here = c["type"] == t
            ax.scatter(
                c["x"][here], c["y"][here], s=size, color=looks[t][0], marker=looks[t][1], alpha=0.9, linewidths=0
            )
        ax.set_title(f"{name} by type" if types else name)
    if types:
        fig.legend(handles=type_legend(looks), loc="outside lower right", ncols=3, handletextpad=0.2, columnspacing=1.2)
    for ax in axes:
        ax.set(xticks=[], yticks=[], xlabel="UMAP 1")
        ax.spines[["left", "bottom"]].set_color(FAINT)
    axes[0].set_ylabel("UMAP 2")
    return fig


# --- markers -------------------------------------------------------------------------------------------------------


def shown_types(evaluation: dict) -> list[str]:
    """The types of the dot plot: those with markers, most test cells first, at most 12."""
    return evaluation["expression"]["types"][:SHOWN_TYPES]


def marker_dots(evaluation: dict) -> Figure:
    """Dot plot of the marker genes of each type, real above generated, on one scale."""
    expression = evaluation["expression"]
    types = shown_types(evaluation)
    chosen = [m for t in types for m in evaluation["markers"] if m["type"] == t]
    columns = [expression["genes"].index(m["gene"]) for m in chosen]
    rows = [expression["types"].index(t) for t in types]
    values = {
        source: {k: np.array(v)[np.ix_(rows, columns)] for k, v in expression[source].items()} for source in SOURCES
    }
    # a gene's colour is relative to the real type that has most of it, in both panels
    top = np.maximum(values["real"]["mean"].max(0), 1e-9)
    shades = ListedColormap(mpl.colormaps["magma_r"](np.linspace(0.03, 0.85, 256)))  # black would hide the outlines
    fig = Figure(figsize=(WIDTH, 2.0 + 0.46 * len(types)))
    axes = fig.subplots(2, 1, sharex=True)
    grid = np.meshgrid(np.arange(len(columns)), np.arange(len(rows)))
    biggest = float(np.clip(5_500 / max(len(columns), 1), 40, 110))
    dots = None
    for ax, (source, (name, color)) in zip(axes, SOURCES.items(), strict=True):
        v = values[source]
        dots = ax.scatter(
            *grid,
            s=biggest * v["fraction"],
            c=v["mean"] / top,
            cmap=shades,
            vmin=0,
            vmax=1,
            linewidths=0.3,
            edgecolors=RIVAL,
        )
        start = 0
        for k, t in enumerate(types):
            n = sum(m["type"] == t for m in chosen)
            ax.add_patch(Rectangle((start - 0.5, k - 0.5), n, 1, fill=False, edgecolor=INK, linewidth=0.8))
            start += n
        ax.set_title(name, color=color)
        ax.set_yticks(range(len(types)), [_short(t, 30) for t in types])
        ax.set(ylim=(len(types) - 0.4, -0.6), xlim=(-0.8, len(columns) - 0.2))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[1].set_xticks(range(len(columns)), [m["gene"] for m in chosen], rotation=90, fontsize=8)
    assert dots is not None
    bar = fig.colorbar(dots, ax=axes, shrink=0.45, aspect=18, pad=0.01, extend="max", anchor=(0, 0.9))
    bar.set_label("mean log expression,\nrelative to highest real type")
    bar.outline.set_visible(False)  # type: ignore[operator]
    handles = [
        Line2D([], [], marker="o", linestyle="", color=RIVAL, markersize=np.sqrt(biggest * f), label=f"{100 * f:.0f} %")
        for f in (0.25, 0.5, 1.0)
    ]
    bar.ax.legend(
        handles=handles,
        title="cells expressing",
        loc="upper left",
        bbox_to_anchor=(-0.6, -0.25),
        title_fontsize=9,
        alignment="left",
    )
    return fig


def marker_changes(evaluation: dict) -> Figure:
    """Log2 fold change of every marker, generated against real test cells."""
    found = evaluation["markers"]
    types = list(dict.fromkeys(m["type"] for m in found))
    looks = type_look(list(evaluation["cells"]["by_type"]))
    fig = Figure(figsize=(WIDTH, 4.6))
    ax = fig.subplots()
    real, generated = (np.array([m["log2_fold_change"][s] for m in found]) for s in SOURCES)
    low, high = min(real.min(), generated.min(), -0.5), max(real.max(), generated.max(), 1)
    pad = 0.05 * (high - low)
    ax.set(xlim=(low - pad, high + pad), ylim=(low - pad, high + pad))
    ax.axhspan(low - pad, 0, color=GRID, zorder=0)
    ax.text(high, (low - pad) / 2, "not up in generated cells", ha="right", va="center", color=RIVAL, fontsize=9)
    ax.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for t in reversed(types):  # the grey ones lie below
        here = np.array([m["type"] == t for m in found])
        ax.scatter(real[here], generated[here], s=40, color=looks[t][0], marker=looks[t][1], alpha=0.9)
    short = [k for k in np.argsort(generated - real)[:5] if generated[k] < real[k]]
    for i, k in enumerate(sorted(short, key=lambda k: real[k])):
        side, align = ((-7, "right"), (7, "left"))[i % 2]  # neighbours don't write over each other
        at = (real[k], generated[k])
        ax.annotate(found[k]["gene"], at, (side, -4), textcoords="offset points", fontsize=8, ha=align)
    ax.grid()
    ax.set(xlabel="log2 fold change in real test cells", ylabel="log2 fold change in generated cells")
    shown = {t: look for t, look in looks.items() if t in types}
    fig.legend(handles=type_legend(shown), loc="outside right center", handletextpad=0.2)
    return fig


def genes(evaluation: dict) -> Figure:
    """Mean, variance and fraction expressing of every gene, generated against real."""
    moments = evaluation["genes"]
    fig = Figure(figsize=(WIDTH, 4.1))
    titles = {
        "mean": "mean log expression",
        "variance": "variance of log expression",
        "fraction": "fraction of cells expressing",
    }
    for ax, (name, title) in zip(fig.subplots(1, 3), titles.items(), strict=True):
        x, y = (np.array(moments[source][name]) for source in SOURCES)
        high = 1.04 * max(x.max(), y.max())
        ax.plot([0, high], [0, high], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.scatter(
            x, y, s=float(np.clip(12_000 / len(x), 3, 16)), color=GENERATED, alpha=0.45, linewidths=0, rasterized=True
        )
        ax.set(xlim=(-0.02 * high, high), ylim=(-0.02 * high, high), aspect="equal")
        ax.set(title=title, xlabel="real test cells", ylabel="generated cells")
        ax.text(0.04, 0.96, f"r = {evaluation['pooled'][name + '_r']['score']:.3f}", transform=ax.transAxes, va="top")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.grid()
    return fig


# --- library sizes -------------------------------------------------------------------------------------------------


def library_sizes(evaluation: dict) -> Figure:
    """Total counts per cell, by type if there are types, real beside generated: cells, middle half and median."""
    by_type = evaluation["cells"].get("by_type")
    numbers = (
        {t: n["compared"] for t, n in by_type.items()} if by_type else {"all cells": evaluation["cells"]["compared"]}
    )
    types = list(numbers)[:LIBRARY_TYPES]
    fig = Figure(figsize=(WIDTH, 1.2 + 0.46 * len(types)))
    ax = fig.subplots()
    rng = np.random.default_rng(0)
    for i, c in enumerate(evaluation["map"]):
        total = np.array(c["total"], dtype=float)
        label = np.array(c["type"] if by_type else types * len(total))
        _, color = SOURCES[c["source"]]
        for k, t in enumerate(types):
            values = np.maximum(total[label == t], 1)
            y = k + (-0.19 if i == 0 else 0.19)
            shown = values[:400]
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
            ax.barh(y, high - low, left=low, height=0.32, color=color, alpha=0.28)
            ax.scatter(shown, y + rng.uniform(-0.12, 0.12, len(shown)), s=11, color=color, alpha=0.7, linewidths=0)
            ax.plot([middle, middle], [y - 0.17, y + 0.17], color=INK, linewidth=2)
    ax.set_yticks(range(len(types)), [f"{_short(t, 34)}  ({numbers[t]:,})" for t in types])
    ax.set(
        ylim=(len(types) - 0.45, -0.55), xscale="log", xlabel="total counts per cell over the compared genes, log scale"
    )
    _plain_log_axis(ax)
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    for k in range(1, len(types)):
        ax.axhline(k - 0.5, color=GRID, linewidth=0.8)
    handles = [
        Line2D([], [], color=color, marker="o", markersize=4, linewidth=9, alpha=0.6, label=name)
        for name, color in SOURCES.values()
    ]
    handles.append(
        Line2D([], [], color=INK, marker="|", linestyle="", markersize=11, markeredgewidth=2, label="median")
    )
    fig.legend(handles=handles, loc="outside upper right", ncols=3)
    return fig


def _plain_log_axis(ax: Axes) -> None:
    """Ticks at round numbers, written out; more of them where the axis spans less than a decade."""
    low, high = ax.get_xlim()
    steps = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [m * 10.0**p for p in range(9) for m in steps if low <= m * 10.0**p <= high]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


# --- curves --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One axis of the loss curves. metric: the first of these names that a split has is drawn."""

    stage: str
    splits: tuple[str, ...]
    metric: tuple[str, ...]
    title: str
    unit: str


# the autoencoder's losses are sums over different genes, which one axis would make look like overfitting
PANELS = (
    Panel("vae", ("train",), ("nll", "loss"), "autoencoder, training", "nats per cell, over the genes of the step"),
    Panel("vae", ("validation",), ("nll", "loss"), "autoencoder, validation", "nats per cell, over all genes"),
    Panel("ldm", ("train", "validation"), ("velocity_loss", "loss"), "latent diffusion", "mean squared velocity error"),
)


def drawn_panels(evaluation: dict) -> list[tuple[Panel, dict[str, np.ndarray]]]:
    """The panels that have curves, each with split -> (cells seen, loss), (points, 2)."""
    out = []
    for panel in PANELS:
        curves = evaluation.get("curves", {}).get(panel.stage, {})
        found = {
            split: next((curves[split][m] for m in panel.metric if m in curves[split]), None)
            for split in panel.splits
            if split in curves
        }
        lines = {split: np.array(points, dtype=float) for split, points in found.items() if points}
        if lines:
            out.append((panel, lines))
    return out


def loss_curves(evaluation: dict) -> Figure:
    """Training and validation loss of each run against the cells seen."""
    panels = drawn_panels(evaluation)
    fig = Figure(figsize=(WIDTH, 3.8))
    for ax, (panel, lines) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for split, points in lines.items():
            seen, value = points.T
            if split == "train":
                ax.plot(seen, value, color=FAINT, linewidth=0.8, label="training, each step")
                ax.plot(seen, _smooth(value), color=RIVAL, linewidth=1.6, label="training, running mean")
            else:
                ax.plot(seen, value, color=INK, linewidth=1.6, marker="o", markersize=3.5, label="validation")
                best = int(np.argmin(value))
                ax.annotate(
                    f"{value[best]:.4g}",
                    (seen[best], value[best]),
                    (0, 8),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                )
        # the first steps would flatten the rest
        low = min(points[:, 1].min() for points in lines.values())
        high = max(np.quantile(points[:, 1], 0.98) for points in lines.values())
        pad = 0.08 * (high - low) or 1.0
        ax.set_ylim(low - pad, high + pad)
        ax.set_title(panel.title)
        ax.set(xlabel="cells seen, counting repeats", ylabel=panel.unit)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.grid()
        ax.legend(loc="upper right")
    return fig


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the points, narrower at the ends."""
    half = max(1, len(values) // 40)
    cumulative = np.concatenate([[0.0], np.cumsum(values)])
    start = np.clip(np.arange(len(values)) - half, 0, None)
    end = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    return (cumulative[end] - cumulative[start]) / (end - start)


# --- all of them ---------------------------------------------------------------------------------------------------


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


FIGURES: Mapping[str, Callable[[dict], Figure]] = {
    "scores": scores,
    "umap": umap,
    "marker_dots": marker_dots,
    "marker_changes": marker_changes,
    "genes": genes,
    "library_sizes": library_sizes,
    "loss_curves": loss_curves,
}


def has(evaluation: dict, name: str) -> bool:
    """Whether there is something to draw: no curves without runs, no marker figures without markers."""
    if name == "loss_curves":
        return bool(drawn_panels(evaluation))
    return name not in ("marker_dots", "marker_changes") or bool(evaluation.get("markers"))
