"""What a preview draws in a training: genes of held-out cells beside what the model makes of them, and a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scldm.evaluate.figures.looks import FAINT, GENERATED, INK, REAL, WIDTH, number
from scldm.evaluate.genes import Moments

TITLES = (
    ("log_mean", "mean counts, log10"),
    ("log_variance", "variance of counts, log10"),
    ("", "share of cells that express"),
)


def reconstruction(title: str, real: Moments, made: Moments, metrics: Mapping[str, float]) -> Figure:
    """Every gene's moments in held-out cells, and in counts that are drawn of their reconstructions."""
    fig = Figure(figsize=(WIDTH, 4.5))
    fig.suptitle(title, x=0.01, ha="left", fontsize=11)
    _genes(list(fig.subplots(1, 3)), real, made, metrics, "reconstructed, drawn")
    return fig


def generation(
    title: str,
    real: Moments,
    made: Moments,
    metrics: Mapping[str, float],
    map_name: str,
    places: Mapping[str, np.ndarray],
) -> Figure:
    """The same of generated cells, and both on the fixed map.

    places: coordinates of `real` and of `generated` cells, (cells, 2)
    """
    fig = Figure(figsize=(WIDTH, 8.6))
    fig.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes = fig.subplots(2, 3)
    _genes(list(axes[0]), real, made, metrics, "generated cells")
    _map(list(axes[1]), map_name, places)
    return fig


def _genes(axes: Sequence[Axes], real: Moments, made: Moments, metrics: Mapping[str, float], words: str) -> None:
    expressed = real[2] > 0
    for ax, (name, title), x, y in zip(axes, TITLES, real, made, strict=True):
        x, y = x[expressed], y[expressed]
        low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
        pad = 0.04 * (high - low) or 1.0
        ends = (low - pad, high + pad)
        ax.plot(ends, ends, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        size = float(np.clip(12_000 / len(x), 3, 16))
        ax.scatter(x, y, s=size, color=GENERATED, alpha=0.45, linewidths=0, rasterized=True)
        ax.set(title=title, xlabel="held-out cells", ylabel=words, xlim=ends, ylim=ends, aspect="equal")
        if name:
            told = f"r = {number(metrics[f'{name}_r'], 3)}\noff by {number(metrics[f'{name}_error'], 3)}"
            ax.text(0.04, 0.96, told, transform=ax.transAxes, va="top", fontsize=9)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5))
        ax.grid()


def _map(axes: Sequence[Axes], name: str, places: Mapping[str, np.ndarray]) -> None:
    looks = {"real": ("held-out cells", REAL), "generated": ("generated cells", GENERATED)}
    every = np.concatenate([places[source] for source in looks])
    color = np.concatenate([[own] * len(places[source]) for source, (_, own) in looks.items()])
    order = np.random.default_rng(0).permutation(len(every))  # neither source covers the other
    axes[0].scatter(*every[order].T, c=color[order], s=9, alpha=0.75, linewidths=0)
    axes[0].set(title="both", xlabel=f"{name} 1", ylabel=f"{name} 2")
    for ax, (source, (title, own)) in zip(axes[1:], looks.items(), strict=True):
        ax.scatter(*every.T, s=6, color=FAINT, alpha=0.5, linewidths=0)
        ax.scatter(*places[source].T, s=9, color=own, alpha=0.75, linewidths=0)
        ax.set_title(title, color=own)
    real = places["real"]  # the frame is the same in every preview, wherever generated cells lie
    low, high = real.min(0), real.max(0)
    pad = 0.25 * np.maximum(high - low, 1e-3)
    outside = int((np.abs(places["generated"] - (low + high) / 2) > (high - low) / 2 + pad).any(1).sum())
    if outside:
        axes[2].set_title(f"generated cells, {outside} of {len(places['generated'])} outside", color=GENERATED)
    for ax in axes:
        ax.set(xticks=[], yticks=[], xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(low[1] - pad[1], high[1] + pad[1]))
        ax.spines[["left", "bottom"]].set_color(FAINT)
