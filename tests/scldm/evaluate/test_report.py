"""The page and its figures, from evaluations that are made up here: nothing is computed, and all of it is drawn."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from scldm.evaluate.figures import FIGURES, has, png
from scldm.evaluate.figures.cells import LIBRARY_ROWS, library_groups
from scldm.evaluate.figures.curves import loss_curves
from scldm.evaluate.figures.genes import spread
from scldm.evaluate.figures.looks import N_LOOKS, OTHERS, STYLE, condition_looks, label, labels, style
from scldm.evaluate.figures.scores import HEAT_ROWS, all_baselines_of, baselines_of, place, score_sections
from scldm.evaluate.metrics import METRICS
from scldm.evaluate.protocols import PROTOCOLS
from scldm.evaluate.report import SECTIONS, drawn_text, page, tiles, write_report
from scldm.evaluate.report_tables import normalised_text, parts_table, published_table, row_texts, score_table
from tests.scldm.evaluate.made_up import GENES, TWO, evaluation

STRANGE = [r"T $\foo$ cell", "a_b^c", "<b>&\"'", "% {{ x }}", "_hidden", "\U0001f9ec 肝", "עברית", "x" * 200, "x" * 199]
STRANGE += ["two\nlines", "</script><script>alert(1)</script>"]

# --- what a figure or a page holds -----------------------------------------------------------------------------------


def texts_of(e: dict, name: str) -> list[Text]:
    """Every text of a figure, laid out: a glyph that the font lacks warns, and warnings are errors."""
    with style():
        figure: Figure = FIGURES[name](e)
        figure.draw_without_rendering()
        return [t for t in figure.findobj(Text) if t.get_text()]  # type: ignore[union-attr]


def whole_page(e: dict) -> str:
    return page(e, {name: b"" for name in FIGURES if has(e, name)})


class Reader(HTMLParser):
    """tags: how often each was opened; text: what a reader sees, white space as one space."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.parts: list[str] = []
        self.feed(html)
        self.text = " ".join("".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


# --- labels and genes are text -------------------------------------------------------------------------------------


def with_part(e: dict, title: str, value: float, n_cells: int) -> dict:
    """The evaluation with a part of so many cells, and its scores beside those of generated and training cells."""
    sections = ("pooled", "per_combination")
    scores = {v: {section: dict.fromkeys(METRICS, v) for section in sections} for v in (value, 0.1, 0.7, 0.01)}
    e["parts"] = {"reconstructed": {"title": title, "meaning": "decoded", **scores[value]}}
    beside = {"floor": scores[0.1], "generated": scores[0.7], "floor_sd": scores[0.01]}
    return e | {"beside_parts": {"n_cells": n_cells, **beside}}


@pytest.fixture(scope="module")
def strange() -> dict:
    e = evaluation({"$type_1$ <i>": STRANGE, "_treat%": [r"$\ctrl", "st}im"]}, unseen=1)
    e = with_part(e, r"<b> $\p_1", 0.2, e["cells"]["compared"])
    e["curves"] = {"vae": {"train": {"nll": [[64, 200.0], [128, 150.0]]}}}
    return e


@pytest.mark.heavy
@pytest.mark.parametrize("name", FIGURES)
def test_labels_are_text_in_every_figure(strange, name):
    texts = texts_of(strange, name)
    assert not any(t.get_parse_math() or t.get_usetex() for t in texts)
    seen = " ".join(t.get_text() for t in texts)
    expected = {
        "heat_map": r"T $\foo$ cell",
        "responses": r"T $\foo$ cell",
        "umap": "_hidden",
        "library_sizes": "a_b^c",
    }
    expected |= {"marker_dots": "$g_1$", "marker_changes": "עברית", "scores": r"<b> $\p_1"}
    assert expected.get(name, "") in seen


@pytest.mark.heavy
def test_figures_don_t_take_the_users_style_and_leave_it_as_it_was(strange):
    with mpl.rc_context({"text.usetex": True, "text.parse_math": True, "figure.dpi": 33}):
        png(strange, "library_sizes")
        assert mpl.rcParams["text.usetex"]
        assert mpl.rcParams["text.parse_math"]
        assert mpl.rcParams["figure.dpi"] == 33


def test_labels_are_text_on_the_page(strange):
    strange = strange | {"made_with": {"command": "scldm evaluate 'a<b'", "generated": "<u>.h5ad"}}
    plain = Reader(whole_page(evaluation(TWO)))
    read = Reader(whole_page(strange))
    assert read.tags["script"] == plain.tags["script"] == 1
    assert read.tags["i"] == plain.tags["i"]
    assert "u" not in read.tags
    for text in (*STRANGE, *GENES[:2], "$type_1$ <i>", "<u>.h5ad", "'a<b'"):
        assert " ".join(text.split()) in read.text, text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("_x", " _x"),  # matplotlib drops it from a legend
        ("a\n b\t\u200dc", "a b c".replace(" c", " c")),
        ("\U0001f9ec", "U+1F9EC"),
        ("0123456789", "0123456789"),
        ("0123456789a", "01234…789a"),
    ],
)
def test_label_in_a_figure(text, shown):
    assert label(text, 10) == shown


