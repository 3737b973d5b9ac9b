"""The speedrun: what a trial is, and what it says of one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from benchmarks.quality.cells import read_task
from benchmarks.quality.config import QualityConfig
from benchmarks.report import Report
from benchmarks.speedrun import Course, GivenBack, Scores, SpeedrunConfig, add_rows, main
from scldm.errors import InputError
from scldm.train import loop
from tests.benchmarks.test_quality import made_cells


def test_the_first_validation_at_or_below_the_mark_counts() -> None:
    scores = [Scores(12.0, 3.0, 0.1), Scores(10.0, 2.5, 0.2), Scores(11.0, 2.0, 0.2), Scores(9.0, 2.2, 0.2)]
    course = Course(points=[(50 * k, float(k), of) for k, of in enumerate(scores, 1)])
    assert course.first_below("nll", 10.0) == (100, 2.0)
    assert course.first_below("w2", 2.2) == (150, 3.0)
    assert course.first_below("nll", 8.9) is None


def test_cells_given_back_are_nearer_than_draws_that_know_less(tmp_path: Path) -> None:
    made_cells().write_h5ad(tmp_path / "made.h5ad")
    config = QualityConfig(str(tmp_path / "made.h5ad"), ("cell_type", "treatment"), str(tmp_path))
    task, rng = read_task(config), np.random.default_rng(0)
    judge, counts = GivenBack(task, 0), task.test.counts
    noisy, others = sp.csr_matrix(rng.poisson(counts.toarray())), counts[rng.permutation(counts.shape[0])]
    same = judge.scores(1.0, counts)
    assert same.w2 == pytest.approx(0, abs=1e-6)
    assert same.r == pytest.approx(1)
    assert judge.scores(1.0, sp.csr_matrix(others)).r < judge.scores(1.0, noisy).r
    assert 0.1 < judge.scores(1.0, noisy).w2 < judge.scores(1.0, sp.csr_matrix(np.ones(counts.shape))).w2


def test_both_marks_of_scvi_stand_beside_the_trial() -> None:
    report = Report("benchmarks.speedrun", {})
    course = Course(points=[(50, 1.0, Scores(12.0, 3.0, 0.1)), (100, 2.0, Scores(9.0, 2.0, 0.3))])
    add_rows(report, course, SpeedrunConfig("x", ("a",), "out"), (Scores(10.0, 3.1, 0.2), 1.5), 60)
    rows = {row.name: row for row in report.rows}
    assert rows["scVI: W2 of reconstructed cells"].value == 3.1
    assert (rows["CPU-seconds to the mark's W2"].value, rows["CPU-seconds to the mark's W2"].met) == (1.0, True)
    assert (rows["CPU-seconds to the mark's nats"].value, rows["CPU-seconds to the mark's nats"].met) == (2.0, False)
    assert rows["cells to the mark's nats"].value == 6_000
    assert rows["W2 of reconstructed cells then"].met


@pytest.mark.heavy
def test_a_trial_trains_as_the_verb_does_and_is_logged(tmp_path: Path) -> None:
    cells, validate = tmp_path / "made.h5ad", loop.validate
    made_cells().write_h5ad(cells)
    words = ("train.steps=5", "train.global_batch=20", "data.given.n_genes=10", "data.given.gene_set_group=20")
    words = (*words, "hardware.micro_batch=20")
    about = {"conditions": ("cell_type", "treatment"), "out": str(tmp_path / "out"), "words": words, "every": 2}
    rows = {row.name: row for row in main(SpeedrunConfig(str(cells), **about, mark=1e6, name="one")).rows}
    assert loop.validate is validate
    assert rows["steps to the mark's nats"].value == 2
    assert rows["cells to the mark's nats"].value == 40
    assert rows["W2 of reconstructed cells then"].value > 0
    assert rows["best nats a validation cell"].met
    (line,) = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    assert [step for step, *_ in line["course"]] == [2, 4, 5]
    assert sorted(seconds for _, seconds, *_ in line["course"]) == [seconds for _, seconds, *_ in line["course"]]
    assert not (tmp_path / "out" / "trial").exists()
    rows = {row.name: row for row in main(SpeedrunConfig(str(cells), **about, mark=1e-3, name="two")).rows}
    assert rows["CPU-seconds to the mark's nats: it was not reached"].value is None
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
    with pytest.raises(InputError, match="every=0"):
        SpeedrunConfig(str(cells), ("cell_type",), "out", every=0)
