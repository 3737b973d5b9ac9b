"""The speedrun: what a trial is, and what it says of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speedrun import Course, SpeedrunConfig, main
from scldm.errors import InputError
from scldm.train import loop
from tests.benchmarks.test_quality import made_cells


def test_the_first_validation_at_or_below_the_mark_counts() -> None:
    course = Course(points=[(50, 1.0, 12.0), (100, 2.0, 10.0), (150, 3.0, 11.0), (200, 4.0, 9.0)])
    assert course.first_below(10.0) == (100, 2.0)
    assert course.first_below(8.9) is None


def test_a_trial_trains_as_the_verb_does_and_is_logged(tmp_path: Path) -> None:
    cells, validate = tmp_path / "made.h5ad", loop.validate
    made_cells().write_h5ad(cells)
    words = ("train.steps=5", "train.global_batch=20", "data.given.n_genes=10", "data.given.gene_set_group=20")
    words = (*words, "hardware.micro_batch=20")
    about = {"conditions": ("cell_type", "treatment"), "out": str(tmp_path / "out"), "words": words, "every": 2}
    rows = {row.name: row for row in main(SpeedrunConfig(str(cells), **about, mark=1e6, name="one")).rows}
    assert loop.validate is validate
    assert rows["steps to the mark"].value == 2
    assert rows["cells to the mark"].value == 40
    assert rows["best nats a validation cell"].met
    (line,) = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    assert [step for step, _, _ in line["course"]] == [2, 4, 5]
    assert sorted(seconds for _, seconds, _ in line["course"]) == [seconds for _, seconds, _ in line["course"]]
    assert not (tmp_path / "out" / "trial").exists()
    rows = {row.name: row for row in main(SpeedrunConfig(str(cells), **about, mark=1e-3, name="two")).rows}
    assert rows["CPU-seconds to the mark: it was not reached"].value is None
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
    with pytest.raises(InputError, match="every=0"):
        SpeedrunConfig(str(cells), ("cell_type",), "out", every=0)
