"""Previews of both trainings through the verbs: held-out cells beside what the model makes of them, and the plan."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from launch import training
from launch.cli import main
from launch.evaluation import preview
from launch.evaluation.preview import Trained, of_ldm, some_of
from launch.plan import read as read_plan
from launch.planning import of_run
from launch.run_data import encoded_from, keep_encoded_from
from launch.training import machine_of, planned
from scldm.errors import Stopped
from scldm.evaluate.cells import Cells
from scldm.evaluate.map_of_cells import FixedMap
from scldm.evaluate.preview import gene_agreement, log_moments, responses_to
from scldm.parallel.engine import HardwareConfig
from scldm.train.loop import TrainConfig
from scldm.train.run_folder import PLAN
from scldm.train.tracking import read_metrics
from tests.data_pipeline.small_sets import write_set
from tests.launch import faulty
from tests.launch.faulty import EVERY, GLOBAL_BATCH, Ranks, SmallConfig
from tests.launch.test_gate import cells, train
from tests.scldm.train.small_runs import ALONE, N_GENES, make_cells, make_dit, stored

LDM = [
    *("hardware.engine=plain", "hardware.micro_batch=50", "train.global_batch=50", "train.log_every=50"),
    *("model.width=32", "model.n_heads=2", "model.n_layers=2", "optim.lr=5e-3", "train.ema_decay=0.99"),
    *("train.steps=400", "train.validate_every=200", "train.save_every=200"),
]


def some_cells(n: int, seed: int, labels: np.ndarray | None = None) -> Cells:
    made = make_cells(n, seed)
    of = np.array(["a", "b", "c"])[made.label_n] if labels is None else labels
    genes = tuple(f"g{k}" for k in range(N_GENES))
    return Cells.of_labels(sp.csr_matrix(made.counts_nG), {"type": of}, genes, "cells")


# --- what it says --------------------------------------------------------------------------------------------------


def test_moments_agree_between_cells_of_one_kind_and_faults_are_seen() -> None:
    real, other = (some_cells(500, seed).counts for seed in (0, 1))
    same = gene_agreement(log_moments(real), log_moments(other))
    assert same["log_mean_r"] > 0.99
    assert same["log_mean_error"] < 0.05
    assert same["log_variance_error"] < 0.1
    twofold = gene_agreement(log_moments(real), log_moments(sp.csr_matrix(2 * real)))
    assert twofold["log_mean_r"] == pytest.approx(1.0)
    assert twofold["log_mean_error"] == pytest.approx(np.log10(2))
    assert twofold["log_variance_error"] == pytest.approx(np.log10(4))
    mean = sp.csr_matrix(np.tile(np.asarray(real.mean(0)), (500, 1)))
    flat = gene_agreement(log_moments(real), log_moments(mean))
    assert flat["log_mean_error"] == pytest.approx(0.0, abs=1e-6)
    assert flat["log_variance_error"] > 1


def test_a_gene_without_counts_is_half_a_count() -> None:
    counts = sp.csr_matrix(np.array([[0, 4], [0, 4], [0, 0], [0, 0]]))
    mean, variance, fraction = log_moments(counts)
    assert mean == pytest.approx(np.log10([0.5 / 4, 2]))
    assert variance == pytest.approx(np.log10([0.5 / 4, 4]))
    assert fraction.tolist() == [0, 0.5]


def test_the_slope_of_cells_that_ignore_their_labels_is_nought() -> None:
    train, real, other = (some_cells(n, seed) for n, seed in ((600, 0), (300, 1), (300, 2)))
    assert responses_to(train, real, other, 0)["type"] == pytest.approx(1.0, abs=0.25)
    deaf = some_cells(300, 2, np.random.default_rng(0).permutation(other.types))
    assert responses_to(train, real, deaf, 0)["type"] == pytest.approx(0.0, abs=0.25)
    alone = real.select(np.flatnonzero(real.types == "a"))
    assert responses_to(train, alone, other, 0) == {}


@pytest.mark.heavy
def test_others_are_placed_where_their_like_lie_and_the_map_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(at, 1, (60, 5)) for at in (0, 20)])
    one, again = FixedMap.of(real, 0), FixedMap.of(real, 0)
    assert one.name == "UMAP"
    near = one.place(rng.normal(20, 1, (30, 5)))
    assert np.allclose(one.place(real), again.place(real))
    centres = [one.place(real)[k].mean(0) for k in (slice(0, 60), slice(60, 120))]
    assert (np.linalg.norm(near - centres[1], axis=1) < np.linalg.norm(near - centres[0], axis=1)).all()
    monkeypatch.setitem(sys.modules, "umap", None)
    assert FixedMap.of(real, 0).name == "PC"


def test_the_same_cells_are_taken_and_none_is_empty() -> None:
    of = some_cells(100, 0)
    counts = sp.csr_matrix(of.counts.toarray() * (np.arange(100) % 2)[:, None])
    emptied = of.with_counts(counts, of.genes, "cells")
    one, again = (some_of(emptied, 20, 3) for _ in range(2))
    assert (one.counts.toarray() == again.counts.toarray()).all()
    assert len(one) == 20
    assert (one.counts.getnnz(1) > 0).all()


# --- where there are none ------------------------------------------------------------------------------------------


def trained(shards: str) -> Trained:
    data: Any = SimpleNamespace(shards=shards)
    return Trained("train ldm", {}, data, SimpleNamespace(), 0, torch.device("cpu"), "float32")  # pyright: ignore[reportArgumentType]


def test_latents_of_nowhere_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert of_ldm(trained("latents"), make_dit(), encoded_from(tmp_path), {}) is None
    said = capsys.readouterr().err
    assert "train ldm: no previews, as latents does not say which autoencoder and cells it comes from" in said


def test_a_missing_package_is_told_of(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(preview, "find_spec", lambda package: None if package == "sklearn" else object())
    keep_encoded_from(tmp_path, "vae", "best", "shards")
    assert of_ldm(trained("latents"), make_dit(), encoded_from(tmp_path), {}) is None
    assert (
        "no previews, as the package sklearn is missing. scldm's extra 'evaluate' brings it" in capsys.readouterr().err
    )


def test_where_latents_come_from_is_found_after_all_was_moved(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("work/latents").mkdir(parents=True)
    keep_encoded_from(Path("work/latents"), "work/vae", "latest", "work/shards")
    shutil.move("work", "elsewhere")
    found = encoded_from(Path("elsewhere/latents"))
    assert found is not None
    assert tuple(map(str, found)) == ("elsewhere/vae", "latest", "elsewhere/shards")
    keep_encoded_from(Path("elsewhere/latents"), "elsewhere/vae", "best", "s3://atlas/shards")
    found = encoded_from(Path("elsewhere/latents"))
    assert found is not None
    assert found.shards == "s3://atlas/shards"


# --- the verbs -----------------------------------------------------------------------------------------------------


def run(*words: str) -> None:
    assert main(list(words)) == 0, words


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set, an autoencoder with previews, its latents, a second stage with previews and one without."""
    folder = tmp_path_factory.mktemp("preview")
    write_set(folder / "set", cells(), block_cells=32)
    train(folder, "vae", "train.steps=100", "train.preview_share=1")
    run("encode", f"vae={folder}/vae", f"shards={folder}/set", f"out={folder}/latents")
    words = ["train", "ldm", *LDM, f"data.shards={folder}/latents", "tracking.enabled=false"]
    run(*words, f"run_dir={folder}/ldm", "train.preview_share=1")
    run(*words, f"run_dir={folder}/plain", "train.preview_share=0")
    return folder


