"""`evaluate_vae`: the scores are those of validation and of the plain formulas, on the test cells of a set."""

from __future__ import annotations

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from data_pipeline.stream.loader import CellLoader, LoaderConfig
from launch import train_vae
from launch.evaluate import main as evaluate
from launch.evaluation import of_autoencoder
from launch.evaluation.config import EvaluateVerbConfig
from launch.evaluation.of_autoencoder import autoencoder, show, verdict
from launch.evaluation.reconstructed_cells import reconstructed
from launch.export import ExportConfig
from launch.export import main as export
from scldm.errors import InputError
from scldm.evaluate.cells import Cells
from scldm.evaluate.config import EvaluateConfig
from scldm.evaluate.reconstruction import fit_mean_profile, log_profile, nb_nll
from scldm.evaluate.sample import Sample
from scldm.model.vae import VAEConfig
from scldm.parallel.engine import HardwareConfig
from scldm.train.loop import TrainConfig
from scldm.train.losses import Draws, VAEStage
from scldm.train.tracking import TrackingConfig
from tests.data_pipeline.small_sets import Known, known_cells, write_set

pytestmark = pytest.mark.heavy

N_TEST = 150  # a batch of 128 and a smaller one


def cells_of_three_types() -> Known:
    """300 training, 40 validation and 150 test cells of 60 genes; types differ in 20 of them."""
    known = known_cells(300, 40 + N_TEST, n_genes=60)
    rng = np.random.default_rng(0)
    rate = np.ones((len(known.counts), 60))
    for k in range(3):
        rate[known.labels["type"] == k, 20 * k : 20 * k + 20] = 4
    counts = rng.poisson(rate * rng.gamma(4, 0.25, (len(rate), 1)))
    counts[:, 0] += 1
    known.labels["donor"] %= 2
    return replace(known, counts=counts, split_sizes={"train": 300, "validation": 40, "test": N_TEST})


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set, the run of an autoencoder on it, and that as a model folder."""
    folder = tmp_path_factory.mktemp("evaluate_vae")
    write_set(folder / "set", cells_of_three_types(), block_cells=64)
    config = train_vae.TrainVAEConfig(
        str(folder / "run"),
        LoaderConfig(str(folder / "set")),
        model=VAEConfig(16, 2, 4, 1, 2),
        train=TrainConfig(steps=30, global_batch=60, validate_every=30, save_every=30, log_every=30),
        hardware=HardwareConfig("plain", 30),
        tracking=TrackingConfig(enabled=False),
    )
    train_vae.main(config)
    export(ExportConfig(vae=str(folder / "run"), out=str(folder / "model")))
    return folder


def evaluate_vae(vae: str, shards: str, seed: int = 0, **given: Any) -> dict:
    return evaluate(EvaluateVerbConfig(vae=vae, shards=shards, evaluate=EvaluateConfig(seed=seed), **given))


def test_the_likelihood_is_that_of_validation(at: Path) -> None:
    found = evaluate_vae(f"{at}/run", f"{at}/set")
    model, _ = autoencoder(at / "run", "cpu", 64)
    data: Any = LoaderConfig(f"{at}/set")
    place: Any = {"rank": 0, "world_size": 1, "global_batch": 50, "micro_batch": 50, "device": torch.device("cpu")}
    total, n = 0.0, 0.0
    with closing(CellLoader(data, split="test", **place)) as loader:
        for micro_batches in loader.one_pass():
            for batch in micro_batches:
                of = VAEStage(model.vae).validation(model.vae, batch, Draws(0, 0, batch.positions_B))
                total, n = total + float(of["nll"]), n + float(batch.weight_B.sum())
    assert n == N_TEST
    assert found["scores"]["model"]["re"]["mean"] == pytest.approx(total / n, rel=1e-5)


def test_run_and_model_folder_give_the_same_numbers_and_the_file_holds_them(at: Path, tmp_path: Path, capsys) -> None:
    of_run = evaluate_vae(f"{at}/run", f"{at}/set", out=str(tmp_path / "a/b"), batch=32, published="hlca")
    shown = capsys.readouterr().out
    of_model = evaluate_vae(f"{at}/model", f"{at}/set", batch=50)
    for side in of_run["scores"]:
        for reading in ("re", "ours"):
            a, b = (of["scores"][side][reading] for of in (of_run, of_model))
            assert a.keys() == b.keys()
            # batches of other sizes: rounding alone
            assert [v for v in a.values() if v] == pytest.approx([v for v in b.values() if v], rel=1e-4)
    assert of_run["vae"]["run"] == of_model["vae"]["run"] == f"{at}/run"
    written = json.loads((tmp_path / "a/b/evaluation.json").read_text())
    assert written["scores"] == of_run["scores"]
    assert written["cells"] == {"train": 300, "test": N_TEST, "scored": N_TEST, "without_counts": 0, "drawn_of": {}}
    for text in ("autoencoder", "mean profile per combination", "RE (nats)", "scLDM v2, as published"):
        assert text in shown
    assert f"{of_run['scores']['model']['re']['mean']:.1f}" in shown
    assert "hlca, protocol not fully known" in shown
    assert of_run["verdict"] in shown
    assert "published" not in of_model


def test_names_are_shown_as_text(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate_vae(f"{at}/model", f"{at}/set", conditions=("none",))
    assert found["conditions"] == []  # the set has no condition of that name
    found["genes"] |= {"unknown_to_model": 1, "such_as": ["x[/b] y"]}
    found["latents"]["label_recall"] = {"CD4 [mem]": 0.5}
    found["published"] = {"data": "a[/b]", "note": "n", "rows": {"m[/b]": (1.0, 0.5, 0.5)}}
    capsys.readouterr()
    show(found)
    shown = capsys.readouterr().out
    for text in ("such as x[/b] y", "CD4 [mem] 0.500", "As published: a[/b]", "m[/b], as published"):
        assert text in shown


def test_precision_reaches_the_networks(at: Path) -> None:
    exact, other = (evaluate_vae(f"{at}/run", f"{at}/set", precision=p) for p in ("float32", "bfloat16"))
    assert other["vae"]["precision"] == "bfloat16"
    means = [found["scores"]["model"]["re"]["mean"] for found in (exact, other)]
    assert means[0] != means[1]
    assert means[1] == pytest.approx(means[0], rel=0.02)  # bfloat16 keeps 8 bits of a number


def test_scores_are_those_of_the_cells_one_by_one(at: Path) -> None:
    """Both sides of every number computed again, from the set's own counts."""
    found = evaluate_vae(f"{at}/model", f"{at}/set", seed=3)["scores"]
    known = cells_of_three_types()
    counts = {split: known.counts[known.rows_of(split)] for split in ("train", "test")}
    types = {split: [f"{'abc'[t]} · d{d}" for t, d in zip(*(known.labels[c][known.rows_of(split)] for c in
             ("type", "donor")))] for split in ("train", "test")}  # fmt: skip
    cells = {s: Cells(sp.csr_matrix(counts[s]), np.array(types[s]), known.genes.ids, s) for s in counts}
    model, _ = autoencoder(at / "model", "cpu", 64)
    drawn = reconstructed(model, cells["test"], 3).counts.toarray()
    mse = np.square(log_profile(drawn) - log_profile(counts["test"])).mean()
    # rounding may move one draw by one count: 1 of 9,000 numbers
    assert found["model"]["published"]["mse"] == pytest.approx(mse, rel=1e-3)
    assert (found["model"]["published"]["batches"], found["model"]["ours"]["cells_with_pcc"]) == (2, N_TEST)
    profiles = {
        "mean_profile": fit_mean_profile(cells["train"].counts),
        "mean_of_combination": fit_mean_profile(cells["train"].counts, cells["train"].types),
    }
    for name, profile in profiles.items():
        mean_BG = profile.mean_BG(counts["test"].sum(1), cells["test"].types)
        nll_n = nb_nll(cells["test"].counts, mean_BG, profile.theta_G)
        assert found[name]["re"]["mean"] == pytest.approx(nll_n.mean(), rel=1e-9)
        gap = found["model"]["re"]["mean"] - nll_n.mean()
        assert found["model"]["re_less"][name]["mean"] == pytest.approx(gap, rel=1e-6)
    assert found["mean_profile"]["ours"]["pcc_gene"] is None  # the same for all cells
    assert found["mean_of_combination"]["ours"]["pcc_gene"] > 0.3
    assert found["mean_of_combination"]["re"]["mean"] < found["mean_profile"]["re"]["mean"] - 5
    # draws of the same means, chance but for library sizes
    assert abs(found["mean_profile"]["published"]["pcc"]) < 0.15
    assert found["mean_of_combination"]["published"]["pcc"] > found["mean_profile"]["published"]["pcc"] + 0.05


