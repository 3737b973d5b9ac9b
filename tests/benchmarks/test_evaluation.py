"""The benchmark of the evaluation runs, and its rows have the targets that it is run for."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation import EvaluationConfig, main
from scldm.evaluate import map_of_cells, metrics
from scldm.evaluate.two_sample import classifier_auc

pytestmark = pytest.mark.heavy


def test_the_benchmark_runs_and_saves_its_rows(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(metrics, "classifier_auc", partial(classifier_auc, n_trees=2))
    monkeypatch.setattr(map_of_cells, "umap_coordinates", lambda components, seed: components[:, :2])
    main(EvaluationConfig(1_200, 60, str(tmp_path / "rows.json")))
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["combinations scored one by one"]["value"] == 20
    assert [rows[name]["target"] for name in ("time", "peak memory, with the cells")] == ["<= 600", "<= 8"]
    assert 0 < rows["time"]["value"] < 600
