"""The benchmark of generation on a small model: every row is there, and the controls are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import scldm
from benchmarks import generate as bench
from benchmarks import generate_random as bench_random
from launch.cli import main, run
from scldm.errors import InputError
from scldm.flow.generate import generate_latents
from scldm.flow.sampler import SamplerConfig
from scldm.library_size import LibrarySizeModel, LogNormal
from scldm.model.dit import DiT, DiTConfig
from scldm.model_folder import save_pretrained
from scldm.vocab import ConditionVocab, GeneVocab
from tests.launch.small_verbs import LABELS, write_cells
from tests.scldm.train.small_runs import LATENT_WIDTH, N_GENES, N_LATENTS, make_vae


def dit() -> DiT:
    torch.manual_seed(0)
    made = DiT(DiTConfig(16, 1, 2), N_LATENTS, LATENT_WIDTH, {"type": len(LABELS)}).eval()
    for parameter in made.parameters():
        parameter.data.normal_(std=0.1)
    return made


@pytest.mark.slow
def test_every_row_and_target_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cells(tmp_path / "cells.h5ad")
    words = [f"source.paths={tmp_path}/cells.h5ad", f"out={tmp_path}/shards", "conditions=type", "block_cells=32"]
    assert main(["shards", "write", *words, "split.validation=0.3", "split.test=0.2"]) == 0
    genes = GeneVocab(tuple(f"gene{k}" for k in range(N_GENES)), "symbol")
    labels = tuple(sorted(LABELS.tolist()))
    fitted = {(): {(): LogNormal(9, 6.0, 0.2)}, ("type",): {(label,): LogNormal(9, 6.0, 0.2) for label in labels}}
    sizes = LibrarySizeModel(("type",), fitted)
    save_pretrained(tmp_path / "model", make_vae(), dit(), genes, ConditionVocab({"type": labels}), sizes, {})
    monkeypatch.setattr(bench, "HEUN_100", SamplerConfig("heun", 3))
    few = ["cells=8", "repeats=1", "steps=2", "sampler.n_steps=2", "bootstrap=5", "memory=false", "condition=type"]
    words = [f"model={tmp_path}/model", f"shards={tmp_path}/shards", f"save={tmp_path}/rows.json", *few]
    assert run("generate", "benchmarks.generate", words) == 0
    rows: dict[str, Any] = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    with_target = {name for name, row in rows.items() if row["target"]}
    assert with_target == {
        "network: few steps against the reference's recipe",
        "whole: few steps against the reference's recipe",
        "whole: few steps against 50 plain steps of Heun",
        "MMD2, few steps",
        "W2, few steps",
        "base DiT, 70m VAE, 3,699 genes, few steps, on an H100-class GPU: not measured on a GPU",
    }
    assert rows["network calls of the reference's recipe"]["value"] % 3 == 0


@pytest.mark.heavy
@pytest.mark.parametrize("target", [bench_random.TARGET, ("tiny", "tiny", 60)])
def test_random_weights_generate_at_any_size(target: tuple[str, str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_random, "TARGET", target)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    few = SamplerConfig("euler", 1)
    words = {"random": "tiny", "random_ldm": "tiny", "genes": 60, "batch": (2, 5), "precision": ("float32",)}
    report = bench.main(bench.BenchGenerateConfig(**words, sampler=few, repeats=1, compile=True))  # pyright: ignore[reportArgumentType]
    rows = {row.name: row for row in report.rows}
    for n in (2, 5):
        found = rows.pop(f"random weights, whole, few steps, batch {n}, float32").value
        assert found is not None
        assert found > 0
        rows.pop(f"random weights, whole, few steps, batch {n}, float32: peak memory")
    assert compiled, "the transformer's blocks, once more at the faster of both"
    names = [name for name in rows if name.endswith(("compiled", "compiled: peak memory"))]
    values = {name: rows.pop(name).value for name in names}
    assert all(value is not None and (value > 0 or "memory" in name) for name, value in values.items())
    assert len(names) == 2
    judged = "base DiT, 70m VAE, 3,699 genes, few steps, on an H100-class GPU: not measured on a GPU"
    assert {name: (row.value, row.target) for name, row in rows.items()} == (
        {judged: (None, ">= 2000")} if target[0] == "tiny" else {}
    )
    assert report.settings["genes"] == 60


def test_random_weights_draw_cells_as_sparse_as_real_ones() -> None:
    with bench_random.random_atlas("tiny", "tiny", 2_000) as folder:
        model = scldm.load(folder)
        cells = model.generate(pd.DataFrame({"cell_type": ["type 3"] * 4}), seed=0, sampler=SamplerConfig("euler", 1))
    counts = cells.X.toarray()
    assert 1_000 < counts.sum(1).mean() < 20_000
    assert 0.05 < (counts > 0).mean() < 0.7


@pytest.mark.heavy
def test_the_reference_recipe_follows_the_flow_that_it_is_compared_on() -> None:
    network, numbers = dit(), torch.arange(5)
    conditions = {"type": torch.tensor([0, 1, 2, 0, 1])}
    found, n_calls = bench.reference_latents(network, conditions, numbers, torch.ones(5))
    expected = generate_latents(network, conditions, numbers, 0, SamplerConfig("heun", 400)).latent_BLZ
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
    assert n_calls >= 3 * 7


def test_dense_counts_have_the_expected_mean() -> None:
    torch.manual_seed(0)
    vae = make_vae().eval()
    latent = torch.randn(1, N_LATENTS, LATENT_WIDTH).expand(3_000, -1, -1)
    ids, size = torch.arange(1, N_GENES + 1), torch.full((3_000,), 400.0)
    counts = bench.dense_counts(vae, latent, ids, size)
    with torch.no_grad():
        predicted = vae.decode(latent[:1], ids)
    assert predicted.dispersion is not None
    mu, theta = predicted.mu(size[:1])[0].numpy(), predicted.dispersion.detach().numpy()
    spread = np.sqrt((mu + mu**2 / theta) / len(counts))
    assert (np.abs(counts.mean(0) - mu) < 4.5 * spread).all()


def test_the_peak_is_the_childs_own() -> None:
    """The command line starts without torch, which this process has loaded."""
    assert 5 << 20 < bench.peak_of(["--help"]) < 200 << 20
    with pytest.raises(InputError, match="scldm generte failed: .*unknown verb 'generte'"):
        bench.peak_of(["generte"])
