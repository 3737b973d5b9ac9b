"""Parts of the genes at equal CPU time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gene_subsets
from benchmarks.gene_subsets import BenchGeneSubsetsConfig, main
from benchmarks.speedrun import Course, Scores
from scldm.errors import InputError
from tests.benchmarks.test_quality import made_cells


def test_steps_are_those_that_the_cpu_time_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a training that takes 2 s to set up and 0.1 s a step, of all genes, or half of it, of a half."""
    asked: list[tuple[str, int]] = []

    def trial(config, task, place, judge) -> Course:
        words = dict(word.split("=", 1) for word in config.words)
        share, steps = float(words["data.given.share"]), int(words["train.steps"])
        asked.append((words["data.given.share"], steps))
        return Course(points=[(steps, 2 + 0.1 * share * steps, Scores(10 + config.seed, 2.0, 0.1))])

    monkeypatch.setattr(gene_subsets, "trial_of", trial)
    made_cells().write_h5ad(tmp_path / "made.h5ad")
    about = {"conditions": ("cell_type", "treatment"), "out": str(tmp_path / "out")}
    config = BenchGeneSubsetsConfig(str(tmp_path / "made.h5ad"), **about, shares=(1.0, 0.5), seconds=12.0)
    rows = {row.name: row.value for row in main(config).rows if row.value is not None}
    assert (rows["1 of the genes: steps"], rows["0.5 of the genes: steps"]) == (100, 200)
    assert asked[-2:] == [("0.5", 200)] * 2
    assert rows["0.5 of the genes, seed 1: CPU-seconds"] == pytest.approx(12)
    assert rows["1 of the genes: nats, mean"] == pytest.approx(10.5)


@pytest.mark.slow
def test_a_part_is_trained_as_the_verb_does(tmp_path: Path) -> None:
    made_cells().write_h5ad(tmp_path / "made.h5ad")
    about = {"conditions": ("cell_type", "treatment"), "out": str(tmp_path / "out"), "seeds": (0,)}
    words = ("train.global_batch=20", "hardware.micro_batch=20", "data.given.gene_set_group=20")
    config = BenchGeneSubsetsConfig(str(tmp_path / "made.h5ad"), **about, shares=(0.5,), seconds=0.5, words=words)
    rows = {row.name: row.value for row in main(config).rows if row.value is not None}
    assert rows["0.5 of the genes: steps"] >= gene_subsets.LEAST_STEPS
    assert rows["0.5 of the genes, seed 0: nats a validation cell"] > 0


def test_no_share_beyond_all_genes() -> None:
    with pytest.raises(InputError, match=r"shares=1.5 must be above 0"):
        BenchGeneSubsetsConfig("x", ("a",), "out", shares=(1.5,))