def test_labels_that_would_read_alike_are_told_apart():
    assert labels(["x" * 200, "x" * 199, "y"], 5) == ["xx…xx", "xx…xx (2)", "y"]


# --- no label is lost ----------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_no_two_labels_look_alike_until_they_are_named_as_others():
    looks = condition_looks(evaluation(TWO))
    every = [look for of in looks.values() for look in of.values()]
    assert len(set(every)) == 5
    many = evaluation({"cell_type": [f"type {k:02}" for k in range(60)], "treatment": ["ctrl", "stim"]})
    looks = condition_looks(many)
    own = [look for look in looks["cell_type"].values() if look != OTHERS]
    assert len(own) == len(set(own)) == N_LOOKS == 18
    assert list(looks["cell_type"])[:18] == [f"type {k:02}" for k in range(18)]  # those with most cells
    assert "42 others" in [t.get_text() for t in texts_of(many, "umap")]
    read = Reader(whole_page(many)).text
    named = re.search(r"Grey, of cell_type: 42 labels with fewer cells\. all 42 names ((type \d\d(, )?)+)", read)
    assert named is not None
    assert named[1].split(", ") == [f"type {k}" for k in range(18, 60)]


@pytest.mark.heavy
def test_heat_map_shows_all_or_says_how_many_are_elsewhere():
    few = [t.get_text() for t in texts_of(evaluation(TWO, unseen=1, small=1), "heat_map")]
    assert "T cell · stim" in few
    assert not [text for text in few if text.startswith("NK · ctrl")]  # real cells of others are no floor for it
    assert "NK · stim" not in few  # too small to be scored
    many = evaluation({"cell_type": [f"type {k}" for k in range(70)]})
    rows = [t.get_text() for t in texts_of(many, "heat_map")]
    assert len({text for text in rows if text.startswith("type ")}) == HEAT_ROWS == 60
    assert "10 more labels with fewer cells stand in the table" in rows
    assert "The scores of the other 10 are in the table below." in Reader(whole_page(many)).text


@pytest.mark.heavy
def test_library_sizes_pool_the_smallest_and_lose_no_cell():
    many = evaluation({"cell_type": [f"type {k}" for k in range(45)]})
    groups = library_groups(many)
    assert len(groups) == LIBRARY_ROWS == 40
    assert list(itertools.chain(*groups.values())) == list(many["cells"]["by_combination"])
    rest = sum(many["cells"]["by_combination"][t]["compared"] for t in groups["6 others"])
    assert f"6 others  ({rest})" in [t.get_text() for t in texts_of(many, "library_sizes")]


