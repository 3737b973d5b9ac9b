"""The tables of a report, as text that a template writes, and how numbers are written.

Reading order: number formats, what a table is, scores, groups of cells, responses, others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scldm.evaluate.figures.looks import number
from scldm.evaluate.figures.response import contrast_name
from scldm.evaluate.figures.scores import all_baselines_of, ordered_metrics, unit
from scldm.evaluate.intervals import WIDTH as REACH
from scldm.evaluate.metrics import MEASURES, METRICS
from scldm.evaluate.protocols import PUBLISHED

SAMPLED = frozenset(name for measure in MEASURES if measure.sampled for name in measure.names)
DASH = "\N{EN DASH}"

# --- number formats ------------------------------------------------------------------------------------------------


def row_texts(row: dict) -> list[tuple[str, str]]:
    """Generated score, floor and baselines of one metric as (mean, how far it reaches). All have the same decimals, at
    most four, for about three digits of the middle one. The generated score reaches 1.96 standard errors, empty where
    there is none. The others reach a standard deviation."""
    others = (row["floor"], *row["baselines"].values())
    digits = digits_of(row["score"], *(v["mean"] for v in others))
    reach = "" if row["error"] is None else number(REACH * row["error"], digits)
    return [
        (number(row["score"], digits), reach),
        *((number(v["mean"], digits), number(v["sd"], digits)) for v in others),
    ]


def digits_of(*values: float) -> int:
    size = sorted(map(abs, values))[len(values) // 2]
    return 4 if size < 0.1 else 3 if size < 1 else 2 if size < 10 else 1 if size < 1_000 else 0


def normalised_text(value: float | None, beats: bool | None) -> str:
    """A normalised score with a tick where the baseline is beaten. A dash where floor and baseline are not told
    apart."""
    return DASH if value is None else number(value, 2) + (" ✓" if beats else " ✗")


# --- what a table is -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """text, a note after it and a line below it. A column is sorted by `value`, else by the text. kind: CSS classes,
    "name" for a label."""

    text: str
    note: str = ""
    below: str = ""
    value: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Head:
    text: str
    span: int = 1
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """heads: rows of heads, the last of them one a column. groups: title (may be empty) and rows."""

    heads: Sequence[Sequence[Head]]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]

    @property
    def n_rows(self) -> int:
        return sum(len(rows) for _, rows in self.groups)

    @property
    def n_columns(self) -> int:
        return len(self.heads[-1])


def count(n: int) -> Cell:
    return Cell(f"{n:,}", value=n)


def _with_reach(mean: str, reach: str, value: float | None, kind: str = "") -> Cell:
    return Cell(mean, f"± {reach}" if reach else "", value=value, kind=kind)


# --- scores --------------------------------------------------------------------------------------------------------


def score_table(e: dict, rows: Mapping[str, dict], sizes: Sequence[int]) -> Table:
    """All metrics of one level, the protocol's main ones first. sizes: compared cells of each group of cells that was
    scored."""
    main, further = ordered_metrics(e)
    keys = list(next(iter(rows.values()))["baselines"])
    titles = all_baselines_of(e)
    top = [
        Head("", 3),
        Head("baselines, drawn from training cells", len(keys)),
        Head("floor = 0, baseline = 1", len(keys), "edge"),
        Head(""),
    ]
    columns = [Head("metric"), Head("generated"), Head("floor")]
    columns += [Head(f"({key}) {titles[key][0]}") for key in keys]
    columns += [Head(f"({key})", kind="edge" * (key == keys[0])) for key in keys]
    columns.append(Head("cells a side"))
    limit = "max_cells" if rows is e["pooled"] else "max_group_cells"

    def cells(name: str) -> list[Cell]:
        row = rows[name]
        most = e["config"][limit] if name in SAMPLED else max(sizes)
        texts = row_texts(row)
        values = [row["score"], row["floor"]["mean"], *(row["baselines"][key]["mean"] for key in keys)]
        out = [Cell(METRICS[name].title)]
        out += [
            _with_reach(*text, value, "generated" * (k == 0))
            for k, (text, value) in enumerate(zip(texts, values, strict=True))
        ]
        for key in keys:
            text = normalised_text(row["normalised"][key], row["beats"][key])
            out.append(Cell(text, value=row["normalised"][key], kind="edge" * (key == keys[0])))
        return [*out, count(sum(min(n, most) for n in sizes))]

    groups = [("", [cells(name) for name in main]), ("further scores", [cells(name) for name in further])]
    return Table([top, columns], groups)


def parts_table(e: dict) -> Table:
    """Floor, parts of the model and generated cells side by side, at equal numbers of cells: which part costs what.
    Mean over combinations where these have cells enough, else pooled."""
    section, beside = parts_section(e), e["beside_parts"]
    sides = {"floor": beside["floor"], **e["parts"], "generated": beside["generated"]}
    heads = [Head("metric"), Head("floor"), *(Head(part["title"]) for part in e["parts"].values()), Head("generated")]

    def cells(name: str) -> list[Cell]:
        values = [side[section].get(name) for side in sides.values()]
        digits = digits_of(*(v for v in values if v is not None))
        of = [Cell(DASH) if v is None else Cell(number(v, digits), value=v) for v in values]
        return [Cell(METRICS[name].title), *of]

    main, further = ordered_metrics(e)
    return Table([heads], [("", [cells(m) for m in main]), ("further scores", [cells(m) for m in further])])


def parts_section(e: dict) -> str:
    return "per_combination" if "per_combination" in e["beside_parts"]["floor"] else "pooled"


# --- groups of cells -----------------------------------------------------------------------------------------------


def groups_table(e: dict, tables: Mapping[str, Mapping[str, dict]], sizes: Mapping[str, int], title: str) -> Table:
    """A row for each group of cells: the protocol's main metrics, each beside its floor."""
    main, _ = ordered_metrics(e)
    top = [Head("", 2), *(Head(METRICS[m].title, 2, "edge") for m in main)]
    pairs = [head for _ in main for head in (Head("generated", kind="edge"), Head("floor"))]
    rows = []
    for name, table in tables.items():
        unseen = e["cells"]["by_combination"].get(name, {}).get("unseen")
        cells = [Cell(name, "unseen" if unseen else "", kind="name"), count(sizes[name])]
        for m in main:
            row = table[m]
            score, floor, *_ = row_texts(row)
            cells += [_with_reach(*score, row["score"], "generated edge"), _with_reach(*floor, row["floor"]["mean"])]
        rows.append(cells)
    return Table([top, [Head(title), Head("cells"), *pairs]], [("", rows)])


