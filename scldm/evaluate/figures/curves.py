"""Loss curves of the training runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from scldm.evaluate.figures.looks import BASELINE, FAINT, INK, WIDTH


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