def test_combination_without_cells_on_the_map_has_its_row():
    e = evaluation(TWO)
    for source in e["map"]:
        source["combination"] = ["B cell · ctrl"] * len(source["combination"])
    assert "NK · stim  (21)" in [t.get_text() for t in texts_of(e, "library_sizes")]


@pytest.mark.heavy
def test_responses_show_the_largest_contrasts_and_say_so():
    e = evaluation({"cell_type": [f"type {k}" for k in range(16)], "treatment": ["ctrl", "stim"]})
    texts = [t.get_text() for t in texts_of(e, "responses")]
    assert "type 14\nstim against ctrl" in texts
    assert "type 2\nstim against ctrl" not in texts
    assert texts.count("slope 0.60 (real 1.02)\nr 0.80 (real 0.95)") == 12
    wanted = "treatment, all contrasts: slope 0.60 [0.50, 0.70] (real 1.02), r 0.80 (real 0.95), "
    assert wanted + "and below the 12 with most cells of 15" in texts
    read = Reader(whole_page(e)).text
    assert "treatment: the 12 contrasts with the most test cells of 15. All are in the table." in read
    assert "treatment: 1 contrast with fewer than 20 cells on some side is left out. type 15: stim against ctrl" in read
    assert "type 2: stim against ctrl" in read


def test_response_that_can_t_be_told():
    e = evaluation(TWO)
    response = e["response"]["treatment"]
    none = {"value": None, "ceiling": None}
    response["pooled"] |= {"slope": none}
    response["contrasts"][0]["scores"] = response["contrasts"][0]["scores"] | {"slope": none}
    assert "slope can't be told\nr 0.80 (real 0.95)" in [t.get_text() for t in texts_of(e, "responses")]
    assert not any("treatment" in text for _, text in tiles(e))
    whole_page(e)
    response |= {"contrasts": [], "pooled": {}}
    assert not has(e, "responses")
    assert "no contrast has 20 test and generated cells on either side" in Reader(whole_page(e)).text


# --- what the numbers say ------------------------------------------------------------------------------------------


def test_tiles_count_every_scored_metric_and_combination():
    e = evaluation(TWO, small=2, unseen=1)
    told = {text: figure for figure, text in tiles(e)}
    like, n = e["summary"]["like_real"], len(METRICS)
    first = f"scores ({n} metrics of 3 combinations) that reach real training cells within their 95 % interval"
    assert told[first] == f"{like['reached']} of {3 * n}"
    for key in "abcd":
        (text,) = (t for t in told if f"baseline ({key})" in t)
        counts = e["summary"]["baselines"][key]
        assert told[text] == f"{counts['closer']} of {counts['judged']}"
    assert told["combinations have cells enough to be scored one by one. 2 are too small"] == "4 of 6"
    (copies,) = (figure for text, figure in told.items() if "memorisation check" in text)
    assert copies == "90%"
    (slope,) = (figure for text, figure in told.items() if "in response to treatment" in text)
    assert slope == "0.60"


def test_head_says_the_verdict_the_protocol_and_what_is_not_scored():
    e = evaluation(TWO, small=2, unseen=1)
    e["not_scored"] = ["T cell · stim", *e["not_scored"]]  # beyond evaluate.max_combinations
    head = Reader(whole_page(e).split("<nav>")[0]).text
    assert f"{e['verdict']['says']} Next: {e['verdict']['next']}" in head
    assert f"Protocol: scldm. {PROTOCOLS['scldm'].meaning}" in head
    assert "not scored one by one: 2 combinations, which count in the pooled scores. NK · ctrl, NK · stim" in head
    assert "max_combinations=100: 1 combination. T cell · stim" in head  # unseen, and set apart
    assert "most labels: 1 combination. T cell · stim" in head
    e["set_apart"] = ["NK · stim"]
    text = Reader(whole_page(e).split("<nav>")[0]).text
    assert "one by one: 2 combinations. 1 of them count in the pooled scores. NK · ctrl, NK · stim" in text
    e["set_apart"] = ["NK · ctrl", "NK · stim"]
    assert "one by one: 2 combinations. NK" in Reader(whole_page(e).split("<nav>")[0]).text


