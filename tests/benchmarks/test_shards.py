"""Conversion of a handful of cells: the atlas is what it claims, the rows and targets are there, in both forms."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse as sp

from benchmarks.report import Report, Row, median
from benchmarks.shards import N_TYPES, BenchShardsConfig, main, synthetic_rows, synthetic_types


@pytest.mark.heavy
def test_the_synthetic_cells_are_as_described():
    """The shares and the number of expressed genes that the targets are stated for; the same cells every time."""
    rows = next(synthetic_rows(400, 20_000, 1_763))
    assert abs(np.diff(rows.indptr).mean() / 1_763 - 1) < 0.05
    assert abs((rows.values == 1).mean() - 0.65) < 0.01
    assert abs((rows.values <= 3).mean() - 0.88) < 0.01
    assert 0 < (rows.values > 255).mean() < 5e-4
    again = next(synthetic_rows(400, 20_000, 1_763))
    assert np.array_equal(rows.values, again.values)
    assert np.array_equal(rows.columns, again.columns)


@pytest.mark.heavy
def test_cell_types_differ_where_a_spread_is_asked_for():
    def profiles(spread):
        rows, types = next(synthetic_rows(600, 2_000, 200, spread=spread)), synthetic_types(600)
        expressed = sp.csr_matrix((np.ones(len(rows.values)), rows.columns, rows.indptr), (600, 2_000)).toarray()
        return np.array([expressed[types == k].mean(0) for k in range(N_TYPES)])

    same, apart = (np.corrcoef(profiles(spread))[np.triu_indices(N_TYPES, 1)] for spread in (0.0, 1.0))
    assert same.min() > 0.85 > 0.75 > apart.max()


def test_rows_know_their_targets(capsys):
    report = Report("x", {"cells": 5}, command="python -m benchmarks.x")
    for row in (Row.at_most("slow", 2.0, "x", 1.5), Row.at_least("fast", 2.0, "x", 1.5), Row("plain", 1.0, "s")):
        report.add(row)
    assert not report.met
    report.print(as_json=False)
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("x: cells 5; ")
    assert [line.split()[-1] for line in table[2:]] == ["MISSED", "met", "s"]
    report.print(as_json=True)
    read = json.loads(capsys.readouterr().out)
    assert set(read) == {"benchmark", "command", "commit", "device", "settings", "rows"}
    assert read["rows"][0] == {"name": "slow", "value": 2.0, "unit": "x", "target": "<= 1.5", "met": False}
    assert (median([3, 1, 2]), median([4, 1, 2, 3])) == (2, 2.5)


@pytest.mark.slow
def test_it_runs(tmp_path, capsys):
    """Every row that the targets speak of, and the JSON file; values mean nothing at this size."""
    small = BenchShardsConfig(cells=300, genes=2_000, expressed=200, repeats=1, save=str(tmp_path / "bench.json"))
    report = main(small)
    names = [row.name for row in report.rows if row.target]
    assert [n.split(":")[0].split(" /")[0] for n in names] == ["h5ad", "h5ad", "h5ad", "SOMA", "soma", "soma"]
    assert all(row.value > 0 for row in report.rows)
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == [vars(row) for row in report.rows]
    assert capsys.readouterr().out.startswith("shards: cells 300")


@pytest.mark.exhaustive
def test_a_million_cells_within_two_gibibytes():
    """1,000,000 x 20,000 from h5ad, two workers: takes minutes and 25 GB of the temporary folder's disk."""
    report = main(BenchShardsConfig(cells=1_000_000, soma=False, repeats=1, workers=2))
    assert report.met, report.table()
