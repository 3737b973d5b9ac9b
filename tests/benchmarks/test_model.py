"""The benchmarks of the model at a small size: every way runs on the same inputs, and what they print can be read."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from benchmarks import mcab, subset_embedding, train, vae_choices, vae_step
from benchmarks.measure import Cost, failure_of
from benchmarks.report import Report
from benchmarks.subset_embedding import BenchSubsetEmbeddingConfig
from benchmarks.trained import Trained, knn_accuracy
from benchmarks.ways import FACTORISED
from scldm.errors import InputError
from scldm.model.vae import VAEConfig
from scldm.train.optim import OptimConfig

pytestmark = pytest.mark.heavy

MODEL = cast(Any, None)  # is not asked
SMALL = VAEConfig(width=16, n_latents=4, n_layers=1, n_heads=2)


def test_bench_mcab(tmp_path, capsys, monkeypatch):
    in_turn, measured = mcab.measure_in_turn, []
    monkeypatch.setattr(
        mcab, "measure_in_turn", lambda works, *rest: measured.append(set(works)) or in_turn(works, *rest)
    )
    config = mcab.BenchMCABConfig(
        given=(50,),
        asked=(30, 60),
        n_genes=400,
        cells_encoded=3,
        model=SMALL,
        repeats=1,
        save=str(tmp_path / "rows.json"),
    )
    mcab.main(config)
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["all genes, largest difference of a latent"]["value"] < 1e-4
    assert rows["all genes, pooling, plain / expressed genes"]["target"] == ">= 12"
    for part in ("pooling, 50", "reading out, 30", "reading out, 60"):
        assert rows[f"{part} genes, factorised, forward"]["value"] > 0
        assert rows[f"{part} genes, sdpa, forward + backward"]["value"] > 0
    assert "all genes, encode, expressed genes" in capsys.readouterr().out
    assert measured.count({"plain", "factorised", "expressed genes"}) == 2  # what else the machine does meets all


def test_a_way_that_fails_on_a_gpu_ends_no_bench(monkeypatch, capsys):
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 25 GiB.\nMore of it.")

    why = failure_of(too_large, torch.device("cuda"))
    assert why == "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 25 GiB."
    with pytest.raises(torch.OutOfMemoryError):
        failure_of(too_large, torch.device("cpu"))

    def fails(*numbers: int):
        """Those calls of a bench, counted from 0. The first is that of the plain formula."""
        counted = count()
        return lambda work, device: why if next(counted) in numbers else failure_of(work, device)

    monkeypatch.setattr(vae_step, "failure_of", fails(0))
    config = {"cells": 2, "n_genes": 50, "model": SMALL, "repeats": 1}
    rows = {row.name: row.value for row in vae_step.main(vae_step.BenchVAEStepConfig(**config, n_given=30)).rows}
    assert rows[f"plain: {why}"] is None
    assert rows["factorised"] > 0
    assert "plain" not in rows
    assert not [name for name in rows if name.startswith("plain / ") or name == "factorised / plain, peak memory"]
    monkeypatch.setattr(vae_step, "failure_of", fails(4))  # plain and sdpa have two calls each
    rows = {row.name: row for row in vae_step.main(vae_step.BenchVAEStepConfig(**config, n_given=30)).rows}
    assert rows[f"factorised: {why}"].value is None
    assert rows["auto, here factorised, / the fastest way, time: factorised failed"].target == "<= 1.05"
    assert (rows["plain"].value or 0) > 0
    monkeypatch.setattr(mcab, "failure_of", fails(0))
    words = {**config, "given": (30,), "asked": (), "cells_encoded": 0}
    rows = {row.name: row.value for row in mcab.main(mcab.BenchMCABConfig(**words)).rows}
    for what in ("forward", "forward + backward"):
        assert rows[f"pooling, 30 genes, plain, {what}: {why}"] is None
        assert rows[f"pooling, 30 genes, factorised, {what}"] > 0
    capsys.readouterr()


def test_what_was_not_measured_says_so_beside_its_target(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shape = VAEConfig(width=256, n_latents=64, n_layers=0)
    config = vae_step.BenchVAEStepConfig(cells=1, n_genes=2_048, n_asked=8, model=shape, repeats=1, json=True)
    report = vae_step.main(config)
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed["rows"]] == [row.name for row in report.rows]
    unmeasured = [row for row in printed["rows"] if "GPU" in row["name"] and row["target"]]
    assert [row["target"] for row in unmeasured] == [">= 1.2", "<= 0.25", ">= 1.2", "<= 2"]
    assert all(row["value"] is None and row["met"] is None for row in unmeasured)
    report.print(as_json=False)
    assert "not measured on a GPU" in capsys.readouterr().out


GPU = torch.device("cuda")


@pytest.mark.parametrize("seconds, met", [(1.1, False), (1.3, True)])
def test_torchs_attention_over_the_fused_kernels_is_judged_on_a_gpu(seconds, met):
    costs = {"plain": Cost(9, 9), "fused": Cost(1, 9), "sdpa": Cost(seconds, 9), "sdpa, compiled": Cost(seconds, 9)}
    report = Report("mcab")
    mcab.pooling_targets(report, costs, GPU)
    vae_step.targets(
        report, vae_step.BenchVAEStepConfig(128, 36_130, 8_192, 8_192, False, "20m", precision="bf16"), costs, GPU
    )
    vae_step.targets(
        report, vae_step.BenchVAEStepConfig(32, 36_130, 8_000, 36_130, False, "20m", precision="bf16"), costs, GPU
    )
    assert [row.met for row in report.rows if row.value == seconds and row.target] == [met] * 3


def test_of_one_seed_nothing_is_said_of_what_lies_between_seeds(capsys):
    one, two = (Trained(MODEL, {"nll": nll}, 1.0) for nll in (600.0, 610.0))
    row = vae_choices.spread("KL weight 1", [one], "nll", "nats/cell")
    assert (row.name, row.value) == ("KL weight 1: between seeds: one seed", None)
    assert vae_choices.spread("KL weight 1", [one, two], "nll", "nats/gene", 100).value == pytest.approx(0.1)
    Report("benchmarks.vae_choices", rows=[row]).print(as_json=False)
    assert capsys.readouterr().out.splitlines()[-1].split()[-2:] == ["n/a", "nats/cell"]


@pytest.fixture
def half_empty(tmp_path, monkeypatch) -> str:
    """40 cells x 20 genes: a type is told by genes 0 to 9 or 10 to 19, and some cells have counts in one gene alone. A
    model embeds all the genes that a file has."""
    counts = np.zeros((40, 20), np.float32)
    counts[::2, :10], counts[1::2, 10:] = 5, 5
    counts[30:] = 0
    counts[30:, 0] = 1
    obs = pd.DataFrame({"cell_type": ["a", "b"] * 20, "part": ["train"] * 20 + ["test"] * 20})
    obs.index = obs.index.astype(str)
    names = pd.Index([f"g{k:02}" for k in range(20)])
    ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=names)).write_h5ad(tmp_path / "cells.h5ad")

    def embed(adata: ad.AnnData) -> np.ndarray:
        out = np.zeros((adata.n_obs, 20), np.float32)
        out[:, names.get_indexer(adata.var_names)] = adata.X.toarray()
        return out

    monkeypatch.setattr("benchmarks.subset_embedding.scldm.load", lambda folder: SimpleNamespace(embed=embed))
    return str(tmp_path / "cells.h5ad")


def test_an_embedding_that_keeps_what_is_left_keeps_its_accuracy_and_empty_cells_are_counted(half_empty: str):
    config = BenchSubsetEmbeddingConfig(models=("m",), h5ad=half_empty, split="part", draws=10)
    rows = {row.name: row for row in subset_embedding.main(config).rows}
    assert rows["all genes: accuracy"].value == 0.75  # half of the cells of one gene are named wrongly
    kept = rows["50 % of the genes removed: of that with all genes, training cells with the same genes"]
    assert kept.value >= 0.95
    assert kept.met
    empty = {p: rows[f"{p} % of the genes removed: cells without a count"].value or 0 for p in (25, 75)}
    assert empty[25] == pytest.approx(0.25 * 10, abs=2.5)
    assert empty[75] == pytest.approx(0.75 * 10, abs=2.5)
    with pytest.raises(InputError, match="no obs column 'fold'"):
        subset_embedding.main(replace(config, split="fold"))


def test_bench_vae_step():
    config = vae_step.BenchVAEStepConfig(cells=2, n_genes=60, n_given=20, n_asked=40, model=SMALL, repeats=1)
    rows = {row.name: row.value for row in vae_step.main(config).rows}
    assert rows["factorised"] > 0
    assert rows["plain / factorised, time"] > 0
    assert rows["auto, here factorised, / the fastest way, time"] >= 1


def test_a_bench_that_is_ended_leaves_the_rows_it_had(tmp_path, monkeypatch):
    def ended(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(vae_step, "measure_in_turn", ended)
    path = tmp_path / "folder" / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        vae_step.main(vae_step.BenchVAEStepConfig(2, 60, 20, 20, model=SMALL, save=str(path)))
    (first, *_) = json.loads(path.read_text())["rows"]
    assert first["name"] == "large matrix product"


def test_backward_passes_are_as_engines_run_them(monkeypatch):
    """In bf16 with TF32 beside it, but for the published network; in float32 without."""
    seen = []

    def backward(loss: Tensor) -> None:
        seen.append(torch.backends.cuda.matmul.allow_tf32)

    monkeypatch.setattr(Tensor, "backward", backward)
    cpu = torch.device("cpu")
    for precision, way in (("bf16", FACTORISED), ("bf16", vae_step.PUBLISHED), ("fp32", FACTORISED)):
        vae_step.calls_of(vae_step.BenchVAEStepConfig(2, 60, 20, 20, model=SMALL, precision=precision), way, cpu)[1]()
    assert seen == [True, False, False]
    seen.clear()
    work = train.vae_work(SMALL, 60, 20, 2, OptimConfig())
    for precision in ("bf16", "fp32"):
        config = mcab.BenchMCABConfig(2, n_genes=60, model=SMALL, precision=precision, repeats=1)
        mcab.cross_attention(Report("mcab"), config, "pooling", 20, 1.0, cpu)
        assert set(seen) == {precision == "bf16"}
        seen.clear()
        train.bare(work, precision, 3, cpu)
        assert set(seen) == {precision == "bf16"}
        seen.clear()


def test_compiled_blocks_are_a_way_of_their_own(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(vae_step, "as_way", lambda way, call, device: call)  # the whole network is not compiled here
    config = vae_step.BenchVAEStepConfig(2, 60, 20, 20, model=SMALL, compile=True, repeats=1)
    rows = {row.name: row.value for row in vae_step.main(config).rows}
    assert len(compiled) == 2, "the encoder's block and the decoder's, of one way"
    assert (rows["auto, here factorised, / auto, compiled, time"] or 0) > 0


def test_torchs_fused_attention_is_told_from_the_formula():
    q = torch.ones(1, 2, 8, 16)
    attend = torch.nn.functional.scaled_dot_product_attention
    for dropout, ran in ((0.0, 1), (0.5, 0)):  # no fused kernel of a CPU drops
        row = vae_step.torchs_fused_attention(partial(attend, q, q, q, dropout_p=dropout), torch.device("cuda"))
        assert (row.value, row.met) == (ran, bool(ran))


def test_knn_accuracy_leaves_the_cell_itself_out():
    import numpy as np

    rng = np.random.default_rng(0)
    label = np.repeat(["a", "b"], 40)
    apart = rng.normal(size=(80, 3)) + 20 * (label == "b")[:, None]
    assert knn_accuracy(apart, apart, label) == 1
    alone = np.array(["a"] * 79 + ["b"])  # the only one of its label finds no other
    assert knn_accuracy(apart, apart, alone) == 79 / 80