@pytest.mark.slow
def test_both_stages_show_themselves(at: Path) -> None:
    for stage, steps in (("vae", [50, 100]), ("ldm", [200, 400])):
        shown = read_metrics(at / stage, "preview")
        assert [row["step"] for row in shown] == steps
        assert shown[-1]["log_mean_r"] > 0.95
        for step in steps:
            assert (at / stage / "previews" / f"step-{step:08d}.png").read_bytes().startswith(b"\x89PNG")
    last = read_metrics(at / "ldm", "preview")[-1]
    assert last["response_slope/type"] == pytest.approx(1.0, abs=0.35)
    assert last["memorisation_ratio"] == pytest.approx(1.0, abs=0.3)


@pytest.mark.slow
def test_a_run_with_previews_is_the_run_without(at: Path) -> None:
    (state, tensors), (state_other, tensors_other) = stored(at / "ldm"), stored(at / "plain")
    assert state["validation"] == state_other["validation"]
    assert all(torch.equal(tensors[key], tensors_other[key]) for key in tensors)
    assert not (at / "plain" / "previews").exists()


@pytest.mark.slow
def test_a_report_shows_the_last_preview_and_its_curves(at: Path) -> None:
    run("report", f"{at}/ldm", f"{at}/plain", f"out={at}/both.html")
    page = (at / "both.html").read_text()
    assert page.count('id="figure-preview_') == 1
    run("report", f"{at}/plain")
    assert "Last preview" not in (at / "plain" / "run.html").read_text()