def cells_table(e: dict) -> Table:
    """How many cells of each combination there are, and what was scored."""
    scored, sources = set(e["scored_combinations"]), ("train", "test", "generated", "compared")
    heads = [Head(unit(e)), *(Head({"train": "training"}.get(s, s)) for s in sources), Head("scored alone")]
    rows = []
    for name, of in e["cells"].get("by_combination", {}).items():
        related = f"relatives: {', '.join(of['relatives'])}" if of["unseen"] else ""
        first = Cell(name, "unseen" if of["unseen"] else "", related, kind="name")
        rows.append([first, *(count(of[s]) for s in sources), Cell("yes" if name in scored else "no")])
    total = [Cell("all cells"), *(count(e["cells"][s]) for s in sources), Cell("")]
    return Table([heads], [("", rows), ("", [total])] if rows else [("", [total])])


# --- responses -----------------------------------------------------------------------------------------------------

RESPONSE_TITLES = {
    "slope": "slope",
    "r": "r",
    **{f"{kind}_{k}": f"{kind}, top {k}" for k in (20, 50, 100) for kind in ("overlap", "direction")},
    "delta_r": "r of differences",
    "delta_mae": "error of differences",
}


def response_table(response: dict) -> Table:
    """A row for each contrast and one for all of them: every score of generated cells, and of real ones."""
    contrasts = response["contrasts"]
    names = [name for name in RESPONSE_TITLES if name in response["pooled"]]
    top = [Head("", 2), *(Head(RESPONSE_TITLES[name], 2, "edge") for name in names)]
    pairs = [head for _ in names for head in (Head("generated", kind="edge"), Head("real"))]

    def cells(scores: Mapping[str, dict]) -> list[Cell]:
        out = []
        for name in names:
            s = scores.get(name, {"value": None, "ceiling": None})
            reach = number(s["high"] - s["value"], 2) if "high" in s else ""
            made = DASH if s["value"] is None else number(s["value"], 2)
            real = DASH if s["ceiling"] is None else number(s["ceiling"], 2)
            out += [_with_reach(made, reach, s["value"], "generated edge"), Cell(real, value=s["ceiling"])]
        return out

    def sizes(contrast: dict) -> Cell:
        n = contrast["n_cells"]["test"]
        return Cell(f"{n['treated']:,} / {n['control']:,}", value=n["treated"] + n["control"])

    rows = []
    for c in contrasts:
        unseen = ["unseen"] if not c["n_cells"]["train"]["treated"] else []
        note = ", ".join([*unseen, *(["ceiling of test halves"] if c["of_halves"] else [])])
        rows.append([Cell(contrast_name(c), below=note, kind="name"), sizes(c), *cells(c["scores"])])
    what = "trained" if response["unseen"] else f"all {len(contrasts)}"
    every = [[Cell(f"{what} contrasts"), Cell(""), *cells(response["pooled"])]]
    if response["unseen"]:
        every.append([Cell("unseen contrasts"), Cell(""), *cells(response["unseen"])])
    return Table([top, [Head("contrast"), Head("test cells"), *pairs]], [("", every), ("each contrast", rows)])


