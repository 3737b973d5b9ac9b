"""A trained autoencoder is judged beside mean profiles, on validation cells alone; other verbs say what was found."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.format.schema import read_manifest
from launch.cli import main
from launch.config import compose
from launch.evaluation import gate
from launch.evaluation.cells import cells_of_shards, some_cells
from launch.evaluation.gate import gate_of, line_of, read_gate, to_change
from launch.train_vae import TrainVAEConfig
from scldm.errors import InputError
from scldm.files import write_json
from scldm.parallel.engine import HardwareConfig
from scldm.train.loop import TrainConfig
from scldm.train.tracking import read_metrics
from scldm.vocab import ConditionVocab, GeneVocab
from tests.data_pipeline.small_sets import Known, known_cells, write_set
from tests.launch import faulty
from tests.launch.faulty import EVERY, GLOBAL_BATCH, Ranks, SmallConfig
from tests.scldm.train.small_runs import N_GENES, make_cells

pytestmark = pytest.mark.heavy

N_TRAIN, N_VALIDATION, N_TEST = 400, 90, 60
WORDS = [
    *("hardware.engine=plain", "hardware.micro_batch=50", "train.global_batch=50", "train.log_every=10"),
    *("model.width=16", "model.n_heads=2", "model.n_latents=2", "model.latent_width=4", "model.n_layers=1"),
    *("optim.lr=1e-2", "train.ema_decay=0.9", "train.validate_every=50"),
]


def cells(test: bool = False) -> Known:
    """Cells of three types that slide along a direction of their type: means of a type do not say where."""
    made = make_cells(N_TRAIN + N_VALIDATION + (N_TEST if test else 0), 0)
    n = len(made)
    sizes = {"train": N_TRAIN, "validation": N_VALIDATION} | ({"test": N_TEST} if test else {})
    return replace(
        known_cells(n, 0, n_genes=300),
        counts=made.counts_nG.astype(np.int64),
        split_sizes=sizes,
        labels={"type": made.label_n.astype(np.uint8)},
        genes=GeneVocab(tuple(f"g{k}" for k in range(N_GENES)), "symbol"),
        conditions=ConditionVocab({"type": ("a", "b", "c")}),
    )


def train(at: Path, run: str, *words: str) -> dict[str, Any]:
    """What gate.json says after a run on the set in a folder."""
    given = ["train", "vae", *WORDS, "tracking.enabled=false", f"data.shards={at}/set", f"run_dir={at}/{run}"]
    assert main([*given, *words]) == 0
    return json.loads((at / run / "gate.json").read_text())


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set without test cells, a run of one step (`poor`) and a trained one (`good`), which MLflow follows."""
    folder = tmp_path_factory.mktemp("gate")
    write_set(folder / "set", cells(), block_cells=32)
    train(folder, "poor", "train.steps=1")
    train(folder, "good", "train.steps=150", "tracking.enabled=true")
    return folder


def test_a_trained_autoencoder_is_better_than_means_on_the_validation_cells(at: Path) -> None:
    found = json.loads((at / "good" / "gate.json").read_text())
    best = min(read_metrics(at / "good", "validation"), key=lambda row: row["nll"])
    assert found["step"] == best["step"]
    assert found["nll"]["model"]["mean"] == pytest.approx(best["nll"], rel=1e-5)  # the same cells and weights
    assert found["cells"] == {
        "train": N_TRAIN, "validation": N_VALIDATION, "drawn_of": {"train": 0, "validation": 0}
    }  # fmt: skip
    less = found["less"]["mean_of_combination"]
    assert less["mean"] < -1.96 * less["se"] < 0
    assert found["passed"] is True
    assert found["nll"]["mean_of_combination"]["mean"] < found["nll"]["mean_profile"]["mean"]
    assert found["line"].startswith(
        f"{best['nll']:.1f} nats a held-out cell, {-less['mean']:.1f} ± {1.96 * less['se']:.1f} better than mean "
        f"profiles per combination; recall {found['label_recall']['type']:.2f}".replace("recall 0", "recall ")
    )


