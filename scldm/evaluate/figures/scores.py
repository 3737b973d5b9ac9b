"""Where generated cells stand: between the floor and the baselines, all together and combination by combination."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scldm.evaluate.baselines import BASELINES, SHIFTED
from scldm.evaluate.figures.looks import BASELINE, FLOOR, GENERATED, INK, PART, WIDTH, label, labels, number
from scldm.evaluate.intervals import WIDTH as REACH
from scldm.evaluate.metrics import METRICS

HEAT_ROWS = 60
COLUMNS = 4

# --- what there is to draw -----------------------------------------------------------------------------------------


def score_sections(evaluation: dict) -> list[str]:
    """per_combination, where some combination has cells enough, and pooled."""
    return [section for section in ("per_combination", "pooled") if section in evaluation]


def baselines_of(evaluation: dict) -> dict[str, tuple[str, str]]:
    """key -> title and meaning of the baselines that score_sections have. Without conditions there are no labels to
    shuffle."""
    (row, *_) = evaluation["pooled"].values()
    return {key: BASELINES[key][:2] for key in row["baselines"]}


def all_baselines_of(evaluation: dict) -> dict[str, tuple[str, str]]:
    """The same, and that which only combinations without training cells have."""
    key, title, what = SHIFTED
    tables = evaluation.get("by_combination", {}).values()
    more = any(key in row["baselines"] for table in tables for row in table.values())
    return baselines_of(evaluation) | ({key: (title, what)} if more else {})


def ordered_metrics(evaluation: dict) -> tuple[list[str], list[str]]:
    """The protocol's main metrics, and the others."""
    main = list(evaluation["protocol"]["main"])
    return main, [m for m in METRICS if m not in main and m in evaluation["pooled"]]


def section_title(evaluation: dict, section: str) -> str:
    n, of = len(set(evaluation["scored_combinations"]) - set(evaluation["set_apart"])), unit(evaluation)
    return "all cells at once" if section == "pooled" else f"mean over {n} {of}{'s' * (n != 1)}"


def unit(evaluation: dict) -> str:
    """What a group of cells is called."""
    return "combination" if len(evaluation["conditions"]) > 1 else "label"


# --- scores --------------------------------------------------------------------------------------------------------