# --- others --------------------------------------------------------------------------------------------------------


def markers_table(e: dict) -> Table:
    """Every marker gene: label, gene, Welch's t, log2 fold changes."""
    n_cells = e["markers_of"]["n_cells"]
    heads = ["label", "gene", "t", "real test, log2", "generated, log2", "up in generated"]
    rows = []
    for m in e["markers"]:
        real, generated = (m["log2_fold_change"][source] for source in ("real", "generated"))
        rows.append(
            [
                Cell(m["type"], f"({n_cells[m['type']]:,})", kind="name"),
                Cell(m["gene"], kind="name"),
                Cell(number(m["t"], 1), value=m["t"]),
                Cell(number(real, 2), value=real),
                Cell(number(generated, 2), value=generated),
                Cell("yes" if generated > 0 else "no", kind="" if generated > 0 else "strong"),
            ]
        )
    return Table([[Head(h) for h in heads]], [("", rows)])


def published_table(e: dict) -> Table:
    """The paper's numbers. Before them these cells', where the protocol is the nearest to the paper's."""
    heads = ["data", "setting", "method", "W2", "MMD²", "FD"]
    rows = [[*map(Cell, row[:3]), *(Cell(f"{v:g}", value=v) for v in row[3:])] for row in PUBLISHED]
    ours = []
    for section, setting in (("pooled", "unconditional"), ("per_combination", "conditional")):
        if e["protocol"]["name"] == "cfgen" and section in e:
            scores = [e[section][m]["score"] for m in ("w2", "mmd2_multiscale", "fd")]
            cells = [Cell(number(v, digits_of(v)), value=v, kind="generated") for v in scores]
            ours.append([Cell("these cells"), Cell(setting), Cell("generated"), *cells])
    groups = [("these cells", ours)] * bool(ours) + [("as published", rows)]
    return Table([[Head(h) for h in heads]], groups)
