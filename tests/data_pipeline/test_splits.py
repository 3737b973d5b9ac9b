"""Which split a cell belongs to, and which tables and settings can draw none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from data_pipeline.convert.config import SplitConfig
from data_pipeline.convert.splits import columns_of, draw_splits, keys
from scldm.errors import InputError
from scldm.label_text import texts


def identities(n: int):
    return np.zeros(n, np.uint16), np.arange(n, dtype=np.int64)


def test_a_cell_keeps_its_split_whatever_stands_around_it():
    """Drawn from identities: the order of cells changes nothing; another seed changes about what chance does."""
    obs = pd.DataFrame({"t": np.random.default_rng(0).choice(["a", "b"], 2000)})
    source, row = identities(2000)
    split, names, _ = draw_splits(SplitConfig(stratify=("t",)), 3, obs, source, row)
    assert names == ("train", "validation", "test")
    order = np.random.default_rng(1).permutation(2000)
    again, _, _ = draw_splits(
        SplitConfig(stratify=("t",)), 3, obs.iloc[order].reset_index(drop=True), source, row[order]
    )
    np.testing.assert_array_equal(again, split[order])
    other, _, _ = draw_splits(SplitConfig(stratify=("t",)), 4, obs, source, row)
    assert 0.25 < (other != split).mean() < 0.45  # 1 - .8^2 - .1^2 - .1^2 = .34
    both = np.unique(keys(0, "x", np.repeat([0, 1], 500), np.tile(np.arange(500), 2)))
    assert len(both) == 1000


@pytest.mark.parametrize("size, validation, test", [(4, 0.1, 0.1), (3, 0.2, 0.1), (1, 0.1, 0.3), (7, 0.0, 0.1)])
def test_small_strata_have_the_shares_together(size, validation, test):
    """What rounding leaves of one stratum is carried to the next; the order of cells still changes nothing."""
    n = 75 * size
    obs = pd.DataFrame({"t": np.repeat(np.arange(75).astype(str), size)})
    source, row = identities(n)
    config = SplitConfig(stratify=("t",), validation=validation, test=test)
    split, _, _ = draw_splits(config, 0, obs, source, row)
    for number, share in ((1, validation), (2, test)):
        assert abs((split == number).sum() - n * share) <= 1
        of_stratum = np.bincount(np.arange(n)[split == number] // size, minlength=75)
        assert abs(of_stratum - size * share).max() < 1.5
    order = np.random.default_rng(1).permutation(n)
    again, _, _ = draw_splits(config, 0, obs.iloc[order].reset_index(drop=True), source, row[order])
    np.testing.assert_array_equal(again, split[order])


def test_a_number_is_asked_for_as_its_own_file_writes_it(tmp_path):
    """pandas writes 10.0 from the column of floats whose label is 10."""
    doses = pd.Series(np.repeat([0.5, 10.0, 20.0], 100), name="dose")
    obs, (source, row) = pd.DataFrame({"dose": texts(doses)}), identities(300)
    config = SplitConfig(by="dose", validation_values=("10.0",), test_values=("0.50",))
    split, _, _ = draw_splits(config, 0, obs, source, row)
    assert split.tolist() == [2] * 100 + [1] * 100 + [0] * 100
    twice = SplitConfig(by="dose", validation_values=("10",), test_values=("10.0",))
    with pytest.raises(InputError, match="'10' stands in both"):
        draw_splits(twice, 0, obs, source, row)
    doses[100:200].drop_duplicates().to_csv(tmp_path / "held_out.csv", index=False)
    assert "10.0" in (tmp_path / "held_out.csv").read_text()
    split, _, _ = draw_splits(SplitConfig(held_out=f"{tmp_path}/held_out.csv"), 0, obs, source, row)
    assert (split[100:200] == 2).all()


def test_values_and_combinations(tmp_path):
    n = 1200
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"donor": rng.choice([f"d{k}" for k in range(10)], n), "type": rng.choice(["a", "b", "c"], n)})
    source, row = identities(n)
    split, _, _ = draw_splits(SplitConfig(by="donor", validation=0.2, test=0.2), 0, obs, source, row)
    assert [len(set(split[obs["donor"] == d])) for d in set(obs["donor"])] == [1] * 10
    assert [len(set(obs["donor"][split == k])) for k in range(3)] == [6, 2, 2]

    named = SplitConfig(by="donor", validation=0.2, test_values=("d3", "d7"))
    split, _, _ = draw_splits(named, 0, obs, source, row)
    assert set(obs["donor"][split == 2]) == {"d3", "d7"}
    assert [len(set(obs["donor"][split == k])) for k in range(3)] == [6, 2, 2]  # two of the eight others
    every = SplitConfig(by="donor", validation_values=("d1",), test_values=("d3",))
    split, _, _ = draw_splits(every, 0, obs, source, row)
    assert [len(set(obs["donor"][split == k])) for k in range(3)] == [8, 1, 1]

    table = tmp_path / "held_out.csv"
    table.write_text("type,donor,split\na,d1,test\nb,d2,unseen\n")
    split, names, rule = draw_splits(SplitConfig(held_out=str(table), validation=0.1), 0, obs, source, row)
    assert names == ("train", "validation", "test", "unseen")
    assert ((split == 2) == ((obs["type"] == "a") & (obs["donor"] == "d1"))).all()
    assert ((split == 3) == ((obs["type"] == "b") & (obs["donor"] == "d2"))).all()
    assert rule["held_out"]["donor"] == ["d1", "d2"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"t.csv: needs a header of obs columns and a row"),
        (b"type,donor\na,d1\nb,d2,test\n", r"t.csv: row 3 has 3 fields, the header 2"),
        (b"type,donor\na\n", r"t.csv: row 2 has 1 fields, the header 2"),
        (b"type,donor\n\xe9,d1\n", r"t.csv: can't be read as CSV in UTF-8"),
        (b"type,type\na,b\n", r"t.csv: column 'type' stands twice"),
        (b"type,split\na," + b"s" * 101, r"t.csv: 's{101}' is no name for a held-out split \(up to 100"),
        ("\n".join(["type,split", *(f"k{k},s{k}" for k in range(253))]).encode(), r"253 splits. There can be 252"),
    ],
)
def test_held_out_tables_that_can_not_be_read(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        columns_of(SplitConfig(held_out=str(tmp_path / "t.csv")))


@pytest.mark.parametrize(
    "settings, table, message",
    [
        ({"held_out": "t.csv"}, "type,donor\na,d77\n", r"line 2: no cell has type='a', donor='d77'"),
        ({"held_out": "t.csv"}, "type,donor\na,d1\na,d1\n", r"\('a', 'd1'\) stands twice"),
        ({"held_out": "t.csv"}, "type,split\na,my split\n", r"'my split' is no name for a held-out split"),
        ({"by": "donor", "test_values": ("d77",)}, "", r"split.by=donor: no cell has 'd77'. There are 10 values"),
        ({"by": "type", "validation": 0.4, "test": 0.4}, "", None),
        ({"by": "one"}, "", r"its 1 values are too few"),
    ],
)
def test_splits_that_can_not_be_drawn(tmp_path, monkeypatch, settings, table, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text(table)
    rng = np.random.default_rng(0)
    donors = rng.choice([f"d{k}" for k in range(10)], 500)
    obs = pd.DataFrame({"donor": donors, "type": rng.choice(["a", "b", "c"], 500), "one": "x"})
    if message is None:
        draw_splits(SplitConfig(**settings), 0, obs, *identities(500))
        return
    with pytest.raises(InputError, match=message):
        draw_splits(SplitConfig(**settings), 0, obs, *identities(500))
    refused: list[dict[str, Any]] = [
        {"validation": 0.5, "test": 0.5},
        {"test_values": ("a",)},
        {"by": "a", "stratify": ("b",)},
    ]
    for wrong in refused:
        with pytest.raises(InputError):
            SplitConfig(**wrong)
