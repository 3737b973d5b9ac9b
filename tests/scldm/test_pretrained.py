"""A model folder as a scientist uses it: what was saved is loaded and embeds; damage and wrong cells are refused."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import scldm
from scldm.batch import GeneCounts
from scldm.errors import InputError
from scldm.given_json import sealed
from scldm.model.vae import VAE, VAEConfig
from scldm.model_folder import save_pretrained
from scldm.networks import batch_on, precision_on
from scldm.pretrained import Pretrained
from tests.rounding import assert_rounded, error_of
from tests.scldm.small_model import CONDITIONS, GENES, G, L, Z, cells, library_sizes, networks

ROOT = Path(__file__).resolve().parent.parent.parent

# --- load ----------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(folder: Path, model: Pretrained) -> None:
    vae, dit = networks()
    for own, loaded in ((vae, model.vae), (dit, model.dit)):
        assert loaded is not None
        state = loaded.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in own.state_dict().items())
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
    assert (model.genes, model.conditions, model.library_sizes) == (GENES, CONDITIONS, library_sizes())
    assert model.origin == {"from": "a test"}
    assert sorted(p.name for p in folder.iterdir()) == [
        "conditions.json", "config.json", "genes.json", "library_sizes.json", "model.safetensors",
    ]  # fmt: skip


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "name, harm, said",
    [
        ("model.safetensors", truncate, "model.safetensors is damaged"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("config.json", truncate, "config.json is damaged"),
        ("config.json", Path.unlink, "is not a model folder: it has no config.json"),
        ("config.json", lambda p: p.write_text('{"format_version": 99}'), "format version 99. This scldm reads 4"),
        ("config.json", lambda p: p.write_text(p.read_text().replace('"width": 16', '"width": 32')), "its SHA-256"),
        ("genes.json", truncate, "genes.json is damaged"),
        ("genes.json", lambda p: p.write_text(p.read_text().replace("ENSG00001", "ENSG1")), "hash"),
        ("conditions.json", lambda p: p.write_text('{"type": ["a"], "donor": ["b"]}'), "belong together"),
        ("library_sizes.json", truncate, "library_sizes.json is damaged"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(folder: Path, tmp_path: Path, name: str, harm, said: str) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    harm(copy / name)
    with pytest.raises(InputError, match=said) as refusal:
        scldm.load(copy)
    assert str(copy) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def sealed_again(path: Path, change) -> None:
    """Change a config and make its hash agree, as one that means ill would."""
    config = json.loads(path.read_text())
    change(config)
    del config["sha256"]
    config["sha256"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "net, key, value, said",
    [
        ("vae", "width", 1 << 20, "a network of this config has more numbers than the weights"),
        ("vae", "n_latents", 1 << 60, "a network of this config has more numbers than the weights"),
        ("vae", "n_layers", 10**7, "a network of this config has more numbers than the weights"),
        ("ldm", "n_layers", 10**7, "a network of this config has more numbers than the weights"),
        ("vae", "n_layers", 2, "belong together: decoder.1.* is missing, the network has float32"),
        ("vae", "width", "16", "vae.width is '16', must be a whole number"),
        ("vae", "width", True, "vae.width is True, must be a whole number"),
        ("vae", "kl_weight", float("nan"), "vae.kl_weight is nan, must be a finite number"),
        ("vae", "token", "tokens", "vae.token is 'tokens', must be one of bins, linear"),
        ("ldm", "continuous", {"type": "log"}, "model.continuous.type: no values"),
        ("vae", "depth", 2, "key 'vae.depth' is unknown"),
    ],
)
def test_a_config_of_others_is_refused_before_anything_is_made(
    folder: Path, tmp_path: Path, net: str, key: str, value: Any, said: str
) -> None:
    """A width of 2^20 took 3.3 GB, and ten million layers were built for ever."""
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    sealed_again(copy / "config.json", lambda config: config[net].__setitem__(key, value))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=said) as refusal:
        scldm.load(copy)
    assert str(copy) in str(refusal.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_every_flipped_bit_of_the_weights_is_seen(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    path = copy / "model.safetensors"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    n_header = int.from_bytes(whole[:8], "little")
    for at in rng.integers(8 + n_header, len(whole), 12):
        harmed = bytearray(whole)
        harmed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(harmed)
        with pytest.raises(InputError, match=r"model.safetensors: (its weights are not those|.* not finite)"):
            scldm.load(copy)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Exported as they were: the hash is theirs. A NaN drew integer counts all the same."""
    vae, dit = networks()
    dit.to_velocity.weight.data[0, 0] = torch.nan
    save_pretrained(tmp_path / "model", vae, dit, GENES, CONDITIONS, library_sizes(), {})
    with pytest.raises(InputError, match=r"model.safetensors: to_velocity.weight has numbers that are not finite"):
        scldm.load(tmp_path / "model")