def test_place_is_between_the_floor_and_the_best_baseline_that_is_told_from_it():
    row = {
        "floor": {"mean": 1.0},
        "baselines": {"a": {"mean": 3.0}, "b": {"mean": 2.0}, "c": {"mean": 1.1}},
        "normalised": {"a": 0.25, "b": 0.5, "c": None},
    }
    assert place(row) == 0.5  # of b
    assert place(row | {"normalised": dict.fromkeys("abc")}) is None


def test_score_table_has_the_protocols_main_scores_first_and_says_how_many_cells():
    e = evaluation(TWO, protocol="cfgen")
    found = score_table(e, e["per_combination"], [30, 20])
    (_, main), (further, others) = found.groups
    assert [cells[0].text for cells in main] == [METRICS[m].title for m in PROTOCOLS["cfgen"].main]
    assert further == "further scores"
    assert len(main) + len(others) == len(METRICS)
    assert {len(cells) for cells in main} == {found.n_columns}
    by_title = {cells[0].text: cells for cells in (*main, *others)}
    assert by_title["W2"][-1].text == "45"  # at most 25 a side
    assert by_title["FD"][-1].text == "50"
    assert by_title["W2"][1].note == "± 0.039"  # 1.96 standard errors of 0.02
    assert published_table(e).groups[0][0] == "these cells"
    assert [cells[1].text for cells in published_table(e).groups[0][1]] == ["unconditional", "conditional"]
    assert len(published_table(evaluation(TWO)).groups) == 1


def test_texts_of_a_row_have_the_same_decimals():
    other = {"mean": 14.25, "sd": 0.5}
    row = {"score": 9.999, "error": 1.0, "floor": {"mean": -0.04, "sd": 0.01}, "baselines": {"a": other, "b": other}}
    assert row_texts(row) == [("10.0", "2.0"), ("0.0", "0.0"), ("14.2", "0.5"), ("14.2", "0.5")]
    assert row_texts(row | {"error": None})[0] == ("10.0", "")
    assert [normalised_text(-0.25, True), normalised_text(1.5, False)] == ["\N{MINUS SIGN}0.25 ✓", "1.50 ✗"]
    assert normalised_text(None, None) == "\N{EN DASH}"


@pytest.mark.heavy
def test_parts_stand_beside_the_generated_cells():
    e = with_part(evaluation(TWO), "reconstructed test cells", 0.2, 9)
    assert [cell.value for cell in parts_table(e).groups[0][1][0][1:]] == [0.1, 0.2, 0.7]
    page = Reader(whole_page(e)).text
    assert "reconstructed test cells: decoded." in page
    assert "All are scored at the same 9 cells" in page
    # at other numbers of cells they stand on no axis with the others
    assert "reconstructed test cells" not in [t.get_text() for t in texts_of(e, "scores")]
    same = with_part(evaluation(TWO), "reconstructed test cells", 0.2, e["cells"]["compared"])
    assert "reconstructed test cells" in [t.get_text() for t in texts_of(same, "scores")]
    assert SECTIONS["parts"] not in whole_page(evaluation(TWO))


def test_baseline_of_unseen_combinations_stands_in_no_table_of_others():
    e = evaluation(TWO, unseen=1)
    assert list(baselines_of(e)) == ["a", "b", "c"]
    assert list(all_baselines_of(e)) == ["a", "b", "c", "d"]
    assert score_sections(e) == ["per_combination", "pooled"]
    e["cells"] |= {"drawn_of": {"train": 5_000}, "train": 1_000}
    assert drawn_text(e).startswith("1,000 of 5,000 train cells: drawn at random (evaluate.max_real_cells=100,000)")


