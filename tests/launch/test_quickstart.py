"""The project's promise: one command, from real cells to a report; killed, resumed, and done."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import psutil  # DeepSpeed brings it
import pytest
import scipy.sparse as sp
from safetensors import safe_open

import scldm
from launch import quickstart
from launch.cli import main
from scldm.train.tracking import read_metrics
from tests.scldm.train.small_runs import make_cells

ROOT = Path(__file__).resolve().parent.parent.parent
# six minutes are promised on two free cores; a test may share them
LIMIT_S = 900


def start(*words: str) -> subprocess.Popen:
    """The command as a user types it, in a process group of its own."""
    command = ["bash", str(ROOT / "launch" / "quickstart.sh"), *words]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> str:
    text, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, text[-4_000:]
    return text


def kill_in_the_middle_of(stage: Path, process: subprocess.Popen) -> int:
    """SIGKILL to all of the command's processes once a stage has saved a checkpoint; returns that checkpoint's step.

    The group alone is not all: torchrun's ranks have groups of their own, and train on without it.
    """
    end = time.monotonic() + LIMIT_S
    latest = stage / "checkpoints" / "latest"
    while not latest.is_file():
        assert process.poll() is None, process.communicate()[0][-4_000:]
        assert time.monotonic() < end
        time.sleep(0.5)
    launcher = psutil.Process(process.pid)
    for each in [launcher, *launcher.children(recursive=True)]:
        each.kill()
    process.communicate()
    return int(latest.read_text().removeprefix("step-"))


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


STAGES = ("soma write", "shards write", "train vae", "encode", "train ldm", "export", "generate", "evaluate")
METRICS_OF = ("select distinct key from metrics where run_uuid = ?",)


def assert_is_whole(out: Path) -> None:
    """A report that needs no other file, one experiment of nested runs, and cells as they were asked for."""
    report = (out / "report.html").read_text()
    elsewhere = r"""(src|href)=["'](?!data:|#)|url\(["']?(?!["']|data:)"""
    assert not re.search(elsewhere, report), "the report needs another file"
    assert report.count("data:image/png;base64,") >= 5
    with sqlite3.connect(out / "mlflow.db") as database:
        rows = database.execute("select name, run_uuid, status from runs").fetchall()
        runs = {name: (run, status) for name, run, status in rows}
        tags = dict(database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'"))
        scores = {key for (key,) in database.execute(*METRICS_OF, (runs["quickstart"][0],))}
        datasets = database.execute("select count(*) from inputs").fetchone()
    assert set(runs) == {"quickstart", *STAGES}
    assert {status for _, status in runs.values()} == {"FINISHED"}
    assert tags == {run: runs["quickstart"][0] for name, (run, _) in runs.items() if name != "quickstart"}
    assert {"test/w2", "vae/nll", "ldm/velocity_loss", "system/cpu_utilization_percentage"} <= scores
    assert datasets == (4,), "of two trainings, encode and evaluate"
    kept = {"evaluate": ["report.html", "evaluation.json", "figures"], "train vae": ["config.json"]}
    for name, files in kept.items():
        artifacts = out / "mlflow_artifacts" / runs[name][0] / "artifacts"
        assert all((artifacts / file).exists() for file in files), name

    # as many of each type as the test split holds, integers, the source's genes
    made: Any = ad.read_h5ad(out / "generated.h5ad")
    source: Any = ad.read_h5ad(out / "input.h5ad")
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert source.shape == (700, 765)
    assert source.X.nnz == 174_400
    assert list(made.var_names) == list(source.var_names)
    assert made.X.format == "csr"
    assert np.issubdtype(made.X.dtype, np.integer)
    numbers = made.obs["cell_type"].value_counts()
    by_combination = evaluation["cells"]["by_combination"]
    assert {label: n for label, n in numbers.items() if n} == {
        label: row["test"] for label, row in by_combination.items()
    }
    assert abs(sum(row["train"] for row in by_combination.values()) / 700 - 0.6) < 0.01


def assert_is_good(evaluation: dict) -> None:
    """By type, nearer to the test cells than Poisson at the mean and than shuffled types; marker genes up. W2 of the 30
    cells of a type is known to 0.8, more than lies between the floor and Poisson: it must tell shuffled types alone."""
    for name in ("mmd2", "w2", "fd", "nn_accuracy"):
        beats = evaluation["per_combination"][name]["beats"]
        assert beats["b"] is True or name == "w2", (name, evaluation["per_combination"][name]["normalised"])
        assert beats["c"] is True, (name, evaluation["per_combination"][name]["normalised"])
    markers = [row for row in evaluation["markers"] if row["type"] in evaluation["scored_combinations"]]
    assert len(markers) >= 10
    assert all(row["log2_fold_change"]["generated"] > 0 for row in markers)


def assert_every_type_has_its_markers(model: scldm.Pretrained, evaluation: dict) -> None:
    """All marker genes of all types are up, the rarest included, given enough cells of each to tell."""
    types = sorted({row["type"] for row in evaluation["markers"]})
    share = {label: row["test"] for label, row in evaluation["cells"]["by_combination"].items()}  # of the others' mean
    made: Any = model.generate(pd.DataFrame({"cell_type": np.repeat(types, 60)}), seed=1)
    counts = made.X.toarray()
    log_expression = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    down = []
    for row in evaluation["markers"]:
        own = (made.obs["cell_type"] == row["type"]).to_numpy()
        gene = log_expression[:, made.var_names.get_loc(row["gene"])]
        weight = made.obs["cell_type"].astype(str).map(share).to_numpy(dtype=float) * ~own
        if gene[own].mean() <= np.average(gene, weights=weight):
            down.append((row["type"], row["gene"]))
    assert not down


def assert_it_sees_counts(out: Path) -> None:
    """Trained, the encoder knows how much of a gene there is: latents of other counts lie elsewhere, and say less of
    the true ones. Blind, they move by less than a hundredth of the distance between cells."""
    found = json.loads((out / "reconstruction" / "evaluation.json").read_text())
    sight = found["latents"]["sight"]
    for distortion, moved, nats in (("binarised", 0.1, 3), ("shuffled", 0.1, 3), ("times_50", 0.1, 3)):
        assert sight[distortion]["moved"] > moved, sight
        assert sight[distortion]["nats"]["mean"] > nats, sight
    assert "BLIND" not in found["verdict"]
    assert found["scores"]["model"]["re_less"]["mean_of_combination"]["mean"] < 0, "better than means"


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
def test_the_built_in_cells_go_from_counts_to_a_report(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    step = kill_in_the_middle_of(out / "vae", start("--out", str(out)))
    note = json.loads((out / "quickstart.json").read_text())
    assert "shards" in note["stages"]
    assert "vae" not in note["stages"]
    text = finish(start("--out", str(out)))

    # it went on where it was, and did not repeat what was done
    assert len(json.loads((out / "vae" / "environment.json").read_text())) == 2
    config = json.loads((out / "vae" / "config.json").read_text())
    assert 0 < step < config["train"]["steps"]
    assert (
        json.loads((out / "vae" / "outcome.json").read_text())["state"] == "finished"
    )  # at its end, or out of patience
    assert read_metrics(out / "vae", "train")[-1]["step"] > step
    assert config["hardware"]["engine"] == "auto"
    stages = json.loads((out / "quickstart.json").read_text())["stages"]
    assert all(stages[name] == seconds for name, seconds in note["stages"].items())

    for name in ("report.html", "generated.h5ad", "evaluation.json", "model", "shards", "latents"):
        assert (out / name).exists(), name
        assert str(out / name) in text
    assert_is_whole(out)
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert_is_good(evaluation)
    assert_every_type_has_its_markers(scldm.load(out / "model"), evaluation)
    assert_it_sees_counts(out)

    # again: nothing is left to do, and nothing is touched
    before = contents(out)
    assert "all is done" in finish(start("--out", str(out)))
    after = contents(out)
    tracked = ("mlflow.db", "mlflow_run.json", "metrics.jsonl", "system.jsonl", "tracked.json", "tracking.lock")
    own = {str(out / name) for name in (*tracked, "mlflow_run.json.lock")}
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} <= own


@pytest.mark.slow
def test_a_users_own_file_goes_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """Every stage for real, on two ranks, for 20 steps of each training. Counts lie in a layer beside other numbers.
    There are two conditions, and scores for each combination of them. What needs one rank runs in this process: the
    imports of eight are most of the time."""

    def in_a_layer(adata: Any) -> None:
        adata.obs["side"] = np.where(np.arange(adata.n_obs) % 2, "left", "right")
        adata.layers["counts"] = adata.X.copy()
        adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))

    real_run = quickstart.run

    def few_steps(stage: str, command: list[str], own: dict[str, str]) -> None:
        if "torch.distributed.run" in command:
            return real_run(stage, command + ["train.steps=20"] * (stage in ("vae", "ldm")), own)
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        python, _, _, _, *words = command
        assert (python, main(words)) == (sys.executable, 0), stage

    monkeypatch.setattr(quickstart, "run", few_steps)
    path = write_cells(tmp_path / "cells.h5ad", in_a_layer, n=700)
    out = tmp_path / "out"
    words = ["quickstart", "--h5ad", str(path), "--condition", "type", "--condition", "side", "--out", str(out)]
    words += ["--top-genes", "30"]
    assert main([*words, "--ranks", "2"]) == 0, capfd.readouterr().err
    assert (out / "vae" / "deepspeed.json").read_text() != "{}", "two ranks train under DeepSpeed"
    part = next((out / "vae" / "checkpoints").glob("step-*/part-0-of-1.safetensors"))
    with safe_open(part, "pt") as opened:
        assert {key[0] for key in opened.keys()} == {"0", "1"}, "two ranks of a host write one part"  # noqa: SIM118
    assert "layers/counts" in capfd.readouterr().out  # the one that was used is named
    made: Any = ad.read_h5ad(out / "generated.h5ad")
    assert made.shape[1] == 30
    assert set(made.var_names) < set(ad.read_h5ad(path).var_names)
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["cells"]["generated"] == made.n_obs
    assert evaluation["conditions"] == ["type", "side"]
    assert set(evaluation["scored_combinations"]) == {f"{t} · {s}" for t in "abc" for s in ("left", "right")}
    counts = made.obs.groupby(["type", "side"], observed=True).size()
    assert {f"{t} · {s}": n for (t, s), n in counts.items()} == {
        name: of["test"] for name, of in evaluation["cells"]["by_combination"].items()
    }
    assert (out / "report.html").is_file()

    # other settings are another run, until it is told to start over
    assert main([*words[:-1], "20"]) == 2
    assert "holds another run: top_genes was 30, now 20. --fresh starts over" in capfd.readouterr().err
    assert main(words) == 0
    assert "all is done" in capfd.readouterr().out


# --- bad input -----------------------------------------------------------------------------------------------------


def write_cells(path: Path, change=None, n: int = 40) -> Path:
    cells = make_cells(n, 0)
    obs = pd.DataFrame({"type": pd.Categorical(np.array(["a", "b", "c"])[cells.label_n])})
    adata = ad.AnnData(sp.csr_matrix(cells.counts_nG.astype(np.float32)), obs=obs.set_index(obs.index.astype(str)))
    (change or (lambda a: None))(adata)
    adata.write_h5ad(path)
    return path


def normalised(adata: Any) -> None:
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))


def two_that_differ(adata: Any) -> None:
    adata.layers["counts"] = adata.X * 2


@pytest.mark.parametrize(
    "change, words, said",
    [
        (None, ["--condition", "typ"], "obs of .* has no such column. It has .*type"),
        (None, ["--condition", "type", "--condition", "sid"], "condition=sid: obs of .* has no such column"),
        (None, ["--condition", "type,sid"], "condition=sid: obs of .* has no such column"),
        (None, [], "h5ad and condition go together"),
        (None, ["--condition", "type", "--presets", "x"], "unknown key 'presets'"),
        (normalised, ["--condition", "type"], "X"),
        (two_that_differ, ["--condition", "type"], "layers/counts"),
    ],
)
def test_a_bad_file_is_refused_before_anything_is_made(tmp_path: Path, capsys, change, words, said: str) -> None:
    path = write_cells(tmp_path / "cells.h5ad", change)
    assert main(["quickstart", "--h5ad", str(path), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error), error
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_or_of_another_run_is_left_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for words in ([], ["--fresh"]):
        assert main(["quickstart", "--out", str(tmp_path), *words]) == 2
        assert "not empty and not a quickstart's folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    note = {"cells": "/other.h5ad", "condition": ["type"], "layer": "", "top_genes": 2000, "stages": {}}
    (tmp_path / "quickstart.json").write_text(json.dumps(note))
    assert main(["quickstart", "--out", str(tmp_path)]) == 2
    assert "holds another run: cells was '/other.h5ad', now ''" in capsys.readouterr().err


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_is_told_to_stop_is_waited_for(tmp_path: Path, number: int) -> None:
    """The signal goes on to the stage, which saves; it is not left behind alone."""
    stage = "import signal, sys, time; signal.signal(15, lambda *_: (open('saved', 'w').close(), sys.exit(85)));"
    stage += "open('begun', 'w').close(); time.sleep(60)"
    code = f"import sys; from launch.quickstart import run; run('vae', [sys.executable, '-c', {stage!r}], {{}})"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as of:
        until = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < until:
            time.sleep(0.1)
        of.send_signal(number)
        assert "stopped in stage vae, which is saved. The same command goes on" in of.communicate(timeout=30)[1]
        assert of.returncode == 85
    assert (tmp_path / "saved").exists()