def test_conditions_decide_the_profiles_and_none_leaves_one_profile(at: Path) -> None:
    one = evaluate_vae(f"{at}/model", f"{at}/set", conditions=("type",))
    assert (one["conditions"], one["combinations"]["train"]) == (["type"], 3)
    none = evaluate_vae(f"{at}/model", f"{at}/set", conditions=("none",))
    assert list(none["scores"]) == ["model", "mean_profile"]
    assert list(none["scores"]["model"]["re_less"]) == ["mean_profile"]
    both = evaluate_vae(f"{at}/model", f"{at}/set")
    assert (both["conditions"], both["combinations"]["train"]) == (["type", "donor"], 6)


def test_other_genes_empty_cells_and_unseen_combinations_are_counted_and_said(at: Path, tmp_path: Path, capsys) -> None:
    """A set with four genes that the model does not know, among them all that one cell has; b of d1 is not trained."""
    known = cells_of_three_types()
    vocab = replace(known.genes, ids=(*known.genes.ids[:56], "x1", "x2", "x3", "x4"))
    first = known.rows_of("test").start
    known.counts[first], known.counts[first, 57] = 0, 5
    train = np.arange(len(known.counts)) < 300
    unseen = (known.labels["type"] == 1) & (known.labels["donor"] == 1)
    known.labels["donor"][train & unseen] = 0
    write_set(tmp_path / "set", replace(known, genes=vocab), block_cells=64)
    found = evaluate_vae(f"{at}/model", f"{tmp_path}/set")
    assert found["genes"] == {
        "set": 60, "model": 60, "scored": 56, "unknown_to_model": 4, "such_as": ["x1", "x2", "x3", "x4"]
    }  # fmt: skip
    assert (found["cells"]["scored"], found["cells"]["without_counts"]) == (N_TEST - 1, 1)
    n = int(unseen[first + 1 :].sum())
    assert found["combinations"]["unseen"] == ["b · d1"]
    assert found["combinations"]["cells_of_unseen"] == n
    shown = capsys.readouterr().out
    assert "4 of 60 genes are left out, as the model does not know them, such as x1, x2, x3." in shown
    assert "1 test cells are left out" in shown
    assert f"{n} test cells are of 1 combinations without training cells" in shown


