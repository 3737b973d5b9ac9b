"""An evaluation as one self-contained HTML page: images embedded, no script, nothing fetched from elsewhere.

Reading order: write, the page, its sections, tables, number formats.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from scldm.evaluate.figures import FIGURES, LIBRARY_TYPES, has, rivals_of, score_sections, shown_types, style
from scldm.evaluate.metrics import METRICS
from scldm.evaluate.rivals import RIVALS
from scldm.files import written_aside
from scldm.progress import Progress

# --- write ---------------------------------------------------------------------------------------------------------


def write_report(evaluation: dict, folder: Path) -> list[Path]:
    """Draw every figure as folder/figures/NAME.png and the page over them as folder/report.html; returns what was
    written, the page first."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    images: dict[str, bytes] = {}
    drawn = [name for name in FIGURES if has(evaluation, name)]
    with style(), Progress("draw report", len(drawn), "figures") as bar:
        for name in drawn:
            buffer = io.BytesIO()
            FIGURES[name](evaluation).savefig(buffer, format="png")
            images[name] = buffer.getvalue()
            bar.advance(note=name)
    files = {folder / "report.html": page(evaluation, images).encode()}
    files |= {folder / "figures" / f"{name}.png": image for name, image in images.items()}
    for path, content in files.items():
        with written_aside(path) as file:
            file.write(content)
    return list(files)


# --- page ----------------------------------------------------------------------------------------------------------

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --page: #ffffff; --card: #f6f8fa; --line: #d1d9e0;
  --real: #0072b2; --generated: #c04f00; --floor: #00795a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --page: #0f1318; --card: #181e25;
  --line: #333c46; --real: #58b2ea; --generated: #ff8f4a; --floor: #3fcf9f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", "Liberation Sans",
