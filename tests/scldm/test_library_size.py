"""Library sizes of combinations that no training cell had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scldm.errors import InputError
from scldm.library_size import LibrarySizeModel, LogNormal

NAMES = ("type", "donor", "drug")


def fitted(**by: dict[str, LogNormal]) -> LibrarySizeModel:
    """by: `type_drug={"B/x": ...}`."""
    tables: dict = {(): {(): LogNormal(1_000, 9.0, 1.0)}}
    for key, table in by.items():
        tables[tuple(key.split("_"))] = {tuple(labels.split("/")): one for labels, one in table.items()}
    return LibrarySizeModel(NAMES, tables)


def of(model: LibrarySizeModel, *row: str) -> tuple[float, str]:
    sizes = model.of(pd.DataFrame([row], columns=list(NAMES[: len(row)])))
    return float(sizes.log_mean_n[0]), " ".join(sizes.backed_off)


def test_the_largest_part_that_cells_had_is_taken_and_of_several_the_one_that_says_most() -> None:
    model = fitted(
        type={"B": LogNormal(50, 1.0, 0.3)},
        donor={"d": LogNormal(50, 2.0, 0.1)},
        type_drug={"B/x": LogNormal(30, 3.0, 0.5), "B/y": LogNormal(9, 4.0, 0.01)},
        donor_drug={"d/x": LogNormal(30, 5.0, 0.4), "d/y": LogNormal(12, 6.0, 0.8)},
        type_donor_drug={"B/e/x": LogNormal(1, 7.0, 0.0)},
    )
    assert of(model, "B", "e", "x")[0] == 7.0  # its own, however few
    told = "library sizes of type=B, donor=d, drug=x: no training cell has this combination; taken from the 30 with "
    assert of(model, "B", "d", "x") == (5.0, told + "donor=d, drug=x")  # two pairs: the one that varies less
    assert of(model, "B", "d", "y")[0] == 6.0  # a deviation of 9 cells says little
    assert of(model, "B", "d", "z")[0] == 2.0  # no pair at all
    assert of(model, "B", "f", "z")[0] == 1.0
    with pytest.raises(InputError, match="for type=T, donor=f, drug=z: no training cell has any of these labels"):
        of(model, "T", "f", "z")


def test_how_much_cells_differ_is_not_taken_from_a_handful() -> None:
    """A combination with one training cell has a standard deviation of 0: all its cells would be of one size."""
    model = fitted(
        type={"B": LogNormal(50, 1.0, 0.3)},
        donor={"e": LogNormal(2, 2.0, 0.1)},
        type_drug={"B/x": LogNormal(30, 3.0, 0.5), "B/y": LogNormal(9, 4.0, 0.01)},
        type_donor={"B/e": LogNormal(9, 3.5, 0.2), "T/e": LogNormal(1, 8.0, 0.0)},
        type_donor_drug={
            "B/e/x": LogNormal(1, 7.0, 0.0),
            "T/e/x": LogNormal(1, 8.0, 0.0),
            "B/d/x": LogNormal(10, 5, 0),
        },
    )
    asked = pd.DataFrame([("B", "e", "x"), ("T", "e", "z"), ("B", "d", "y"), ("B", "d", "x")], columns=list(NAMES))
    sizes = model.of(asked)
    assert sizes.log_mean_n.tolist() == [7.0, 8.0, 4.0, 5.0]
    # of the pair that 30 had; of all cells, where no other part has 10; of the type alone; and 10 are enough
    assert sizes.log_std_n.tolist() == [0.5, 1.0, 0.3, 0.0]
    few = "as these are fewer than 10, how much cells differ is taken from the"
    assert sizes.backed_off == (
        f"library sizes of type=B, donor=e, drug=x: taken from 1; {few} 30 with type=B, drug=x",
        "library sizes of type=T, donor=e, drug=z: no training cell has this combination; taken from the 1 with "
        f"type=T, donor=e; {few} 1,000 with any labels",
        "library sizes of type=B, donor=d, drug=y: no training cell has this combination; taken from the 9 with "
        f"type=B, drug=y; {few} 50 with type=B",
    )


def test_rows_keep_their_order_and_a_back_off_is_told_once(tmp_path: Path) -> None:
    model = fitted(type={"B": LogNormal(50, 1.0, 0.3), "T": LogNormal(50, 2.0, 0.2)}, donor={"d": LogNormal(9, 3, 0.1)})
    model.save(tmp_path / "sizes.json")
    assert LibrarySizeModel.load(tmp_path / "sizes.json") == model
    labels = pd.DataFrame({"donor": ["d"] * 4, "type": ["T", "B", "T", "B"]})
    sizes = model.of(labels)
    assert sizes.log_mean_n.tolist() == [2.0, 1.0, 2.0, 1.0]
    assert sizes.log_std_n.tolist() == [0.2, 0.3, 0.2, 0.3]
    assert len(sizes.backed_off) == 2
    everyone = model.of(pd.DataFrame(index=range(3)))
    assert everyone.log_mean_n.tolist() == [9.0] * 3
    assert everyone.backed_off == ()


def test_of_many_conditions_what_is_between_all_and_one_is_pooled() -> None:
    """A set of more than four conditions states library sizes by all together, by each alone and of all cells."""
    rng = np.random.default_rng(0)
    names = ("type", "donor", "drug", "dose", "time")
    cells = pd.DataFrame({name: rng.choice(["a", "b", "c"], 6_000) for name in names})
    cells = cells[~((cells["type"] == "a") & (cells["donor"] == "b"))].reset_index(drop=True)
    log_n = rng.normal(8, 1, len(cells)) + (cells["drug"] == "c")

    def moments(by: tuple[str, ...]) -> dict[tuple[str, ...], LogNormal]:
        groups = log_n.groupby([cells[name] for name in by])
        return {labels: LogNormal(len(one), one.mean(), one.std(ddof=0)) for labels, one in groups}

    tables = {by: moments(by) for by in [names, *((name,) for name in names)]}
    model = LibrarySizeModel(names, {**tables, (): {(): LogNormal(len(cells), log_n.mean(), log_n.std(ddof=0))}})
    # some conditions, in any order: those cells' own, and nothing is backed off
    asked = pd.DataFrame({"time": ["b"], "type": ["c"], "drug": ["c"]})
    sizes, expected = model.of(asked), moments(("type", "drug", "time"))["c", "c", "b"]
    assert (sizes.log_mean_n[0], sizes.log_std_n[0]) == pytest.approx(expected[1:], rel=1e-12)
    assert sizes.backed_off == ()
    # all but one, of those in which cells differ least
    sizes = model.of(pd.DataFrame([("a", "b", "c", "a", "b")], columns=list(names)))
    without = {by: moments(by) for by in (("type", "drug", "dose", "time"), ("donor", "drug", "dose", "time"))}
    (one, other) = without[names[:1] + names[2:]]["a", "c", "a", "b"], without[names[1:]]["b", "c", "a", "b"]
    best = min(one, other, key=lambda found: (found.n_cells < 10, found.log_std))
    assert (sizes.log_mean_n[0], sizes.log_std_n[0]) == pytest.approx(best[1:], rel=1e-12)
    assert f"taken from the {best.n_cells} with " in sizes.backed_off[0]
    # a label that nobody had is left out with the same care
    sizes = model.of(pd.DataFrame([("a", "a", "new", "a", "b")], columns=list(names)))
    assert "with type=a, donor=a, dose=a, time=b" in sizes.backed_off[0]