def test_a_folder_without_a_hash_of_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    """What nothing vouches for: its vocabularies may be another model's."""
    path = Path(shutil.copytree(folder, tmp_path / "model")) / "config.json"
    config = json.loads(path.read_text())
    for key in ("sha256", "weights"):
        without = {name: of for name, of in config.items() if name not in (key, "sha256")}
        path.write_text(json.dumps(without if key == "sha256" else sealed(without)))
        with pytest.raises(InputError, match=f"config.json: (it has no sha256 of its own|key '{key}' is missing)"):
            scldm.load(path.parent)


def test_only_a_model_folder_is_replaced_and_nothing_beside_it(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    for name in ("model.old", "model.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    save_pretrained(copy, networks()[0], None, GENES, CONDITIONS, library_sizes(), {"from": "again"})
    assert scldm.load(copy).origin == {"from": "again"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.old", "model.partial"]
    assert all((tmp_path / name / "thesis.txt").is_file() for name in ("model.old", "model.partial"))
    (copy / "notes.md").write_text("mine")
    with pytest.raises(InputError, match="holds notes.md, which is none of a model's files"):
        save_pretrained(copy, networks()[0], None, GENES, CONDITIONS, library_sizes(), {})
    assert (copy / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("umask", [0o022, 0o027], ids=oct)
def test_colleagues_can_read_a_model_as_far_as_umask_lets_them(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_pretrained(tmp_path / "model", networks()[0], None, GENES, CONDITIONS, library_sizes(), {})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes.pop("model.safetensors") == 0o666 & ~umask
    assert set(modes.values()) == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~umask


def test_an_autoencoder_alone_embeds_and_says_that_it_does_not_generate(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "model", networks()[0], None, GENES, CONDITIONS, library_sizes(), {})
    model = scldm.load(tmp_path / "model")
    assert model.embed(cells(3)).shape == (3, L * Z)
    with pytest.raises(InputError, match="embeds, but does not generate"):
        model.generate(pd.DataFrame(index=range(2)), seed=0)


@pytest.mark.parametrize("kind", ["plain", "sdpa", "fused"])
def test_it_embeds_by_the_factorised_path_however_it_was_trained(tmp_path: Path, model: Pretrained, kind) -> None:
    vae = networks()[0]
    trained = VAE(replace(vae.config, attention=kind), GENES.n_genes)
    trained.load_state_dict(vae.state_dict())
    save_pretrained(tmp_path / "model", trained, None, GENES, CONDITIONS, library_sizes(), {})
    loaded = scldm.load(tmp_path / "model")
    assert loaded.vae.config.attention == "auto"
    np.testing.assert_array_equal(loaded.embed(cells(3)), model.embed(cells(3)))


# --- embed ---------------------------------------------------------------------------------------------------------


def test_an_embedding_is_the_posterior_means_tokens_in_order(model: Pretrained) -> None:
    adata = cells()
    flat, mean = model.embed(adata), model.embed(adata, pool="mean")
    assert (flat.shape, flat.dtype, mean.shape) == ((70, L * Z), np.float32, (70, Z))
    given = GeneCounts(torch.arange(1, G + 1), torch.from_numpy(adata.X.toarray()))
    expected = model.vae.encode(given).mean_BLZ.numpy()
    error = error_of(model.vae, lambda vae: vae.encode(given).mean_BLZ)
    assert_rounded(flat.reshape(70, L, Z), expected, error)
    assert_rounded(mean, expected.mean(1), error)
    assert np.abs(flat[0] - flat[1]).max() > 0.01


def error_of_embedding(model: Pretrained) -> float:
    """What rounding does to the latents of these cells."""
    given = GeneCounts(torch.arange(1, G + 1), torch.from_numpy(cells().X.toarray()))
    return error_of(model.vae, lambda vae: vae.encode(given).mean_BLZ)


def test_order_of_genes_unknown_genes_and_the_batch_change_nothing(model: Pretrained) -> None:
    adata = cells()
    expected = model.embed(adata)
    order = np.random.default_rng(1).permutation(G)
    other: Any = ad.concat(
        [
            adata,
            ad.AnnData(
                sp.csr_matrix(np.full((70, 2), 7.0)), obs=adata.obs, var=pd.DataFrame(index=pd.Index(["x", "y"]))
            ),
        ],
        axis=1,
    )
    other = other[:, [*(adata.var_names[order]), "x", "y"]].copy()
    assert_rounded(model.embed(other), expected, error_of_embedding(model))
    model = replace(model, batch=9)
    dense: Any = ad.AnnData(other.X.toarray().astype(np.int64), var=other.var)
    dense.layers["counts"] = dense.X
    dense.X = dense.X / 3
    assert_rounded(model.embed(dense, layer="counts"), expected, error_of_embedding(model))


def test_bfloat16_is_near_and_is_written_down(model: Pretrained) -> None:
    """8 bits of a number: near, but not the same, and none of what is returned is of that precision."""
    coarse, adata = replace(model, precision="bfloat16", batch=32), cells()
    fine, found = model.embed(adata), coarse.embed(adata)
    assert found.dtype == np.float32
    assert 1e-4 < np.abs(found - fine).max() < 0.1
    expected, made = model.reconstruct(adata), coarse.reconstruct(adata)
    assert made.X.dtype == np.float32
    assert 1e-4 < np.abs(made.X / expected.X - 1).max() < 0.05
    np.testing.assert_allclose(made.obs["log_likelihood"], expected.obs["log_likelihood"], rtol=1e-2)
    kept = {
        "version": scldm.__version__,
        "verb": "reconstruct",
        "model": model.hash,
        "batch": 32,
        "precision": "bfloat16",
        "attention": "factorised",
    }
    assert made.uns["scldm"] == kept | {"genes_matched": 30, "genes_of_model": 30, "genes_of_file": 30}


@pytest.mark.parametrize(
    "more, said",
    [
        ({"batch": 0}, "batch=0 must be a whole number, at least 1"),
        ({"precision": "bf16"}, "precision='bf16' must be one of"),
    ],
)
def test_a_batch_or_precision_that_is_none_is_refused(folder: Path, more: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        scldm.load(folder, **more)


def test_a_gpus_batch_is_a_share_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 36,130 genes a cell takes 73 MB, traced (vae/20m, 64 cells). 39 of it are tiles. 74 are planned."""
    vae = SimpleNamespace(n_genes=36_130, config=VAEConfig(width=256, n_latents=64))
    for memory, n_cells in ((80e9, 256), (79e9, 256), (40e9, 128), (8e9, 16), (1e6, 1)):
        there = SimpleNamespace(total_memory=int(memory))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, there=there: there)
        assert batch_on("cuda:1", cast(Any, vae)) == n_cells
    few = SimpleNamespace(n_genes=50, config=vae.config)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    assert batch_on("cuda", cast(Any, few)) == 1_024
    assert batch_on("cpu", cast(Any, vae)) == 64


def test_a_gpu_that_has_bfloat16_computes_in_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scldm.load(folder).precision == precision_on("cpu", "auto") == "float32"
    for capability, taken in (((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        assert precision_on("cuda:1", "auto") == taken
        assert precision_on("cuda:1", "float32") == "float32"


def test_cells_without_a_count_can_be_told_and_left_out(model: Pretrained) -> None:
    adata = with_empty_cell()
    counted_n = model.counted(adata)
    assert counted_n.tolist() == [k != 2 for k in range(70)]
    others = np.delete(model.embed(cells()), 2, axis=0)
    assert_rounded(model.embed(adata[counted_n]), others, error_of_embedding(model))


def test_a_users_own_log_likelihood_is_not_overwritten(model: Pretrained) -> None:
    adata = model.reconstruct(cells(4))
    adata.X = cells(4).X
    with pytest.raises(InputError, match="obs has a column 'log_likelihood' already"):
        model.reconstruct(adata)


def test_missing_genes_make_the_set_smaller(model: Pretrained) -> None:
    """They are not zeros: a file without a gene says nothing about it."""
    adata = cells()
    part: Any = adata[:, :20].copy()
    given = GeneCounts(torch.arange(1, 21), torch.from_numpy(part.X.toarray()))
    expected = model.vae.encode(given).mean_BLZ.numpy()
    error = error_of(model.vae, lambda vae: vae.encode(given).mean_BLZ)
    assert_rounded(model.embed(part).reshape(70, L, Z), expected, error)


def with_value(value: float) -> Any:
    adata = cells()
    adata.X[3, 4] = value
    return adata


def of_other_genes() -> Any:
    adata = cells()
    adata.var_names = [f"gene{k}" for k in range(G)]
    return adata


def of_doubled_genes() -> Any:
    return ad.AnnData(cells().X, var=pd.DataFrame(index=pd.Index([GENES.ids[0], *GENES.ids[:-1]])))


def in_layers(**factors: float) -> Any:
    """The cells, with their counts times a factor in each of these matrices."""
    counts, obs, var = cells().X, cells().obs, cells().var
    made = ad.AnnData(counts * factors["X"], obs=obs, var=var)
    made.layers = {n[7:]: counts * factor for n, factor in factors.items() if n.startswith("layers/")}
    if "raw/X" in factors:
        made.raw = ad.AnnData(counts * factors["raw/X"], obs=obs, var=var)
    return made


@pytest.mark.parametrize(
    "there, layer",
    [
        ({"X": 0.5, "layers/counts": 1}, None),
        ({"X": 0.5, "raw/X": 1}, None),
        ({"X": 1, "raw/X": 1}, None),
        ({"X": 1, "layers/a": 0.5}, "X"),
        ({"X": 2, "layers/a": 1}, "a"),
        ({"X": 2, "layers/a": 1}, "layers/a"),
        ({"X": 2, "raw/X": 1}, "raw"),
        ({"X": 2, "raw/X": 1}, "raw/X"),
        ({"X": 2, "layers/raw": 1}, "raw"),
        ({"X": 2, "layers/raw": 3, "raw/X": 1}, "raw"),
        ({"X": 2, "layers/raw": 1, "raw/X": 3}, "layers/raw"),
    ],
)
def test_counts_are_found_where_they_are(model: Pretrained, there: dict[str, float], layer: str | None) -> None:
    found = in_layers(**there)
    np.testing.assert_array_equal(model.embed(found, layer=layer), model.embed(cells()))
    assert model.matched(found, layer).n_matched == model.matched(cells()).n_matched


def with_empty_cell() -> Any:
    """Its zeros are stored, as some files do."""
    adata = cells()
    adata.X.data[adata.X.indptr[2] : adata.X.indptr[3]] = 0
    return adata


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize(
    "adata, layer, said",
    [
        (lambda: with_value(-1), None, "X holds -1, which is not a count"),
        (lambda: with_value(0.5), None, "X holds 0.5, which is not a count"),
        (lambda: with_value(np.nan), None, "X holds nan"),
        (lambda: with_value(np.inf), None, "X holds inf"),
        (
            lambda: ad.AnnData(
                obs=pd.DataFrame(index=pd.Index(["c"])), var=pd.DataFrame(index=pd.Index([GENES.ids[0]]))
            ),
            None,
            "X is empty",
        ),
        (cells, "counts", "layer 'counts' is not there. There are X"),
        (
            lambda: in_layers(X=0.5, **{"layers/a": 1}),
            None,
            r"X holds \d\.5, .* a count. Give raw counts, or name",
        ),
        (lambda: in_layers(X=1, **{"raw/X": 2}), None, "X and raw/X hold counts and differ. Name one, as layer=X"),
        (
            of_other_genes,
            None,
            "0 of 30 genes matched .0 %., and at least 10 % are needed .min_gene_share=0.1.. They are",
        ),
        (of_doubled_genes, None, "gene 'ENSG00000' stands twice"),
        (lambda: cells()[:0].copy(), None, "there are no cells"),
        (lambda: cells().to_df(), None, "adata is of type DataFrame. It must be an AnnData"),
        (lambda: "cells.h5ad", None, "adata is of type str. It must be an AnnData"),
        (with_empty_cell, None, "1 of 70 cells have no count"),
    ],
)
def test_what_can_not_be_embedded_is_said_in_one_line(model: Pretrained, adata, layer: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said) as refusal:
        model.embed(adata(), layer=layer)
    assert "\n" not in str(refusal.value)


@pytest.mark.heavy
def test_load_embed_and_generate_import_nothing_of_the_training_stack(folder: Path) -> None:
    code = f"""
import json, sys, anndata, numpy, pandas, scldm
from scldm.flow.sampler import SamplerConfig
model = scldm.load({str(folder)!r})
made = model.generate(pandas.DataFrame({{"type": ["T cell"] * 3}}), seed=0, sampler=SamplerConfig("euler", 2))
model.embed(made)
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unwanted = {"deepspeed", "mlflow", "tiledbsoma", "cellxgene_census", "webdataset", "data_pipeline", "launch"}
    assert not unwanted & set(json.loads(done.stdout))


@pytest.mark.parametrize("policy", ["expressed", "expressed_plus_zeros"])
def test_an_autoencoder_of_expressed_genes_is_not_given_all(model: Pretrained, policy: str) -> None:
    """Which would be another function than the one that was trained."""
    run = {"data": {"given": {"policy": policy}}}
    other = replace(model, origin={"vae": {"config": run}})
    for use in (other.embed, other.reconstruct, lambda adata: other.transform(adata, {"type": "NK"}, by=["type"])):
        adata = cells(3)
        adata.obs["type"] = "T cell"
        with pytest.raises(InputError, match=f"trained with data.given.policy={policy} and is given all genes"):
            use(adata)


def test_a_gaussian_panel_is_judged_with_what_the_whole_cell_is_expected_to_have(model: Pretrained) -> None:
    """Genes that a file lacks do not change what is expected of the others. Of shares the panel's total is the sum."""
    vae = VAE(replace(model.vae.config, likelihood="gaussian"), G).eval().requires_grad_(False)
    torch.manual_seed(0)
    vae.head.weight.data.normal_(std=0.3)
    latent_BLZ, every = torch.randn(3, L, Z), torch.arange(1, G + 1)
    whole_B = torch.tensor([500.0, 900.0, 2_000.0])
    counts_BG = vae.decode(latent_BLZ, every).expected(whole_B)
    total_B, panel = counts_BG.sum(1), every[::3]
    part_B = counts_BG[:, panel - 1].sum(1)
    torch.testing.assert_close(vae.library_size_B(part_B, latent_BLZ, panel), total_B)
    assert vae.library_size_B(total_B, latent_BLZ, every) is total_B
    assert model.vae.library_size_B(part_B, latent_BLZ, panel) is part_B
