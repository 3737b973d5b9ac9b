"""The figure: a panel for each metric that decides, a line for each method, the floor as a line across.

Reading order: COLOURS, draw.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from benchmarks.quality import judge
from benchmarks.quality.methods import METHODS
from benchmarks.quality.table import FLOOR, Results

# Okabe & Ito 2008: told apart by colour-blind readers
COLOURS = {"ours": "#0072B2", "scvi": "#D55E00", "mlp": "#009E73", "naive": "#CC79A7", "control": "#666666"}
KINDS = {"ours": "this project", "scvi": "scVI", "mlp": "MLP autoencoder", "naive": "no network", "control": "control"}
PANELS = 3  # in a row


def draw(results: Results, title: str, path: Path) -> None:
    """Write the figure: rows of panels for each scope that has scores. Small dots are seeds, large ones their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    panels = [(scope, metric) for scope in judge.SCOPES for metric in results.metrics(scope) if metric in judge.DRAWN]
    if not panels:
        return
    n_rows = -(-len(panels) // PANELS)
    width, height = min(PANELS, len(panels)), 0.24 * len(results.scores) + 1.1
    figure, axes = plt.subplots(
        n_rows, width, figsize=(4.4 * width, height * n_rows + 1.1), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (scope, metric) in zip(axes.flat, panels):
        panel(axis, results, scope, metric)
    kinds = [kind for kind in COLOURS if any(METHODS[method].kind == kind for method in results.scores)]
    handles = [Line2D([], [], marker="o", ls="", color=COLOURS[kind], label=KINDS[kind]) for kind in kinds]
    handles.append(Line2D([], [], color=COLOURS["control"], ls="--", label="floor: training cells"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    protocol = textwrap.fill(f"protocol: {judge.TITLE}, {judge.MEANING}", 55 * width)
    figure.suptitle(f"{title}\n{protocol}".replace("$", r"\$"), fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panel(axis, results: Results, scope: str, metric: str) -> None:
    """Methods from best to worst, the floor as a dashed line."""
    means = {method: value for method in results.scores if (value := results.mean(method, scope, metric)) is not None}
    floor = results.floor(scope, metric)
    ordered = sorted(means, key=lambda method: judge.loss_of(metric, means[method], floor) or 0.0, reverse=True)
    for y, method in enumerate(ordered):
        colour = COLOURS[METHODS[method].kind]
        values = results.values(method, scope, metric)
        axis.plot(values, [y] * len(values), "o", ms=3, color=colour, alpha=0.5, mew=0)
        axis.plot([means[method]], [y], "o", ms=6.5, color=colour, mew=0)
    if FLOOR in means:
        axis.axvline(means[FLOOR], color=COLOURS["control"], ls="--", lw=1, zorder=0)
    axis.set_yticks(range(len(ordered)), ordered, fontsize=8)
    axis.grid(axis="y", color="#DDDDDD", lw=0.6)
    axis.set_axisbelow(True)
    axis.set_title(f"{judge.title_of(metric)}, {scope.replace('_', ' ')}", fontsize=9, loc="left")
    axis.locator_params(axis="x", nbins=6)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
