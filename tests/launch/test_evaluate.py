"""Cells come out of files and shard sets as they went in; the verb writes all that it promises, or one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scldm
from data_pipeline.convert.config import ShardsWriteConfig, SourceConfig, SplitConfig
from data_pipeline.convert.write_shards import write_shards
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.write_cells import CellWriter
from launch.cli import main
from launch.evaluation import of_generated as evaluate_generated
from launch.evaluation.cells import cells_of_h5ad, cells_of_shards, conditions_of_shards, generated_cells
from scldm.errors import InputError
from scldm.evaluate import map_of_cells
from scldm.evaluate.cells import NO_TYPE
from scldm.evaluate.sample import Sample
from scldm.model_folder import save_pretrained
from tests.data_pipeline.small_sets import known_cells, write_set
from tests.scldm.small_model import CONDITIONS, library_sizes, networks
from tests.scldm.small_model import GENES as GENES_OF_MODEL

GENES = [f"g{k}" for k in range(30)]
FEW = ["evaluate.n_draws=2", "evaluate.intervals.n_parts=2", "evaluate.intervals.n_parts_expensive=2"]


def cells(seed: int, n: int) -> tuple[sp.csr_matrix, pd.DataFrame]:
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % 3 % 2
    rate = np.ones((n, 30)) * rng.gamma(8, 0.5, size=(n, 1))
    rate[kind == 0, :6] *= 5
    rate[kind == 1, 6:12] *= 5
    counts = sp.csr_matrix(rng.poisson(rate))
    obs = pd.DataFrame({"kind": pd.Categorical(np.array(["T cell", "B cell"])[kind])})
    obs["part"] = np.array(["train", "train", "train", "validation", "test"])[rng.integers(0, 5, n)]
    return counts, obs.set_index(obs.index.astype(str))


def write(path: Path, counts: sp.csr_matrix, obs: pd.DataFrame, genes: Sequence[str] = GENES) -> None:
    ad.AnnData(counts, obs, pd.DataFrame(index=pd.Index(genes))).write_h5ad(path)


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "real.h5ad", *cells(0, 400))
    write(tmp_path / "generated.h5ad", *cells(1, 90))
    return tmp_path


def test_h5ad_cells_are_dealt_by_their_split(files):
    counts, obs = cells(0, 400)
    dealt = cells_of_h5ad(str(files / "real.h5ad"), ["kind"], "part", "")
    for found, part in zip(dealt, ("train", "validation", "test"), strict=True):
        rows = np.flatnonzero(obs["part"] == part)
        assert (found.counts != counts[rows]).nnz == 0
        assert found.types.tolist() == obs["kind"].iloc[rows].tolist()
    assert generated_cells(str(files / "generated.h5ad"), ["kind"]).numbers() == {"T cell": 60, "B cell": 30}
    untyped = cells_of_h5ad(str(files / "real.h5ad"), [], "part", "")
    assert [c.numbers() for c in untyped] == [{NO_TYPE: len(c.types)} for c in dealt]


def test_what_can_not_follow_an_evaluation_is_refused_before_it(files, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluate_generated, "compare", lambda *_: pytest.fail("it was computed"))
    words = [f"generated={files}/generated.h5ad", f"real={files}/real.h5ad", "split=part", f"out={files}/out"]
    for wrong, said in (
        ("tracking.attach=none.pdf", "tracking.attach=none.pdf: no such file"),
        ("tracking.also=nomodule:Class", "tracking.also=nomodule:Class: no module 'nomodule' is found"),
    ):
        assert main(["evaluate", *words, wrong]) == 2
        assert said in capsys.readouterr().err
    assert not (files / "out").exists()


@pytest.mark.heavy
def test_a_missing_value_is_the_label_of_training_for_the_verb_and_in_python(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(map_of_cells, "umap_coordinates", lambda components, seed: components[:, :2])
    monkeypatch.chdir(tmp_path)
    save_pretrained(Path("model"), *networks(), GENES_OF_MODEL, CONDITIONS, library_sizes(), {"missing": "NK"})
    for name, seed, n in (("real", 0, 400), ("generated", 1, 90)):
        counts, obs = cells(seed, n)
        obs["type"] = obs["kind"].cat.rename_categories({"B cell": "NK"}).astype(object)
        obs.loc[(obs["type"] == "NK") & (np.arange(n) % 2 == 0), "type"] = np.nan  # labels and gaps are one group
        write(tmp_path / f"{name}.h5ad", counts, obs, GENES_OF_MODEL.ids)
    words = ["generated=generated.h5ad", "real=real.h5ad", "split=part", "conditions=type", "out=out"]
    assert main(["evaluate", *words, "tracking.enabled=false", *FEW]) == 2
    assert "obs column condition='type' has no value in 15 cells. Leave them out or label" in capsys.readouterr().err
    assert main(["evaluate", *words, "model=model", "tracking.enabled=false", *FEW]) == 0
    of_verb = json.loads((tmp_path / "out" / "evaluation.json").read_text())["cells"]
    generated, real = (ad.read_h5ad(f"{name}.h5ad") for name in ("generated", "real"))
    in_python = scldm.load("model").evaluate(generated, real, conditions=["type"], split="part").numbers["cells"]
    assert of_verb == in_python
    assert {name: of["generated"] for name, of in of_verb["by_combination"].items()} == {"T cell": 60, "NK": 30}


@pytest.mark.heavy
def test_shard_cells_are_those_that_were_written(files):
    source = SourceConfig(paths=(str(files / "real.h5ad"),))
    split = SplitConfig(validation=0.2, test=0.2, stratify=("kind",))
    out = str(files / "shards")
    write_shards(ShardsWriteConfig(source=source, out=out, conditions=("kind",), split=split, block_cells=64))
    parts = cells_of_shards(out, ["kind"])
    counts, obs = cells(0, 400)

    def rows(counts, types) -> list[tuple]:
        return sorted((t, *row) for t, row in zip(types, counts.toarray().tolist()))

    together = sp.vstack([p.counts for p in parts]), np.concatenate([p.types for p in parts])
    assert rows(*together) == rows(counts, obs["kind"])
    assert sum(len(p.types) for p in parts[1:]) == pytest.approx(160, abs=30)
    assert parts[0].genes == tuple(GENES)
    assert [c.numbers() for c in cells_of_shards(out, [])] == [{NO_TYPE: len(p.types)} for p in parts]
    with pytest.raises(InputError, match=r"shards has no condition='tissue'. It has kind"):
        cells_of_shards(out, ["tissue"])


def treated(seed: int, n: int) -> tuple[sp.csr_matrix, pd.DataFrame]:
    """Two conditions; gene 20 rises under treatment."""
    counts, obs = cells(seed, n)
    rng = np.random.default_rng(seed + 100)
    obs["drug"] = pd.Categorical(np.array(["dmso", "x"])[rng.integers(0, 2, n)])
    dense = counts.toarray()
    dense[:, 20] += rng.poisson(np.where(obs["drug"] == "x", 8, 0))
    return sp.csr_matrix(dense), obs


def test_cells_of_two_conditions_are_told_apart_by_both(tmp_path: Path) -> None:
    counts, obs = treated(0, 400)
    write(tmp_path / "real.h5ad", counts, obs)
    source, split = SourceConfig(paths=(str(tmp_path / "real.h5ad"),)), SplitConfig(validation=0.2, test=0.2)
    out = str(tmp_path / "shards")
    write_shards(ShardsWriteConfig(source=source, out=out, conditions=("kind", "drug"), split=split, block_cells=64))
    assert conditions_of_shards(out) == ("kind", "drug")
    parts = cells_of_shards(out, ["drug", "kind"])

    def rows(labels, counts) -> list[tuple]:
        return sorted((*of, *row) for of, row in zip(zip(*labels), counts.toarray().tolist(), strict=True))

    found = rows(
        [np.concatenate([p.labels[c] for p in parts]) for c in ("drug", "kind")], sp.vstack([p.counts for p in parts])
    )
    assert found == rows([obs["drug"], obs["kind"]], counts)
    assert {t for p in parts for t in p.types} == {f"{d} · {k}" for d in ("dmso", "x") for k in ("T cell", "B cell")}
    # a draw keeps the combinations in their shares
    few = cells_of_shards(out, ["drug", "kind"], Sample(80, dict.fromkeys(parts[2].numbers(), 99), 0))[0]
    assert few.drawn_of == len(parts[0])
    assert set(few.numbers()) == set(parts[0].numbers())
    with pytest.raises(InputError, match=r"has no condition='tissue'. It has kind, drug"):
        cells_of_shards(out, ["kind", "tissue"])


@pytest.mark.heavy
def test_all_conditions_that_both_sides_say_are_told_apart_and_labels_are_text(tmp_path, monkeypatch) -> None:
    """Figures and page too: a label is no formula, no markup and no format string."""
    monkeypatch.setattr(map_of_cells, "umap_coordinates", lambda components, seed: components[:, :2])
    monkeypatch.chdir(tmp_path)
    odd = {"T cell": r"T $\foo$ cell", "B cell": "<b>%s_{x}^2"}
    for name, seed in (("real", 0), ("generated", 1)):
        counts, obs = treated(seed, 700)
        obs["kind"] = obs["kind"].cat.rename_categories(odd)
        write(tmp_path / f"{name}.h5ad", counts, obs)
    words = ["source.paths=real.h5ad", "out=shards", "conditions=kind,drug", "split.validation=0.2", "split.test=0.2"]
    assert main(["shards", "write", *words]) == 0
    words = ["generated=generated.h5ad", "shards=shards", "out=out", "tracking.enabled=false", *FEW]
    assert main(["evaluate", *words]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["conditions"] == ["kind", "drug"]
    every = {f"{k} · {d}" for k in odd.values() for d in ("dmso", "x")}
    assert {*found["scored_combinations"], *found["not_scored"]} == every
    assert found["response"]["drug"]["control"] == "dmso"
    page = (tmp_path / "out" / "report.html").read_text()
    assert r"T $\foo$ cell" in page
    assert "<b>%s" not in page


@pytest.mark.heavy
def test_results_are_there_whatever_becomes_of_the_drawing(files, monkeypatch) -> None:
    monkeypatch.setattr(map_of_cells, "umap_coordinates", lambda components, seed: components[:, :2])
    monkeypatch.chdir(files)

    def fails(*_: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(evaluate_generated, "write_report", fails)
    words = "generated=generated.h5ad real=real.h5ad split=part conditions=kind out=out"
    with pytest.raises(RuntimeError, match="no ink"):
        main(["evaluate", *words.split(), *FEW])
    assert json.loads((files / "out" / "evaluation.json").read_text())["pooled"]["w2"]["score"] > 0


@pytest.mark.heavy
def test_cells_drawn_of_shards_are_of_the_set_and_no_other_block_is_read(tmp_path, monkeypatch):
    known = replace(known_cells(n_genes=40), split_sizes={"train": 400, "validation": 50, "test": 40})
    known.counts[:, 9] = np.arange(490) + 1  # no two cells are alike
    folder = str(write_set(tmp_path / "set", known, block_cells=8))
    every = cells_of_shards(folder, ["type"])
    fetched, fetch = [], ShardSet.fetch
    monkeypatch.setattr(ShardSet, "fetch", lambda self, b, into=None: (fetched.append(b), fetch(self, b, into))[1])
    generated = {"a": 40, "b": 40, "c": 40}
    for same in (Sample(400, generated, 0), None):
        for part, whole in zip(cells_of_shards(folder, ["type"], same), every):
            assert (part.counts != whole.counts).nnz == 0
            assert part.types.tolist() == whole.types.tolist()
            assert part.drawn_of == 0
    fetched.clear()
    train, validation, test = cells_of_shards(folder, ["type"], Sample(60, generated, 0))
    assert (train.drawn_of, validation.drawn_of, test.drawn_of) == (400, 0, 0)
    assert 57 < len(train.types) <= 60
    assert sum(block < 50 for block in fetched) < 30
    assert (test.counts != every[2].counts).nnz == 0
    shares = [train.numbers()[t] / len(train.types) - test.numbers()[t] / len(test.types) for t in "abc"]
    assert max(map(abs, shares)) < 0.05
    rows = {(t, *row) for t, row in zip(every[0].types, every[0].counts.toarray().tolist())}
    drawn = [(t, *row) for t, row in zip(train.types, train.counts.toarray().tolist())]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= rows
    again, other = (cells_of_shards(folder, ["type"], Sample(60, generated, seed))[0] for seed in (0, 1))
    assert (again.counts != train.counts).nnz == 0
    assert (other.counts != train.counts).nnz > 100


@pytest.mark.heavy
def test_cells_drawn_of_a_file_are_named_in_the_evaluation(files, monkeypatch, capsys):
    monkeypatch.setattr(map_of_cells, "umap_coordinates", lambda components, seed: components[:, :2])
    monkeypatch.chdir(files)
    write(files / "real.h5ad", *cells(0, 2_400))
    words = "generated=generated.h5ad real=real.h5ad split=part conditions=kind out=out tracking.enabled=false"
    assert main(["evaluate", *words.split(), *FEW, "evaluate.max_real_cells=1000"]) == 0
    found = json.loads((files / "out" / "evaluation.json").read_text())["cells"]
    n_train = int((cells(0, 2_400)[1]["part"] == "train").sum())
    assert (found["train"], found["drawn_of"]) == (1_000, {"train": n_train})
    assert found["by_combination"]["T cell"]["train"] == pytest.approx(667, abs=1)  # as many as of 60 and 30 compared
    told = f"1,000 of {n_train:,} train cells: drawn at random (evaluate.max_real_cells=1,000)"
    assert told in " ".join(capsys.readouterr().out.split())
    assert told in (files / "out" / "report.html").read_text()


@pytest.mark.parametrize("suffix", ["h5ad", "zarr", "soma"])
def test_generated_cells_are_read_in_every_format_that_generate_writes(tmp_path, suffix):
    counts, obs = cells(1, 90)
    out = tmp_path / f"generated.{suffix}"
    writer = CellWriter(out, 90, GENES, np.int32, {"model": "m"})
    with writer.begun():
        for part in writer.missing:
            writer.write_part(part, counts, {})
        writer.join(lambda: obs, {})
    found = generated_cells(str(out), ["kind"])
    assert (found.counts != counts).nnz == 0
    assert found.types.tolist() == obs["kind"].tolist()
    assert found.genes == tuple(GENES)
    with pytest.raises(InputError, match="obs has no column condition='tissue'. It has kind, part"):
        generated_cells(str(out), ["tissue"])


@pytest.mark.parametrize(
    "suffix, none, empty",
    [("zarr", "no such file", "a folder, and no zarr store"), ("soma", "no such folder", "can't be read")],
)
def test_a_folder_that_holds_no_generated_cells_is_refused(tmp_path, suffix, none, empty):
    for said in (none, empty):
        with pytest.raises(InputError, match=rf"generated.{suffix}: {said}"):
            generated_cells(f"{tmp_path}/generated.{suffix}", [])
        (tmp_path / f"generated.{suffix}").mkdir(exist_ok=True)


@pytest.mark.parametrize("largest", [300, 70_000, 2_000_000_000, 3_000_000_000])
def test_no_count_of_a_shard_set_is_too_large(tmp_path, largest):
    known = replace(known_cells(n_genes=40), split_sizes={"train": 400, "validation": 50, "test": 40})
    known.counts[known.counts >= 300] = 299
    known.counts[[0, 420, 480], 9] = largest
    for part, split in zip(cells_of_shards(str(write_set(tmp_path / "set", known)), ["type"]), known.split_sizes):
        np.testing.assert_array_equal(part.counts.toarray(), known.counts[known.rows_of(split)])


@pytest.mark.parametrize(
    "words, message",
    [
        ("real=R conditions=tissue split=part", "obs has no column condition='tissue'. It has kind, part"),
        ("real=R conditions=kind", "obs has no column split='split'. It has kind, part"),
        ("real=R conditions=kind split=kind", "split='kind' marks no train cells. It must say train, validation, test"),
        ("conditions=kind", "give real cells once: as shards=FOLDER, or real=FILE.h5ad"),
        ("real=R shards=S conditions=kind", "give real cells once"),
        ("shards=S conditions=kind", "S: no manifest.json"),
        ("real=R conditions=kind split=part layer=scaled", "R: layer='scaled' is not in the file. It has X"),
        ("real=R conditions=kind split=part vae=nowhere", "vae=nowhere: no metrics.jsonl"),
        ("real=R conditions=kind split=part evaluate.n_draws=1", "evaluate.n_draws=1 must be at least 2"),
        ("real=R conditions=kind split=part generated=N", "no counts in X"),
        ("real=R conditions=kind split=part control.kind=x", "control.kind=x: no test cell has this label. There are"),
        ("real=R conditions=kind split=part control.drug=x", "control.drug=x: the conditions are kind"),
        ("real=R conditions=kind split=part protocol=ours", "protocol"),
        ("real=R conditions=kind split=part model=nowhere", "nowhere is not a model folder"),
        ("generated= real=R", "give what is to be judged: generated=FILE"),
        ("generated= vae=nowhere", "an autoencoder is judged on the test cells of a shard set"),
        ("embedding=x", "generated and embedding are judged apart"),
        ("generated= embedding=x", "embedding needs label=COLUMN"),
        ("out= real=R", "generated needs out=FOLDER"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(files, monkeypatch, capsys, words, message):
    monkeypatch.chdir(files)
    counts, obs = cells(1, 90)
    counts.data = np.log1p(counts.data)
    write(files / "N", counts, obs)
    (files / "real.h5ad").rename("R")
    given = ["generated=generated.h5ad", "out=out", *words.split()]
    assert main(["evaluate", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (files / "out").exists()


@pytest.mark.heavy
def test_cells_of_an_unconditional_model_are_judged_pooled(files, monkeypatch, capsys):
    # its compiler takes seconds
    monkeypatch.setattr(map_of_cells, "umap_coordinates", lambda components, seed: components[:, :2])
    monkeypatch.chdir(files)
    counts, obs = cells(1, 90)
    write(files / "generated.h5ad", counts, obs.drop(columns=["kind", "part"]))
    words = "generated=generated.h5ad real=real.h5ad split=part out=out tracking.enabled=false"
    assert main(["evaluate", *words.split(), *FEW]) == 0
    evaluation = json.loads((files / "out" / "evaluation.json").read_text())
    assert "condition" not in evaluation["made_with"]
    tracked = json.loads((files / "out" / "evaluation" / "metrics.jsonl").read_text())
    assert tracked["pooled/w2"] == pytest.approx(evaluation["pooled"]["w2"]["score"])
    printed = capsys.readouterr().out
    assert "scores per combination" not in printed
    assert "scores pooled" in printed
    assert "(c)" not in printed
    assert evaluation["pooled_only"] in printed


@pytest.mark.slow
def test_the_verb_writes_report_evaluation_and_figures(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    (files / "vae").mkdir()
    row = {"step": 1, "cells_seen": 64, "time": 0.0, "split": "validation", "nll": 3.0}
    (files / "vae" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    words = "generated=generated.h5ad real=real.h5ad split=part conditions=kind out=out vae=vae tracking.enabled=false"
    assert main(["evaluate", *words.split(), "evaluate.n_draws=3", "evaluate.min_cells=10"]) == 0
    written = {str(p.relative_to(files / "out")) for p in (files / "out").rglob("*") if p.is_file()}
    figures = ("scores", "heat_map", "umap", "marker_dots", "marker_changes", "genes", "library_sizes", "loss_curves")
    assert written == {
        "report.html",
        "evaluation.json",
        "evaluation/metrics.jsonl",
        *(f"figures/{f}.png" for f in figures),
    }
    evaluation = json.loads((files / "out" / "evaluation.json").read_text())
    assert evaluation["made_with"]["generated"] == "generated.h5ad"
    assert evaluation["per_combination"]["w2"]["beats"]["c"] is True
    tracked = json.loads((files / "out" / "evaluation" / "metrics.jsonl").read_text())
    assert "cells_seen" not in tracked
    assert tracked["per_combination/w2"] == pytest.approx(evaluation["per_combination"]["w2"]["score"])
    assert "10 of 10  marker genes up" in capsys.readouterr().out
