"""The benchmarks of the model at a small size: every way runs on the same inputs, and what they print can be read."""

from __future__ import annotations

import json

from launch.bench import mcab, vae_step
from scldm.model.vae import VAEConfig

SMALL = VAEConfig(width=16, n_latents=4, n_layers=1, n_heads=2)


def test_bench_mcab(tmp_path, capsys):
    config = mcab.BenchMCABConfig(
        n_given=50, n_genes=400, cells_encoded=3, model=SMALL, repeats=1, save=str(tmp_path / "rows.json")
    )
    mcab.main(config)
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["all genes, largest difference of a latent"]["value"] < 1e-4
    assert rows["pooling, plain / factorised, time"]["target"] == ">= 2"
    assert "all genes, encode, expressed genes" in capsys.readouterr().out


def test_bench_vae_step(capsys):
    config = vae_step.BenchVAEStepConfig(cells=2, n_genes=60, n_given=20, n_asked=40, model=SMALL, repeats=1, json=True)
    report = vae_step.main(config)
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed["rows"]] == [row.name for row in report.rows]
    assert {row.name: row for row in report.rows}["factorised"].value > 0
