"""Loss curves of the training runs, and all that one or two of them logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from scldm.evaluate.curves import Curves
from scldm.evaluate.figures.looks import BASELINE, FAINT, GENERATED, INK, REAL, WIDTH, label, labels


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
                ax.plot(seen, _smooth(value), color=BASELINE, linewidth=1.6, label="training, running mean")
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
        _limit(ax, [points[:, 1] for points in lines.values()])
        ax.set_title(panel.title)
        ax.set_ylabel(panel.unit)
        _along_cells(ax)
        ax.legend(loc="upper right")
    return fig


def _limit(ax: Axes, curves: Sequence[np.ndarray]) -> None:
    """The first steps would flatten the rest."""
    low, high = min(v.min() for v in curves), max(np.quantile(v, 0.98) for v in curves)
    pad = 0.08 * (high - low) or 1.0
    ax.set_ylim(low - pad, high + pad)


def _along_cells(ax: Axes) -> None:
    ax.set_xlabel("cells seen, counting repeats")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid()


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the points, narrower at the ends."""
    half = max(1, len(values) // 40)
    cumulative = np.concatenate([[0.0], np.cumsum(values)])
    start = np.clip(np.arange(len(values)) - half, 0, None)
    end = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    return (cumulative[end] - cumulative[start]) / (end - start)


# --- one or two runs -----------------------------------------------------------------------------------------------

RUN_COLORS = (REAL, GENERATED)
UNITS = {
    "nll": "nats per cell",
    "kl": "nats per cell",
    "velocity_loss": "mean squared error",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient, before clipping",
    "cells_per_s": "cells a second, all ranks",
    "waiting_share": "share of time spent waiting for cells",
    "mfu": "share of the device's peak FLOP/s",
    "log_mean_r": "correlation of genes' log means",
    "log_variance_r": "correlation of genes' log variances",
    "memorisation_ratio": "distance to training cells, 1 is ideal",
}
SPLITS = {"train": "training", "validation": "validation", "preview": "previews"}


SLOPE, MOST_SLOPES = "response_slope/", 3  # of a preview, one a condition


def run_panels(runs: Sequence[Curves]) -> list[tuple[str, str]]:
    """(split, metric) of what the runs logged and is not always nought, in the order of UNITS."""
    logged = [(metric, split) for metric in UNITS for split in SPLITS]
    slopes = {metric for of in runs for metric in of.get("preview", {}) if metric.startswith(SLOPE)}
    logged += [(metric, "preview") for metric in sorted(slopes)[:MOST_SLOPES]]
    return [
        (split, metric)
        for metric, split in logged
        if any(value for of in runs for _, value in of.get(split, {}).get(metric, []))
    ]


def run_curves(runs: Mapping[str, Curves]) -> Figure:
    """What each run logged against the cells seen, a colour a run. Each logged row is pale."""
    panels = run_panels(list(runs.values()))
    columns = min(3, len(panels))
    fig = Figure(figsize=(WIDTH, 3.1 * -(-len(panels) // columns)))
    axes = fig.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    names = labels(list(runs), 40)
    for ax, (split, metric) in zip(axes, panels, strict=False):
        shown = []
        for color, of in zip(RUN_COLORS, runs.values(), strict=False):
            if points := of.get(split, {}).get(metric):
                seen, value = np.array(points, dtype=float).T
                shown.append(value)
                if split == "train":
                    ax.plot(seen, value, color=color, linewidth=0.8, alpha=0.3)
                marker = "o" if split == "preview" else None  # there may be a single one
                shown_value = _smooth(value) if split == "train" else value
                ax.plot(seen, shown_value, color=color, marker=marker, markersize=3.5)
        _limit(ax, shown)
        ax.set_title(label(f"{metric}, {SPLITS[split]}", 44))
        ax.set_ylabel(UNITS.get(metric, "slope on real changes, 1 is right"))
        _along_cells(ax)
    if len(runs) > 1:
        lines = [Line2D([], [], color=color, label=name) for name, color in zip(names, RUN_COLORS, strict=False)]
        fig.legend(handles=lines, loc="outside upper left", ncols=2)
    return fig