def scores(evaluation: dict) -> Figure:
    """The protocol's main metrics, over combinations (where some are scored) and pooled: generated cells, the model's
    parts, floor and baselines on one axis each."""
    main, sections = evaluation["protocol"]["main"], score_sections(evaluation)
    looks = {"generated": ("generated cells", GENERATED, "o", 80)}
    parts = parts_drawn(evaluation)
    titles = labels([part["title"] for part in parts.values()], 30)
    for (name, title), shape in zip(zip(parts, titles, strict=True), "Pvp<>*h", strict=False):
        looks[f"part {name}"] = (title, PART, shape, 60)
    looks["floor"] = ("floor: training cells", FLOOR, "D", 50)
    for (key, (title, _)), shape in zip(baselines_of(evaluation).items(), "^sX", strict=False):
        looks[key] = (f"({key}) {title}", BASELINE, shape, 50)
    n_rows = -(-len(main) // COLUMNS)
    fig = Figure(figsize=(WIDTH, len(sections) * (0.3 + n_rows * (0.95 + 0.29 * len(looks)))))
    for part, section in zip(fig.subfigures(len(sections), 1, squeeze=False).ravel(), sections, strict=True):
        part.suptitle(section_title(evaluation, section), x=0.01, ha="left", fontsize=11, weight="bold", color=BASELINE)
        axes = part.subplots(n_rows, COLUMNS, sharey=True, squeeze=False).ravel()
        for ax in axes[len(main) :]:
            ax.set_visible(False)
        for ax, name in zip(axes, main, strict=False):
            values = _values(evaluation, section, name)
            ax.axvline(values["generated"][0], color=GENERATED, linewidth=0.8, alpha=0.5)
            for y, (key, (_, color, shape, size)) in enumerate(looks.items()):
                if key in values:
                    mean, reach = values[key]
                    ax.errorbar(mean, y, xerr=reach, color=color, capsize=0, linewidth=2, alpha=0.6)
                    ax.scatter(mean, y, s=size, color=color, marker=shape, zorder=3)
                else:  # a part of which no combination has cells enough
                    ax.text(0.5, y, "not scored", transform=ax.get_yaxis_transform(), ha="center", va="center")
            ax.set_title(METRICS[name].title)
            ax.set_yticks(range(len(looks)), [text for text, *_ in looks.values()])
            ax.set_ylim(len(looks) - 0.5, -0.5)
            ax.xaxis.set_major_locator(MaxNLocator(3))
            ax.grid(axis="x")
            ax.tick_params(left=False)
            ax.margins(x=0.12)
            if METRICS[name].best == "half":
                ax.axvline(0.5, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
            reads = "best at the floor" if METRICS[name].of_size else _READS[METRICS[name].best]
            ax.set_xlabel(reads, color=BASELINE)
    return fig


_READS = {
    "lowest": "← closer to real test cells",
    "highest": "closer to real test cells →",
    "half": "0.5 (dotted) is ideal",
    "one": "1 is ideal",
}


def parts_drawn(evaluation: dict) -> dict[str, dict]:
    """The model's parts, where they were scored at as many cells as the generated ones. Else they stand in a table."""
    parts = evaluation["parts"]
    return parts if parts and evaluation["beside_parts"]["n_cells"] == evaluation["cells"]["compared"] else {}


def _values(evaluation: dict, section: str, name: str) -> dict[str, tuple[float, float]]:
    """key -> score and the reach of its bar."""
    row = evaluation[section][name]
    out = {"generated": (row["score"], REACH * (row["error"] or 0.0))}
    for part, of in parts_drawn(evaluation).items():
        if name in of.get(section, {}):
            out[f"part {part}"] = (of[section][name], 0.0)
    return out | {k: (v["mean"], v["sd"]) for k, v in {"floor": row["floor"], **row["baselines"]}.items()}


# --- heat map ------------------------------------------------------------------------------------------------------


def place(row: dict) -> float | None:
    """Where a score stands between the floor (0) and the best baseline (1). Among those that the metric tells from the
    floor, that is the one whose mean is nearest to it. None where it tells none."""
    told = [key for key, value in row["normalised"].items() if value is not None]
    if not told:
        return None
    return row["normalised"][min(told, key=lambda key: abs(row["baselines"][key]["mean"] - row["floor"]["mean"]))]


def heat_map(evaluation: dict) -> Figure:
    """Combinations by metrics: `place`, as a number on its colour."""
    main, further = ordered_metrics(evaluation)
    metrics = [*main, *further]
    # the mean, then the combinations with the most cells
    rows = [(section_title(evaluation, "per_combination"), evaluation["per_combination"])]
    alone = [(t, of) for t, of in evaluation["by_combination"].items() if t not in evaluation["set_apart"]]
    rows += alone[:HEAT_ROWS]
    found = [[place(table[m]) if m in table else None for m in metrics] for _, table in rows]
    values = np.array(found, dtype=float)  # None is NaN
    shades, scale = mpl.colormaps["BrBG_r"].with_extremes(bad="#EEF0F3"), Normalize(0, 2)
    fig = Figure(figsize=(WIDTH, 2.6 + 0.25 * len(rows)))
    ax = fig.subplots()
    image = ax.imshow(values, aspect="auto", cmap=shades, norm=scale)
    for i, row in enumerate(found):
        for j, p in enumerate(row):
            text = "\N{EN DASH}" if p is None else number(p, 2 if abs(p) < 1 else 1 if abs(p) < 10 else 0)
            dark = p is not None and np.dot(shades(scale(p))[:3], [0.299, 0.587, 0.114]) < 0.55
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)
    for gap in range(1, len(rows)):
        ax.axhline(gap - 0.5, color="white", linewidth=5 if gap == 1 else 1)
    for gap in range(1, len(metrics)):
        ax.axvline(gap - 0.5, color="white", linewidth=5 if gap == len(main) else 1)
    ax.set_yticks(range(len(rows)), labels([name for name, _ in rows], 38))
    ax.set_xticks(range(len(metrics)), [label(METRICS[m].title) for m in metrics], rotation=50, ha="left")
    ax.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    bar = fig.colorbar(image, ax=ax, location="bottom", shrink=0.5, aspect=40, extend="both", anchor=(1, 0))
    bar.set_ticks([0, 1, 2], labels=["0: as real\ntraining cells", "1: as the\nbest baseline", "2: twice as far"])
    bar.outline.set_visible(False)  # type: ignore[operator]
    left = len(alone) - HEAT_ROWS
    if left > 0:
        ax.set_xlabel(f"{left} more {unit(evaluation)}s with fewer cells stand in the table", loc="left")
    return fig