def test_one_that_is_no_better_says_so_and_what_to_change(at: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(at / "set", tmp_path / "set")
    found = train(tmp_path, "run", "train.steps=1")
    said = capsys.readouterr()
    assert found["passed"] is False
    assert found["line"].startswith("no better than mean profiles per combination: ")
    assert "raise train.steps=1: each training cell was seen 0.1 times" in found["line"]
    assert said.out.splitlines()[-1] == f"autoencoder: {found['line']}"
    assert "90 validation cells, mean profiles of 400 train cells" in said.out


def test_status_says_it_and_knows_one_of_an_earlier_checkpoint(at: Path, tmp_path: Path, capsys) -> None:
    for run in ("poor", "good"):
        assert main(["status", f"{at}/{run}"]) == 0
        line = json.loads((at / run / "gate.json").read_text())["line"]
        assert f"autoencoder {line}\n" in capsys.readouterr().out
    shutil.copytree(at / "good", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "best").write_text("step-00000999")
    assert line_of(tmp_path / "run").endswith("the best checkpoint is of step 999 now)")
    (tmp_path / "run" / "gate.json").unlink()
    assert line_of(tmp_path / "run") == ""


@pytest.mark.parametrize("run, warned", [("poor", True), ("good", False)])
def test_encode_and_stage_2_warn(at: Path, tmp_path: Path, capsys, run: str, warned: bool) -> None:
    ldm = ["train", "ldm", "model.width=16", "model.n_heads=2", "model.n_layers=1", "train.steps=1"]
    ldm += [word for word in WORDS if word.startswith(("hardware", "train.global"))] + ["tracking.enabled=false"]
    for given, words in {
        f"vae={at}/{run}": ["encode", f"vae={at}/{run}", f"shards={at}/set", f"out={tmp_path}/latents"],
        f"data.shards={tmp_path}/latents": [*ldm, f"data.shards={tmp_path}/latents", f"run_dir={tmp_path}/ldm"],
        f"vae={at}/{run} ": [*ldm, f"vae={at}/{run}", f"data.shards={at}/set", f"run_dir={tmp_path}/live"],
    }.items():
        capsys.readouterr()
        assert main(words) == 0
        warning = f"WARNING: {given.strip()}: the autoencoder is no better than mean profiles"
        assert (warning in capsys.readouterr().err) is warned, words


def test_of_other_weights_nothing_is_said(at: Path) -> None:
    found = read_gate(at / "good")
    assert found is not None
    assert gate_of(at / "good", found["hash"]) == found
    assert gate_of(at / "good", "another") is None


def test_mlflow_has_the_numbers(at: Path) -> None:
    from mlflow import MlflowClient

    found = json.loads((at / "good" / "gate.json").read_text())
    run_id = json.loads((at / "good" / "mlflow_run.json").read_text())["run_id"]
    of = MlflowClient(f"sqlite:///{at}/good/mlflow.db").get_run(run_id).data.metrics
    assert of["gate/nll"] == pytest.approx(found["nll"]["model"]["mean"])
    assert of["gate/less_mean_of_combination"] == pytest.approx(found["less"]["mean_of_combination"]["mean"])
    assert of["gate/label_recall/type"] == pytest.approx(found["label_recall"]["type"])
    assert of["gate/effective_dimension"] == pytest.approx(found["effective_dimension"])
    assert of["gate/passed"] == 1.0


def test_a_finished_run_is_judged_again_only_where_its_gate_is_not_that_of_its_weights(
    at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for name in ("set", "poor"):
        shutil.copytree(at / name, tmp_path / name)
    judged, found = list[int](), gate.found
    monkeypatch.setattr(gate, "found", lambda *given: (judged.append(1), found(*given))[1])

    def again() -> dict[str, Any]:
        return train(tmp_path, "poor", "train.steps=1", f"data.shards={at}/set")

    first = again()
    assert not judged
    assert f"autoencoder: {first['line']}" in capsys.readouterr().out
    path = tmp_path / "poor" / "gate.json"
    write_json(path, {**first, "hash": "another"})
    assert again()["hash"] == first["hash"]
    path.unlink()
    assert again()["nll"] == first["nll"]
    write_json(path, {**first, "error": "the disk was away"})
    assert "error" not in again()
    assert len(judged) == 3


@pytest.mark.parametrize("error", [InputError("no such cells"), RuntimeError("no such cells"), MemoryError()])
def test_a_judgement_that_fails_is_noted_and_the_run_is_finished(
    at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, error: Exception
) -> None:
    def fails(*given: Any) -> Any:
        raise error

    shutil.copytree(at / "set", tmp_path / "set")
    monkeypatch.setattr(gate, "found", fails)
    found = train(tmp_path, "run", "train.steps=1")
    said = capsys.readouterr()
    why = "no such cells" if isinstance(error, InputError) else f"{type(error).__name__}: {error}".strip()
    assert (found["passed"], found["step"]) == (None, 1)
    assert found["error"] == why
    assert f"WARNING: the autoencoder was not judged beside mean profiles: {why}" in said.err
    assert ("Traceback" in said.err) is not isinstance(error, InputError)
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["state"] == "finished"


def test_a_key_leaves_it_out_and_may_change_on_a_resume(at: Path, tmp_path: Path) -> None:
    words = ["train", "vae", *WORDS, "tracking.enabled=false", f"data.shards={at}/set", f"run_dir={tmp_path}/run"]
    assert main([*words, "train.steps=1", "gate=false"]) == 0
    assert not (tmp_path / "run" / "gate.json").exists()
    assert main([*words, "train.steps=1"]) == 0
    assert (tmp_path / "run" / "gate.json").is_file()


def test_a_run_that_is_stopped_is_not_judged(at: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    words = ["train", "vae", *WORDS, "tracking.enabled=false", f"data.shards={at}/set", f"run_dir={tmp_path}/run"]
    assert main([*words, "train.steps=2"]) == 0  # makes the folder
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "gate.json").unlink()
    (tmp_path / "run" / "stop").touch()
    with pytest.raises(SystemExit) as stopped:
        main([*words, "train.steps=2"])
    assert stopped.value.code == 86
    assert not (tmp_path / "run" / "gate.json").exists()


def test_no_test_cell_is_read_and_those_that_training_leaves_out_are_left_out(tmp_path: Path) -> None:
    known = cells(test=True)
    write_set(tmp_path / "set", known, block_cells=32)
    (test,) = (tmp_path / "set" / "shards").glob("*test*")
    test.write_bytes(bytes(test.stat().st_size))  # whoever reads a cell of it is refused
    found = train(tmp_path, "run", "train.steps=1", "data.select.type=a,b")
    label = known.labels["type"]
    n_train, n_validation = (int((label[known.rows_of(split)] < 2).sum()) for split in ("train", "validation"))
    assert found["cells"]["train"] == n_train
    assert found["cells"]["validation"] == n_validation


def test_a_draw_is_bounded_has_the_shares_of_validation_cells_and_says_so(at: Path, tmp_path, monkeypatch) -> None:
    shutil.copytree(at / "set", tmp_path / "set")
    monkeypatch.setattr(gate, "MOST_CELLS", 40)
    found = train(tmp_path, "run", "train.steps=1")
    assert found["cells"]["drawn_of"] == {"train": N_TRAIN, "validation": N_VALIDATION}
    assert all(35 <= found["cells"][split] <= 40 for split in ("train", "validation"))


def test_without_conditions_there_is_one_mean_profile(tmp_path: Path) -> None:
    known = replace(cells(), labels={}, conditions=ConditionVocab({}))
    write_set(tmp_path / "set", known, block_cells=32)
    found = train(tmp_path, "run", "train.steps=1")
    assert list(found["nll"]) == ["model", "mean_profile"]
    assert found["label_recall"] == {}
    assert "recall" not in found["line"]


def test_a_split_that_is_not_asked_for_need_not_be_there(at: Path) -> None:
    train_cells, validation = cells_of_shards(f"{at}/set", ["type"], splits=("train", "validation"))
    assert (len(train_cells), len(validation)) == (N_TRAIN, N_VALIDATION)
    with pytest.raises(InputError, match="holds no cells of the labels that are selected"):
        cells_of_shards(f"{at}/set", ["type"], splits=("train",), select={"type": ["z"]})


def test_some_cells_are_of_a_few_blocks(at: Path) -> None:
    every = cells_of_shards(f"{at}/set", ["type"], splits=("train", "validation"))
    some = some_cells(f"{at}/set", ["type"], ("train", "validation"), 10**6, 0)
    for whole, part in zip(every, some, strict=True):
        rows = [sorted(map(tuple, np.c_[of.counts.toarray(), of.types.astype(str)])) for of in (whole, part)]
        assert rows[0] == rows[1], "all of them, in another order"
    reads: list[int] = []
    (few,) = some_cells(f"{at}/set", [], ("train",), 40, 1, select={"type": ["b"]}, check=lambda: reads.append(1))
    assert len(few) == 40
    assert len(reads) < 10
    assert set(map(tuple, few.counts.toarray())) <= set(map(tuple, every[0].counts[every[0].types == "b"].toarray()))
    with pytest.raises(InputError, match="holds no cells, or none of the labels that are selected"):
        some_cells(f"{at}/set", [], ("train",), 40, 1, select={"type": ["z"]})


@pytest.mark.parametrize(
    "nll, words, said",
    [
        ([90, 80, 70], [], "raise train.steps=30: validation was at its best at the last step"),
        ([90, 70, 75], [], r"train on more than these 400 cells, or .* validation rose by 5.0 nats after step 20"),
        ([90, 70, 70.01], [], "these numbers do not say"),
        (
            [90, 70, 70.01],
            ["data.given.policy=random", "data.given.n_genes=19"],
            "raise data.given.n_genes=19: 19 of 40 genes are given$",
        ),
        ([90, 70, 70.01], ["model.kl_weight=2"], "lower model.kl_weight=2: latents carry 0.50 nats a cell"),
    ],
)
def test_what_to_change_is_what_the_numbers_say(at: Path, tmp_path: Path, nll, words, said: str) -> None:
    words = [f"data.shards={at}/set", f"run_dir={tmp_path}", "train.steps=30", *words]
    config = compose(TrainVAEConfig, words)
    rows = [
        {"step": 10 * k, "time": 0.0, "split": "validation", "cells_seen": 2_000 * k, "nll": value, "kl": 0.5}
        for k, value in enumerate(nll, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = to_change(config, {"cells": {"train": N_TRAIN, "drawn_of": {"train": 0}}})
    assert len(found) == 1
    assert re.match(said, found[0])


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_other_ranks_wait_for_the_first_to_judge_and_end_if_it_is_gone(tmp_path: Path, dies: bool) -> None:
    course = TrainConfig(global_batch=GLOBAL_BATCH, **{**EVERY, "hang_s": 3.0})  # pyright: ignore[reportArgumentType]
    config = SmallConfig(str(tmp_path / "run"), train=course, hardware=HardwareConfig("deepspeed", micro_batch=4))
    codes, outputs = Ranks(tmp_path).run(faulty.train_and_judge, config, 7.0, dies)
    assert codes == ([-9, 87] if dies else [0, 0]), outputs
    if dies:
        assert "rank 0" in outputs[1]
        assert "is gone" in outputs[1]
    else:
        assert all("ended after it was judged" in output for output in outputs)


def test_of_many_combinations_the_mean_profile_alone_is_judged(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else at least one cell of each were read, and a profile fitted to it."""
    manifest = read_manifest(str(at / "set"))
    assert gate.judged_conditions(manifest) == manifest.conditions.names != ()
    monkeypatch.setattr(gate, "MOST_CELLS", gate.FEWEST_CELLS)
    assert gate.judged_conditions(manifest) == ()