@pytest.mark.slow
def test_an_autoencoder_or_cells_that_are_others_by_now_are_told_of(at: Path, tmp_path: Path, capsys) -> None:
    few = [f"data.shards={at}/latents", "train.steps=2", "train.validate_every=1", "train.preview_share=1"]
    few += ["tracking.enabled=false"]
    train(at, "other", "train.steps=4")
    write_set(tmp_path / "set", cells(test=True), block_cells=32)
    noted = (at / "latents" / "encoded_from.json").read_text()
    try:
        for vae, shards, told in (
            ("other", at / "set", "another autoencoder"),
            ("vae", tmp_path / "set", "other cells"),
        ):
            keep_encoded_from(at / "latents", str(at / vae), "best", str(shards))
            capsys.readouterr()
            run("train", "ldm", *LDM, *few, f"run_dir={tmp_path}/{vae}")
            said = capsys.readouterr().err
            assert said.count("no more previews, as that of step 1 failed") == 1
            assert f"{told}" in said
    finally:
        (at / "latents" / "encoded_from.json").write_text(noted)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_ranks_wait_for_the_first_and_stay_in_step(ranks: Ranks, tmp_path: Path, zero: int) -> None:
    hardware = HardwareConfig("deepspeed", micro_batch=4, zero_stage=zero)
    said = []
    for name, share in (("plain", 0.0), ("shown", 1.0)):
        of = TrainConfig(global_batch=GLOBAL_BATCH, preview_share=share, **EVERY)  # pyright: ignore[reportArgumentType]
        codes, outputs = ranks.run(
            faulty.train_with_previews, SmallConfig(str(tmp_path / name), train=of, hardware=hardware), timeout=300
        )
        assert codes == [0, 0], outputs
        said.append(outputs)
    (_, tensors), (_, tensors_other) = (stored(tmp_path / name) for name in ("plain", "shown"))
    assert all(torch.equal(tensors[key], tensors_other[key]) for key in tensors)
    (first, second) = said[1]
    assert "preview of step" not in second
    whole = sum(t.numel() for name, t in tensors.items() if name.startswith("ema/"))
    if zero == 3:
        assert first.count("no previews: no rank has the whole network under ZeRO-3 and FSDP2") == 1
        assert "preview of step" not in first
    else:
        assert [f"preview of step {step}: {whole} numbers" in first for step in (8, 16)] == [True, True]
        assert len(read_metrics(tmp_path / "shown", "preview")) == 2


# --- the plan ------------------------------------------------------------------------------------------------------


def test_the_machine_of_this_run_is_a_cpu() -> None:
    found = machine_of(HardwareConfig(), ALONE, 1)
    assert (found["nodes"], found["gpus_per_node"], found["gpu"]) == (1, 1, "CPU")
    preset = read_plan(["vae/20m", "hardware/cpu"]).hardware
    assert found == {key: getattr(preset, key) for key in found}


def test_a_plan_that_can_not_be_made_is_a_line(tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"run_dir": "a", "hardware": {}}))
    assert of_run.main(["vae", str(tmp_path), '{"gpu": "Z9"}']) == 1
    said = capfd.readouterr().err
    assert said.startswith(f"scldm: no {PLAN}: ")
    assert "hardware.gpu=Z9" in said
    assert said.count("\n") == 1
    with planned("vae", tmp_path, {"gpu": "Z9"}):
        pass  # a run that ends before a minute is over
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(training, "PLAN_AFTER_S", 0.0)
    with planned("vae", tmp_path, {"gpu": "Z9"}):
        time.sleep(0.1)
    assert capfd.readouterr().err == f"scldm: no {PLAN}: the run ended before it was made\n"


@pytest.mark.heavy
def test_planning_gives_way_to_training() -> None:
    """In a session of its own, whose priority Linux weighs against that of the training's."""
    told = "import os; from pathlib import Path; from launch.planning.of_run import give_way; give_way(); "
    told += "group = Path('/proc/self/autogroup'); print(os.nice(0), group.read_text() if group.exists() else '19')"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, start_new_session=True)
    assert done.stdout.split()[0] == "19", done.stderr
    assert done.stdout.split()[-1] == "19"


@pytest.mark.slow
def test_the_plan_of_a_run(at: Path, tmp_path: Path) -> None:
    shutil.copytree(at / "ldm", tmp_path / "ldm")
    assert of_run.main(["ldm", str(tmp_path / "ldm"), json.dumps(machine_of(HardwareConfig(), ALONE, 1))]) == 0
    plan = json.loads((tmp_path / "ldm" / PLAN).read_text())
    assert plan["ranks"] == 1
    assert plan["cells_per_s"] > 0
    assert len(plan["compared"]) > 0


@pytest.mark.exhaustive  # it waits for a process with little priority
def test_a_run_gets_its_plan_and_mlflow_too(at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that lasts until it is there."""
    monkeypatch.setattr(training, "PLAN_AFTER_S", 0.0)
    words = [f"data.shards={at}/latents", "train.steps=1000000", "train.validate_every=1000000"]
    words += [f"run_dir={tmp_path}/run", "tracking.uri=http://127.0.0.1:9", "tracking.close_s=0"]

    def stop_when_planned() -> None:
        end = time.monotonic() + 300
        while not (tmp_path / "run" / PLAN).is_file() and time.monotonic() < end:
            time.sleep(0.2)
        (tmp_path / "run" / "stop").touch()

    threading.Thread(target=stop_when_planned, daemon=True).start()
    with pytest.raises(Stopped):
        main(["train", "ldm", *LDM, *words])
    plan = json.loads((tmp_path / "run" / PLAN).read_text())
    assert plan["ranks"] == 1
    assert plan["cells_per_s"] > 0
    assert [PLAN, ""] in json.loads((tmp_path / "run" / "tracked.json").read_text())["artifacts"]