# --- other shapes --------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_page_without_conditions_leaves_out_what_needs_them():
    e = evaluation({})
    read = Reader(whole_page(e))
    assert "No condition was given." in read.text
    assert score_sections(e) == ["pooled"]
    assert [name for name in FIGURES if has(e, name)] == ["scores", "umap", "genes", "library_sizes"]
    for name in ("scores", "umap", "genes", "library_sizes"):
        texts_of(e, name)
    for absent in ("combinations", "response", "markers", "parts", "training"):
        assert f'id="{absent}"' not in whole_page(e)
    assert "shuffled" not in read.text


def test_one_condition_speaks_of_labels():
    read = Reader(whole_page(evaluation({"cell_type": ["A", "B", "C"]}, small=1))).text
    assert "Scores, mean over 2 labels: of A, B" in read
    assert "not scored one by one: 1 label, which count" in read
    assert "combination with" not in read


def test_losses_over_different_genes_don_t_share_an_axis():
    curve = {"train": {"nll": [[64, 200.0], [128, 150.0]]}, "validation": {"nll": [[128, 450.0]]}}
    ldm = {"train": {"velocity_loss": [[64, 1.0]]}, "validation": {"velocity_loss": [[64, 1.1]]}}
    training, validation, both = loss_curves({"curves": {"vae": curve, "ldm": ldm}}).axes
    assert training.get_ylabel() == "nats per cell, over the genes of the step"
    assert validation.get_ylabel() == "nats per cell, over all genes"
    assert training.get_ylim()[1] < 300 < validation.get_ylim()[0]
    assert [line.get_label() for line in both.get_lines()][-1] == "validation"
    assert len(both.get_lines()) == 3
    assert not has({"curves": {"vae": {"train": {"lr": [[64, 0.1]]}}}}, "loss_curves")


def test_names_in_a_column_keep_apart_and_in_order():
    moved = spread(np.array([1.0, 0.95, 3.0, 1.02]), 0.5)
    assert np.diff(np.sort(moved)).min() >= 0.5 - 1e-12
    assert list(np.argsort(moved)) == [1, 0, 3, 2]
    assert moved.mean() == pytest.approx(1.4925)


# --- the files -----------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_report_is_whole_and_needs_nothing_from_elsewhere(strange, tmp_path, monkeypatch):
    monkeypatch.setitem(STYLE, "savefig.dpi", 40)  # 6 s otherwise
    made = {"command": "scldm evaluate", "created": "today", "versions": {"numpy": "2"}}
    (tmp_path / "out" / "figures").mkdir(parents=True)
    left, others = (tmp_path / "out" / f".{name}.0123456789ab.partial" for name in ("report.html", "x.h5ad"))
    for path in (left, others):
        path.touch()
    written = write_report(strange | {"made_with": made}, tmp_path / "out")
    assert [p.name for p in written] == ["report.html", *(f"{name}.png" for name in FIGURES)]
    html = written[0].read_text()
    assert html.count("data:image/png;base64,") == len(FIGURES)
    assert not re.search(r"(src|href)=[\"'](?!data:image/png;base64,|#)|@import|url\(|<link", html)
    script = re.search(r"<script>(.*)</script></body>", html, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html  # else a browser won't run it
    targets = set(re.findall(r'href="#([^"]+)"', html))
    assert targets == set(re.findall(r'<(?:section|figure) id="([^"]+)"', html))
    assert list((tmp_path / "out").rglob("*.partial")) == [others]  # another verb may be writing


def test_every_row_of_a_table_has_a_cell_for_every_column(strange):
    for block in re.findall(r"<table.*?</table>", whole_page(strange), re.DOTALL):
        rows = re.findall(r"<tr>.*?</tr>", block, re.DOTALL)
        widths = {sum(int(n or 1) for n in re.findall(r"<t[hd](?: colspan=\"(\d+)\")?", row)) for row in rows}
        assert len(widths) == 1, block[:300]
