"""An evaluation as one self-contained HTML page: images, style and script are inside, and nothing is fetched.

The page is written from the evaluation dict alone, so that it can be drawn again from evaluation.json. Its prose is in
templates/, which escape every text that they are given. Reading order: write, the page, its headline, its notes.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from scldm.evaluate import report_tables as tables
from scldm.evaluate.baselines import BASELINES, SHIFTED
from scldm.evaluate.figures import FIGURES, has, png
from scldm.evaluate.figures.cells import LIBRARY_ROWS
from scldm.evaluate.figures.genes import marker_looks, shown_labels
from scldm.evaluate.figures.looks import condition_looks, grey_labels, label_sizes, number
from scldm.evaluate.figures.response import contrast_name, drawn_contrasts, drawn_responses
from scldm.evaluate.figures.scores import (
    HEAT_ROWS,
    all_baselines_of,
    parts_drawn,
    score_sections,
    section_title,
    unit,
)
from scldm.evaluate.memorisation import MEMORISATION
from scldm.evaluate.metrics import METRICS
from scldm.evaluate.protocols import PUBLISHED_NOTE
from scldm.evaluate.verdict import headline_tables
from scldm.files import write_page
from scldm.progress import Progress

TEMPLATES = Path(__file__).parent / "templates"

# --- write ---------------------------------------------------------------------------------------------------------


def write_report(evaluation: dict, folder: Path) -> list[Path]:
    """Draw every figure as folder/figures/NAME.png and the page over them as folder/report.html. Returns what was
    written, the page first."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    images: dict[str, bytes] = {}
    drawn = [name for name in FIGURES if has(evaluation, name)]
    with Progress("draw report", len(drawn), "figures") as bar:
        for name in drawn:
            images[name] = png(evaluation, name)
            bar.advance(note=name)
    files = {folder / "report.html": page(evaluation, images).encode()}
    files |= {folder / "figures" / f"{name}.png": image for name, image in images.items()}
    for path, content in files.items():
        write_page(path, content)
    return list(files)


# --- page ----------------------------------------------------------------------------------------------------------

# macro in sections.html.j2 -> title. A section that comes out empty is left out
SECTIONS = {
    "scores": "Scores",
    "parts": "Which part costs what",
    "combinations": "Groups of cells",
    "copies": "Copies of training cells",
    "response": "Response to a condition",
    "map": "Map of cells",
    "markers": "Marker genes",
    "genes": "Genes",
    "library": "Library sizes",
    "training": "Training",
    "cells": "Cells compared",
    "made": "How this was made",
}


def page(evaluation: dict, images: dict[str, bytes]) -> str:
    """The whole page. `images` are PNGs by figure name."""
    env = environment(images)
    env.globals |= {
        "e": evaluation,
        "tables": tables,
        "METRICS": METRICS,
        "MEMORISATION": MEMORISATION,
        "PUBLISHED_NOTE": PUBLISHED_NOTE,
        "tiles": tiles(evaluation),
        "notes": notes(evaluation),
        "unit": unit(evaluation),
        "baselines": all_baselines_of(evaluation),
        "section_titles": {section: section_title(evaluation, section) for section in score_sections(evaluation)},
        "responses": response_facts(evaluation),
        "grey": grey(evaluation),
        "sizes": sizes(evaluation),
        "label_sizes": label_sizes(evaluation),
        "draws": draws_text(evaluation),
        "parts_drawn": parts_drawn(evaluation),
        "shown": {"labels": shown_labels(evaluation)} if evaluation.get("markers") else {},
        "HEAT_ROWS": HEAT_ROWS,
        "LIBRARY_ROWS": LIBRARY_ROWS,
        "settings": settings(evaluation),
    }
    module: Any = env.get_template("sections.html.j2").module
    sections = [(key, title, Markup(getattr(module, key)()).strip()) for key, title in SECTIONS.items()]
    return env.get_template("page.html.j2").render(sections=[s for s in sections if s[2]])