def test_a_sample_of_the_cells_is_seeded_and_said(at: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(of_autoencoder, "Sample", lambda n, generated, seed: Sample(60, generated, seed))
    first, again, other = (evaluate_vae(f"{at}/model", f"{at}/set", seed=s) for s in (0, 0, 1))
    assert first["cells"]["drawn_of"] == {"train": 300, "test": N_TEST}
    assert 50 <= first["cells"]["scored"] <= 60
    assert f"{first['cells']['test']} of 150 test cells were drawn." in capsys.readouterr().out
    assert first["scores"] == again["scores"]
    assert first["scores"] != other["scores"]


def scores(gap: float, se: float | None) -> dict[str, Any]:
    return {
        "model": {
            "re_less": {"mean_profile": {"mean": gap - 9, "se": se}, "mean_of_combination": {"mean": gap, "se": se}}
        },
        "mean_profile": {"re": {"mean": 109.0}},
        "mean_of_combination": {"re": {"mean": 100.0}},
    }


@pytest.mark.parametrize(
    "gap, se, said",
    [
        (
            -20.0,
            2.0,
            r"is 20\.0 nats a cell better than the mean profile per combination \(95 % interval 16\.1 to 23\.9\)",
        ),
        (
            3.0,
            2.0,
            r"can't be told from the mean profile per combination: -3\.0 nats a cell, 95 % interval -6\.9 to 0\.9",
        ),
        (
            20.0,
            2.0,
            r"is 20\.0 nats a cell WORSE than the mean profile per combination \(95 % interval 16\.1 to 23\.9\)",
        ),
        (20.0, None, r"is 20\.0 nats a cell WORSE"),
    ],
)
def test_the_verdict_is_against_the_best_mean_profile(gap: float, se: float | None, said: str) -> None:
    assert re.search(said, verdict(scores(gap, se), "nb"))
    assert "can't be compared" in verdict(scores(gap, se), "gaussian")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"published": "nonsense"}, "published='nonsense' must be one of dentate_gyrus, tabula_muris, hlca"),
        ({"vae": "missing"}, "missing"),
        ({"device": "toaster"}, "device=toaster"),
        ({"conditions": ("tissue",)}, "has no condition='tissue'"),
    ],
)
def test_mistakes_are_one_line(at: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as refusal:
        evaluate_vae(**{"vae": f"{at}/run", "shards": f"{at}/set", **change})
    assert "\n" not in str(refusal.value)