sans-serif; } main { max-width: 1120px; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { max-width: 78ch; margin: .5rem 0; }
.soft, small { color: var(--soft); }
.real { color: var(--real); font-weight: 600; } .generated { color: var(--generated); font-weight: 600; }
.floor { color: var(--floor); font-weight: 600; }
nav { margin: 1rem 0 0; font-size: .93rem; } nav a { margin-right: 1.1rem; } a { color: var(--real); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { font-size: .9rem; color: var(--soft); display: block; line-height: 1.4; }
figure { margin: 1.1rem 0; } figure img { width: 100%; height: auto; display: block; background: #fff; border: 1px solid
var(--line);
  border-radius: 8px; padding: 10px; }
figcaption, caption { color: var(--soft); font-size: .93rem; text-align: left; margin-top: .5rem; max-width: 90ch; }
caption { margin: 0 0 .5rem; } caption b, figcaption b { color: var(--ink); }
.scroll { overflow-x: auto; margin: 1.1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .45rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
white-space: nowrap; } th { font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 11rem; }
td small { display: block; line-height: 1.35; white-space: normal; } td .sd { color: var(--soft); font-size: .85em; }
.group th { text-align: left; background: var(--card); } .left td, .left th { text-align: left; white-space: normal; }
td.left-edge, th.left-edge { border-left: 1px solid var(--line); }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
code, pre { font: .88rem/1.5 ui-monospace, "Liberation Mono", monospace; } pre { background: var(--card); border: 1px
solid var(--line);
  border-radius: 8px; padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
ul { max-width: 78ch; padding-left: 1.2rem; margin: .5rem 0; }
"""


def page(evaluation: dict, images: dict[str, bytes]) -> str:
    """The whole page; `images` are PNGs by figure name."""
    sections = [
        ("scores", "Scores", _scores(evaluation, images)),
        ("map", "Map of cells", _map(evaluation, images)),
        ("markers", "Marker genes", _markers(evaluation, images)),
        ("genes", "Genes", _genes(evaluation, images)),
        ("library", "Library sizes", _library(evaluation, images)),
        ("training", "Training", _training(evaluation, images)),
        ("cells", "Cells compared", _cells(evaluation)),
        ("made", "How this was made", _made(evaluation)),
    ]
    sections = [s for s in sections if s[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Generated cells against real ones</title><style>{CSS}</style></head><body><main>"
        f"{_head(evaluation)}<nav>{links}</nav>{body}</main></body></html>\n"
    )


# --- sections ------------------------------------------------------------------------------------------------------


def verdicts(evaluation: dict) -> list[tuple[str, str]]:
    """(figure, sentence) of what matters most, for the top of the page and for a terminal."""
    main = [m for m, metric in METRICS.items() if metric.main]
    section = score_sections(evaluation)[0]
    out = []
    for key in rivals_of(evaluation):
        if section == "pooled" and key == "c":
            continue  # the floor by construction
        beats = [evaluation[section][m]["beats"][key] for m in main]
        judged = [b for b in beats if b is not None]
        out.append(
            (
                f"{sum(judged)} of {len(judged)}",
                f"main metrics, {section.replace('_', ' ')}, on which generated cells are closer to real test cells "
                f"than rival ({key}), {RIVALS[key][0]}",
            )
        )
    found = evaluation.get("markers")
    if found:
        up = sum(m["log2_fold_change"]["generated"] > 0 for m in found)
        real = sum(m["log2_fold_change"]["real"] > 0 for m in found)
        out.append(
            (
                f"{up} of {len(found)}",
                f"marker genes up in the generated cells of their type (in real test cells: {real})",
            )
        )
    return out


def drawn_text(e: dict) -> str:
    """Of which splits not all cells were taken."""
    cells = e["cells"]
    of = "; ".join(f"{cells[split]:,} of {n:,} {split} cells" for split, n in cells["drawn_of"].items())
    return (
        f"{of}: drawn at random (evaluate.max_real_cells={e['config']['max_real_cells']:,}), training and test cells "
        "with the types in the shares at which they are compared."
    )


def _head(e: dict) -> str:
    made = e.get("made_with", {})
    names = " against ".join(f"<code>{escape(made[k])}</code>" for k in ("generated", "real") if k in made)
    cells = e["cells"]
    tiles = "".join(f'<div class="tile"><b>{b}</b><span>{escape(text)}</span></div>' for b, text in verdicts(e))
    notes = []
    by_type = cells.get("by_type", {"cells of any type": cells})
    short = [t for t, n in by_type.items() if n["compared"] < n["test"]]
    if e["pooled_only"]:
        notes.append(escape(e["pooled_only"]))
    if short:
        notes.append(
            f"Fewer cells than the test split holds were generated or trained on for {_list(short)}; all sets are "
            "compared at the smaller number."
        )
    if cells["drawn_of"]:
        notes.append(escape(drawn_text(e)))
    for source, n in cells["without_counts"].items():
        if n:
            notes.append(
                f"{n:,} {'real test' if source == 'real' else 'generated'} cells have no counts at all in the "
                "compared genes."
            )
    if cells.get("generated_only"):
        notes.append(f"Generated but not in the test split, and not judged: {_list(cells['generated_only'])}.")
    genes = e["protocol"]["n_genes"]
    if genes["common"] < max(genes["real"], genes["generated"]):
        notes.append(
            f"Only the {genes['common']:,} genes that both have are compared (real {genes['real']:,}, generated "
            f"{genes['generated']:,})."
        )
    of_types = f" of {len(cells['by_type'])} types" if "by_type" in cells else ""
    listed = f"<ul>{''.join(f'<li>{n}</li>' for n in notes)}</ul>" if notes else ""
    return (
        f"<h1>Generated cells against real ones</h1><p "
        f"class='soft'>{names}{' · ' if names else ''}{escape(made.get('created', ''))}</p><p>{cells['compared']:,} "
        f"<span class='generated'>generated</span> cells{of_types} are compared with equally many "
        f"<span class='real'>real</span> cells that the model never saw (the test split), on {genes['common']:,} "
        "genes. Every score is set between two marks: the <span class='floor'>floor</span>, which is what the "
        f"training cells themselves reach, and the rivals, which are cells anyone could draw from the training "
        f"cells without a model.</p><div class='tiles'>{tiles}</div>{listed}"
    )


def _scores(e: dict, images: dict[str, bytes]) -> str:
    draws, p = e["config"]["n_draws"], e["protocol"]
    rivals = "".join(f"<li><b>({k}) {title}</b>: {what}.</li>" for k, (title, what, _) in rivals_of(e).items())
    rows = (
        f"Top row: each type on its own, averaged over types with at least {e['config']['min_cells']} test cells, "
        "weighted by cells. Bottom row: all cells at once"
        if e["scored_types"]
        else "All cells at once"
    ) + (", where rival (c) is by construction as good as the floor." if "c" in rivals_of(e) else ".")
    caption = (
        f"<b>Where generated cells stand.</b> Orange: generated cells. Green: the floor, real training cells. Grey: "
        f"the rivals. Bars are &plusmn; 1 standard deviation over {draws} draws (most are smaller than the symbol). "
        f"{rows}"
    )
    pooled = f"<b>Scores pooled</b>: all {e['cells']['compared']:,} cells at once."
    if e["scored_types"]:
        per_type = (
            f"<b>Scores per type</b>: mean over {len(e['scored_types'])} types with at least "
            f"{e['config']['min_cells']} test cells ({_list(e['scored_types'])}), weighted by cells. "
            f"{_how_to_read(draws)}"
        )
        tables = _score_table(e, "per_type", per_type)
        tables += _score_table(e, "pooled", f"{pooled} Columns as above.", explain=False) + _by_type_table(e)
    else:
        tables = _score_table(e, "pooled", f"{pooled} {_how_to_read(draws)}")
    return (
        "<p>All scores compare log-normalised expression (counts per 10,000, log1p) of generated and of test cells. "
        f"The first four are distances in the first {p['n_components']} principal components, which were fitted on "
        f"validation cells and hold {100 * p['explained_variance']:.0f} % of their variance. The rivals, drawn from "
        f"the training cells:</p><ul>{rivals}</ul>"
        f"{_figure(images, 'scores', caption)}{tables}"
    )


def _how_to_read(draws: int) -> str:
    return (
        f"Floor and rivals: mean &plusmn; standard deviation over {draws} draws. The last columns are (score "
        "&minus; floor) / (rival &minus; floor): <b>0 is as good as real training cells, 1 as poor as the rival</b>; "
        "✓ where the generated cells are closer to the test cells than the rival, ✗ where not, &ndash; where the "
        "metric does not find the rival worse than the floor (by three standard errors)."
    )


def _map(e: dict, images: dict[str, bytes]) -> str:
    caption = (
        "<b>Real and generated cells on one map.</b> UMAP of the principal components of both together; axes have no "
        "unit, and distances between far groups mean little. Left: orange should cover blue evenly; blue alone is a "
        "state that was not generated, orange alone one that does not exist. Middle and right: the same map with one "
        "source's cells"
    ) + (
        " by type (the others in pale grey); the colours should lie alike."
        if "by_type" in e["cells"]
        else " (the others in pale grey)."
    )
    return _figure(images, "umap", caption)


def _markers(e: dict, images: dict[str, bytes]) -> str:
    if "markers" not in e:
        return ""
    found = e["markers"]
    if not found:
        return "<p>No type has enough cells (3 for training, 3 compared) for marker genes.</p>"
    per = max(sum(m["type"] == t for m in found) for t in e["expression"]["types"])
    all_types, shown = e["expression"]["types"], shown_types(e)
    cut = (
        f" Shown: the {len(shown)} types with the most cells of {len(all_types)}."
        if len(shown) < len(all_types)
        else ""
    )
    dots = (
        f"<b>Marker genes by type, real above generated.</b> Columns: the {per} genes of each type that stand out "
        "most in real <i>training</i> cells (Welch t-test of log expression against all other cells), in the order of "
        "the rows, so that each type's own markers are boxed. Dot size: share of the type's cells with at least one "
        f"count. Colour: mean log expression, divided by that of the real type that has most. The two panels should "
        f"look alike.{cut}"
    )
    changes = (
        "<b>How strongly each marker stands out.</b> log2 of the ratio of mean counts per 10,000 (+ 1) in the type to "
        "that in all other cells of the same source; 1 is twofold. On the dashed line generated cells are as distinct "
        "as real test cells, below it less so; in the shaded part the marker is not up at all. The five that fall "
        "shortest are named."
    )
    number = {t: n["compared"] for t, n in e["cells"]["by_type"].items()}
    rows = []
    for m in found:
        real, generated = (m["log2_fold_change"][source] for source in ("real", "generated"))
        rows.append(
            f"<tr><td>{escape(m['type'])} <span class='soft'>({number[m['type']]:,})</span></td>"
            f"<td>{escape(m['gene'])}</td><td>{m['t']:.1f}</td><td>{real:+.2f}</td><td>{generated:+.2f}</td>"
            f"<td>{'yes' if generated > 0 else '<b>no</b>'}</td></tr>"
        )
    return (
        _figure(images, "marker_dots", dots)
        + _figure(images, "marker_changes", changes)
        + "<details><summary>All marker genes in numbers</summary><div class='scroll'><table><caption><b>Marker "
        "genes.</b> t: Welch's statistic in the training cells; log2 fold change of the type (compared cells in "
        "brackets) against all other cells, in real test and in generated "
        f"cells.</caption><tr><th>type</th><th>gene</th><th>t</th><th>real test, log2</th><th>generated, "
        f"log2</th><th>up in generated</th></tr>{''.join(rows)}</table></div></details>"
    )


def _genes(e: dict, images: dict[str, bytes]) -> str:
    caption = (
        f"<b>Every gene, generated against real.</b> One point is one of {e['protocol']['n_genes']['common']:,} "
        "genes, over all compared cells; expression is log1p of counts per 10,000. Dashed: equality. r: Pearson "
        "correlation; the table of pooled scores says what r real training cells reach."
    )
    return _figure(images, "genes", caption)


def _library(e: dict, images: dict[str, bytes]) -> str:
    n_types = len(e["cells"].get("by_type", ()))
    cut = f" Shown: the {LIBRARY_TYPES} largest of {n_types} types." if n_types > LIBRARY_TYPES else ""
    caption = (
        f"<b>Total counts per cell{', by type' if n_types else ''}.</b> Points: single cells (at most 400 a row). "
        "Pale bar: the middle half of them. Black line: the median. In brackets: cells a source. "
        f"{'Types in the order of their size. ' if n_types else ''}Blue and orange bars should lie one above the "
        f"other.{cut}"
    )
    return _figure(images, "library_sizes", caption)


def _training(e: dict, images: dict[str, bytes]) -> str:
    caption = (
        "<b>Loss while training.</b> Pale: the training loss of each logged step. Grey: its running mean. Black: the "
        "loss on validation cells, which are never trained on; the best value is written beside it. A black line that "
        "turns upwards while grey falls is overfitting. The autoencoder's losses are sums over different genes: in "
        "training those of the step (a random subset, unless it trains on all), in validation all of them; so their "
        "courses compare, not their heights. The largest values, at the start, are cut off."
    )
    return _figure(images, "loss_curves", caption)


def _cells(e: dict) -> str:
    typed = "by_type" in e["cells"]
    rows = "".join(
        f"<tr><td>{escape(t)}</td>{''.join(f'<td>{n[k]:,}</td>' for k in ('train', 'test', 'generated', 'compared'))}"
        f"<td>{'yes' if t in e['scored_types'] else ''}</td></tr>"
        for t, n in e["cells"].get("by_type", {}).items()
    )
    n = e["cells"]
    alone = " Scored alone: enough of them for scores of the type's own; all types count in the pooled scores."
    return (
        f"<div class='scroll'><table><caption><b>Cells{' by type' if typed else ''}.</b> Compared: how many of each "
        "set every comparison takes: as many as the test split holds, or fewer where fewer were generated or trained "
        f"on.{alone if typed else ''}</caption><tr><th>{'type' if typed else ''}</th><th>training</th><th>test</th>"
        f"<th>generated</th><th>compared</th><th>{'scored alone' if typed else ''}</th></tr>{rows}"
        f"<tr><th>all</th><th>{n['train']:,}</th><th>{n['test']:,}</th>"
        f"<th>{n['generated']:,}</th><th>{n['compared']:,}</th><th></th></tr></table></div>"
        f"<p class='soft'>{n['validation']:,} validation cells fitted the principal components and were neither "
        "trained on nor judged.</p>"
    )


def _made(e: dict) -> str:
    made = dict(e.get("made_with", {}))
    command, versions = made.pop("command", ""), made.pop("versions", {})
    settings = {**made, **e["config"]}
    rows = "".join(
        f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>"
        for k, v in settings.items()
        if v not in ("", None)
    )
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        (f"<p>The command:</p><pre>{escape(command)}</pre>" if command else "")
        + f"<div class='scroll'><table class='left'><caption><b>Settings.</b> All numbers of this page are in "
        f"evaluation.json beside it.</caption><tr><th>setting</th><th>value</th></tr>{rows}</table></div>"
        + (f"<p class='soft'>{escape(listed)}</p>" if listed else "")
    )


# --- tables --------------------------------------------------------------------------------------------------------


def _score_table(e: dict, section: str, caption: str, explain: bool = True) -> str:
    rows, rivals = e[section], rivals_of(e)
    titles = "".join(f"<th>({k}) {title}</th>" for k, (title, *_) in rivals.items())
    marks = "".join(f"<th{' class=left-edge' if k == 'a' else ''}>({k})</th>" for k in rivals)
    out = [
        f"<tr><th></th><th></th><th></th><th colspan='{len(rivals)}'>rivals, drawn from training cells</th>"
        f"<th class='left-edge' colspan='{len(rivals)}'>floor = 0, rival = 1</th></tr>"
        f"<tr><th>metric</th><th>generated</th><th>floor</th>{titles}{marks}</tr>"
    ]
    out += [_score_row(name, rows[name], explain) for name, metric in METRICS.items() if metric.main]
    out.append(f"<tr class='group'><th colspan='{3 + 2 * len(rivals)}'>further scores</th></tr>")
    out += [_score_row(name, rows[name], explain) for name, metric in METRICS.items() if not metric.main]
    return f"<div class='scroll'><table><caption>{caption}</caption>{''.join(out)}</table></div>"


def _by_type_table(e: dict) -> str:
    main = [m for m, metric in METRICS.items() if metric.main]
    titles = "".join(f"<th class='left-edge' colspan='2'>{METRICS[m].title}</th>" for m in main)
    pairs = "<th class='left-edge'>generated</th><th>floor</th>" * len(main)
    rows = []
    for t in e["scored_types"]:
        cells = f"<td>{escape(t)}</td><td>{e['cells']['by_type'][t]['compared']:,}</td>"
        for m in main:
            (score, _), (mean, sd), *_ = row_texts(e["by_type"][t][m])
            cells += (
                f"<td class='generated left-edge'>{score}</td><td>{mean} <span class='sd'>&plusmn; {sd}</span></td>"
            )
        rows.append(f"<tr>{cells}</tr>")
    return (
        "<div class='scroll'><table><caption><b>Scores of each type</b> with enough cells, beside the floor of that "
        "type. Its rivals are in evaluation.json.</caption>"
        f"<tr><th></th><th></th>{titles}</tr><tr><th>type</th><th>cells</th>{pairs}</tr>{''.join(rows)}</table></div>"
    )


def _score_row(name: str, row: dict, explain: bool) -> str:
    metric = METRICS[name]
    meaning = f"<small>{escape(metric.meaning)}</small>" if explain else ""
    score, floor, *rivals = row_texts(row)
    cells = "".join(f"<td>{mean} <span class='sd'>&plusmn; {sd}</span></td>" for mean, sd in (floor, *rivals))
    normalised = "".join(
        f"<td{' class=left-edge' if k == 'a' else ''}>{normalised_text(row['normalised'][k], row['beats'][k])}</td>"
        for k in row["rivals"]
    )
    return f"<tr><td>{metric.title}{meaning}</td><td class='generated'>{score[0]}</td>{cells}{normalised}</tr>"


def _figure(images: dict[str, bytes], name: str, caption: str) -> str:
    if name not in images:
        return ""
    title = caption.split("<b>")[1].split("</b>")[0]
    data = base64.b64encode(images[name]).decode()
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


# --- formats -------------------------------------------------------------------------------------------------------


def row_texts(row: dict) -> list[tuple[str, str]]:
    """Generated score, floor and rivals of one metric as (mean, standard deviation), all with the same decimals: about
    three digits of the middle one, at most four decimals."""
    cells = [(row["score"], 0.0), *((v["mean"], v["sd"]) for v in (row["floor"], *row["rivals"].values()))]
    size = sorted(abs(mean) for mean, _ in cells)[len(cells) // 2]
    digits = 4 if size < 0.1 else 3 if size < 1 else 2 if size < 10 else 1 if size < 1_000 else 0
    return [(_fixed(mean, digits), _fixed(sd, digits)) for mean, sd in cells]


def _fixed(value: float, digits: int) -> str:
    """A number with so many decimals, a true minus sign, and no minus before zero."""
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def normalised_text(value: float | None, beats: bool | None) -> str:
    """A normalised score with a tick where the rival is beaten; a dash where floor and rival are not told apart."""
    return "\N{EN DASH}" if value is None else _fixed(value, 2) + (" ✓" if beats else " ✗")


def _list(labels: list[str], shown: int = 6) -> str:
    more = f" and {len(labels) - shown} more" if len(labels) > shown else ""
    return escape(", ".join(labels[:shown])) + more