def environment(images: dict[str, bytes]) -> Environment:
    """Templates with the style and the script of every page, and its PNGs by figure name."""
    files = FileSystemLoader(TEMPLATES)
    env = Environment(loader=files, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"thousands": "{:,}".format, "percent": "{:.0%}".format, "decimals": number}
    script = (TEMPLATES / "report.js").read_text()
    env.globals |= {
        "images": {name: base64.b64encode(image).decode() for name, image in images.items()},
        "style": Markup((TEMPLATES / "report.css").read_text()),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return env


# --- headline ------------------------------------------------------------------------------------------------------


def tiles(evaluation: dict) -> list[tuple[str, str]]:
    """(figure, sentence) of what matters most, for the top of the page and for a terminal. Every scored metric of every
    scored combination is counted."""
    counts, n_tables = evaluation["summary"], len(headline_tables(evaluation))
    n_metrics, every = len(headline_tables(evaluation)[0]), evaluation.get("by_combination")
    of = f"{n_metrics} metrics of {_some(n_tables, unit(evaluation))}" if every else f"{n_metrics} metrics, pooled"
    like = counts["like_real"]
    out = [
        (
            f"{like['reached']} of {like['judged']}",
            f"scores ({of}) that reach real training cells within their 95 % interval",
        )
    ]
    titles = {key: title for key, (title, *_) in BASELINES.items()} | {SHIFTED[0]: SHIFTED[1]}
    for key, n in counts["baselines"].items():
        where = ", on unseen combinations" if key == SHIFTED[0] else ""
        text = f"scores on which generated cells are closer to real ones than baseline ({key}), {titles[key]}{where}"
        out.append((f"{n['closer']} of {n['judged']}", text))
    if every:
        scored, skipped = len(evaluation["scored_combinations"]), len(evaluation["not_scored"])
        text = f"{unit(evaluation)}s have cells enough to be scored one by one"
        n_small = len(small_groups(evaluation))
        more = f". {n_small} {'is' if n_small == 1 else 'are'} too small" if skipped else ""
        out.append((f"{scored} of {scored + skipped}", text + more))
    return [*out, *_copies_tile(evaluation), *_response_tiles(evaluation), *_marker_tile(evaluation)]


def _copies_tile(evaluation: dict) -> list[tuple[str, str]]:
    of = {name: row["score"] for name, row in evaluation["memorisation"].items()}
    if "closer_to_training" not in of:
        return []
    text = (
        "of generated cells are closer to a training cell than to a held-out one (memorisation check: 50 % is ideal). "
        f"{100 * of['near_copies']:.1f} % are near copies (1 % expected), {100 * of['exact_copies']:.1f} % are exact "
        f"copies (real cells: {100 * of['exact_copies_real']:.1f} %)"
    )
    return [(f"{of['closer_to_training']:.0%}", text)]


def _response_tiles(evaluation: dict) -> list[tuple[str, str]]:
    out = []
    for condition, response in drawn_responses(evaluation).items():
        slope = response["pooled"]["slope"]
        if slope["value"] is not None:
            real = "" if slope["ceiling"] is None else f", real cells: {number(slope['ceiling'], 2)}"
            text = f"of the real change in response to {condition} (slope of log-fold changes: 1 is right{real})"
            out.append((number(slope["value"], 2), text))
    return out


def _marker_tile(evaluation: dict) -> list[tuple[str, str]]:
    found = evaluation.get("markers")
    if not found:
        return []
    up, real = (sum(m["log2_fold_change"][s] > 0 for m in found) for s in ("generated", "real"))
    return [
        (f"{up} of {len(found)}", f"marker genes up in the generated cells of their label (real test cells: {real})")
    ]


def _some(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


# --- notes ---------------------------------------------------------------------------------------------------------


def small_groups(evaluation: dict) -> list[str]:
    """Combinations that have too few compared cells to be scored one by one."""
    of, least = evaluation["cells"].get("by_combination", {}), evaluation["config"]["min_cells"]
    return [t for t in evaluation["not_scored"] if of[t]["compared"] < least]


def drawn_text(e: dict) -> str:
    """Of which splits not all cells were taken."""
    cells = e["cells"]
    of = "; ".join(f"{cells[split]:,} of {n:,} {split} cells" for split, n in cells["drawn_of"].items())
    return (
        f"{of}: drawn at random (evaluate.max_real_cells={e['config']['max_real_cells']:,}), training and test cells "
        "with the combinations in the shares at which they are compared."
    )


def matched_text(e: dict) -> str:
    """How many genes both files have, of those of the one that has fewer."""
    n = e["protocol"]["n_genes"]
    fewer = min(n["real"], n["generated"])
    return f"{n['common']:,} of {fewer:,} genes matched ({100 * n['common'] / fewer:.0f} %)"


APART = "They count neither in the means nor in the scores of all cells. "


def notes(e: dict) -> list[tuple[str, list[str]]]:
    """What a reader must know before the scores: a sentence, and the labels that it speaks of."""
    cells, of, what = e["cells"], e["cells"].get("by_combination", {}), unit(e)
    out: list[tuple[str, list[str]]] = [(text, []) for text in (e["pooled_only"], *e["notes"]) if text]

    def in_pooled(those: list[str]) -> str:
        n = len(set(those) - set(e["set_apart"]))
        if n == len(those):
            return ", which count in the pooled scores"
        return f". {n} of them count in the pooled scores" if n else ""

    if e["scored_combinations"] and (small := small_groups(e)):
        text = f"Fewer than {e['config']['min_cells']} cells to compare, and so not scored one by one: "
        out.append((f"{text}{_some(len(small), what)}{in_pooled(small)}.", small))
    if beyond := [t for t in e["not_scored"] if t not in set(small_groups(e))]:
        text = f"Not scored one by one, since evaluate.max_combinations={e['config']['max_combinations']:,}: "
        out.append((f"{text}{_some(len(beyond), what)}{in_pooled(beyond)}.", beyond))
    if unseen := [t for t, n in of.items() if n["unseen"]]:
        text = (
            f"No training cells (marked unseen). {APART if e['set_apart'] else ''}Their floor and baselines come from "
            "the training cells that share most labels"
        )
        out.append((f"{text}: {_some(len(unseen), what)}.", unseen))
    groups = of or {"cells of any label": cells}
    if short := [t for t, n in groups.items() if n["compared"] < n["test"]]:
        text = "Fewer cells than the test split holds were generated or trained on"
        out.append((f"{text}. All sets are compared at the smaller number: {_some(len(short), what)}.", short))
    if cells["drawn_of"]:
        out.append((drawn_text(e), []))
    for source, n in cells["without_counts"].items():
        if n:
            name = "real test" if source == "real" else "generated"
            out.append((f"{n:,} {name} cells have no counts at all in the judged genes.", []))
    if extra := cells.get("generated_only"):
        out.append((f"Generated but not in the test split, and not judged: {_some(len(extra), what)}.", extra))
    genes = e["protocol"]["n_genes"]
    if genes["common"] < max(genes["real"], genes["generated"]):
        text = f"Only the {genes['common']:,} genes that both have are compared"
        out.append((f"{text} (real {genes['real']:,}, generated {genes['generated']:,}).", []))
    return out


def sizes(e: dict) -> dict[str, dict[str, int]]:
    """section of scores -> compared cells of each group of cells that was scored for it."""
    of = e["cells"].get("by_combination", {})
    combinations = {t: of[t]["compared"] for t in e["scored_combinations"]}
    apart = sum(of[t]["compared"] for t in e["set_apart"])
    return {"pooled": {"": e["cells"]["compared"] - apart}, "per_combination": combinations}


def draws_text(e: dict) -> str:
    """Over how many draws floor and baselines were taken. Expensive metrics have fewer."""
    n = {name: len(row["floor"]["draws"]) for name, row in e["pooled"].items()}
    most = max(n.values())
    fewer = [METRICS[name].title for name in n if n[name] < most]
    less = min(n.values())
    return f"{most} draws" + (f" ({less} for {', '.join(fewer)})" if fewer else "")


def grey(e: dict) -> dict[str, list[str]]:
    """Figure or condition -> the labels that share the grey."""
    of_map = {condition: grey_labels(looks) for condition, looks in condition_looks(e).items()}
    return of_map | ({"markers": grey_labels(marker_looks(e))} if e.get("markers") else {"markers": []})


def response_facts(e: dict) -> list[dict[str, Any]]:
    """A response each, with its table, the contrasts that the figure leaves out, and those with too few cells."""
    out = []
    for condition, response in e["response"].items():
        drawn = drawn_contrasts(response)
        out.append(
            {
                "condition": condition,
                **{k: response[k] for k in ("control", "min_cells", "pooled")},
                "n": len(response["contrasts"]),
                "table": tables.response_table(response) if response["contrasts"] else None,
                "n_drawn": len(drawn),
                "left_out": [contrast_name(c) for c in response["left_out"]],
            }
        )
    return out


def settings(e: dict) -> list[tuple[str, str]]:
    """Inputs and configuration, flat."""
    made = {k: v for k, v in e.get("made_with", {}).items() if k not in ("command", "versions")}
    out: list[tuple[str, str]] = []
    for key, value in {**made, **e["config"]}.items():
        if isinstance(value, dict):
            out += [(f"{key}.{k}", str(v)) for k, v in value.items()]
        elif value not in ("", None):
            out.append((key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return out
