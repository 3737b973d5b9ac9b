"""A model folder as a scientist uses it: load, embed, generate, and every way to ask for what it can't do."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import scldm
from scldm import draws, pretrained
from scldm.batch import GeneCounts
from scldm.errors import InputError
from scldm.flow.generate import SamplerConfig
from scldm.flow.wanted import distinct
from scldm.library_size import LibrarySizeModel, LogNormal
from scldm.model.dit import DiT, DiTConfig
from scldm.model.vae import VAE, Predicted, VAEConfig
from scldm.pretrained import Pretrained, save_pretrained, written
from scldm.vocab import ConditionVocab, GeneVocab

ROOT = Path(__file__).resolve().parent.parent.parent
G, L, Z = 30, 3, 4
GENES = GeneVocab(tuple(f"ENSG{k:05d}" for k in range(G)), "ensembl")
CONDITIONS = ConditionVocab({"type": ("T cell", "B cell", "NK"), "donor": ("d1", "d2")})
FEW = SamplerConfig("euler", 3)


def library_sizes() -> LibrarySizeModel:
    """Fitted for T and B cells and both donors, and for T cells of d1 alone: nobody saw an NK cell."""
    of = {(): {(): LogNormal(9, 6.0, 0.2)}, ("type",): {}, ("donor",): {}, ("type", "donor"): {}}
    of["type",] = {("T cell",): LogNormal(5, 5.0, 0.1), ("B cell",): LogNormal(4, 7.0, 0.1)}
    of["donor",] = {("d1",): LogNormal(5, 5.0, 0.1), ("d2",): LogNormal(4, 7.0, 0.1)}
    of["type", "donor"] = {("T cell", "d1"): LogNormal(5, 5.0, 0.1)}
    return LibrarySizeModel(("type", "donor"), of)


def networks() -> tuple[VAE, DiT]:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(16, L, Z, 1, 2, 1, 0.01), G).eval()
    dit = DiT(DiTConfig(16, 1, 2), L, Z, {name: CONDITIONS.n_labels(name) for name in CONDITIONS.names}).eval()
    for network in (vae, dit):
        for name, parameter in network.named_parameters():
            if "log_theta" not in name:
                parameter.data.normal_(std=0.3)
    vae.gene_embedding.weight.data[0] = 0
    dit.latent_mean_LZ += 0.5
    return vae, dit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model"
    vae, dit = networks()
    save_pretrained(path, vae, dit, GENES, CONDITIONS, library_sizes(), {"from": "a test"})
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Pretrained:
    return scldm.load(folder)


def cells(n: int = 70) -> Any:
    counts = np.random.default_rng(0).poisson(2, (n, G)).astype(np.float32)
    counts[:, 0] += 1
    return ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=pd.Index(GENES.ids)))


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
        ("config.json", lambda p: p.write_text('{"format_version": 99}'), "format version 99; this scldm reads 2"),
        ("config.json", lambda p: p.write_text(p.read_text().replace('"width": 16', '"width": 32')), "belong together"),
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


def test_an_autoencoder_alone_embeds_and_says_that_it_does_not_generate(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "model", networks()[0], None, GENES, CONDITIONS, library_sizes(), {})
    model = scldm.load(tmp_path / "model")
    assert model.embed(cells(3)).shape == (3, L * Z)
    with pytest.raises(InputError, match="embeds, but does not generate"):
        model.generate(pd.DataFrame(index=range(2)), seed=0)


# --- embed ---------------------------------------------------------------------------------------------------------


def test_an_embedding_is_the_posterior_means_tokens_in_order(model: Pretrained) -> None:
    adata = cells()
    flat, mean = model.embed(adata), model.embed(adata, pool="mean")
    assert (flat.shape, flat.dtype, mean.shape) == ((70, L * Z), np.float32, (70, Z))
    given = GeneCounts(torch.arange(1, G + 1), torch.from_numpy(adata.X.toarray()))
    expected = model.vae.encode(given).mean_BLZ.numpy()
    np.testing.assert_allclose(flat.reshape(70, L, Z), expected, atol=1e-5)
    np.testing.assert_allclose(mean, expected.mean(1), atol=1e-5)
    assert np.abs(flat[0] - flat[1]).max() > 0.01


def test_order_of_genes_unknown_genes_and_the_batch_change_nothing(
    model: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    np.testing.assert_allclose(model.embed(other), expected, atol=1e-5)
    monkeypatch.setattr(pretrained, "BATCH_CELLS", 9)
    dense: Any = ad.AnnData(other.X.toarray().astype(np.int64), var=other.var)
    dense.layers["counts"] = dense.X
    dense.X = dense.X / 3
    np.testing.assert_allclose(model.embed(dense, layer="counts"), expected, atol=1e-5)


def test_missing_genes_make_the_set_smaller(model: Pretrained) -> None:
    """They are not zeros: a file without a gene says nothing about it."""
    adata = cells()
    part: Any = adata[:, :20].copy()
    given = GeneCounts(torch.arange(1, 21), torch.from_numpy(part.X.toarray()))
    np.testing.assert_allclose(model.embed(part).reshape(70, L, Z), model.vae.encode(given).mean_BLZ.numpy(), atol=1e-5)


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
        (cells, "counts", "layer 'counts' is not there; there are X"),
        (of_other_genes, None, "none of the 30 genes .such as 'gene0'. is among the model's 30 .such as 'ENSG00000'"),
        (of_doubled_genes, None, "gene 'ENSG00000' stands twice"),
        (lambda: cells()[:0].copy(), None, "no cells to embed"),
        (with_empty_cell, None, "1 of 70 cells have no count"),
    ],
)
def test_what_can_not_be_embedded_is_said_in_one_line(model: Pretrained, adata, layer: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said) as refusal:
        model.embed(adata(), layer=layer)
    assert "\n" not in str(refusal.value)


# --- generate ------------------------------------------------------------------------------------------------------


def wanted(n: int = 10) -> pd.DataFrame:
    return pd.DataFrame({"type": ["T cell", "B cell"] * (n // 2)})


def test_generated_cells_are_integer_csr_with_categorical_obs_and_the_sources_ids(model: Pretrained) -> None:
    made: Any = model.generate(wanted(), seed=0, sampler=FEW)
    assert sp.issparse(made.X)
    assert made.X.format == "csr"
    assert np.issubdtype(made.X.dtype, np.integer)
    assert made.X.min() >= 0
    assert list(made.var_names) == list(GENES.ids)
    assert list(made.obs["type"]) == ["T cell", "B cell"] * 5
    assert list(made.obs["type"].cat.categories) == ["T cell", "B cell", "NK"]
    assert set(made.obs["donor"]) == {"not given"}
    # library sizes are those fitted: e^5 and e^7
    sizes = made.X.sum(1).A1 if hasattr(made.X.sum(1), "A1") else np.asarray(made.X.sum(1)).ravel()
    assert 90 < sizes[::2].mean() < 250
    assert 700 < sizes[1::2].mean() < 1_700


def test_the_same_seed_makes_the_same_cells_whatever_the_batch(
    model: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: Any = model.generate(wanted(), seed=3, sampler=FEW)
    monkeypatch.setattr(pretrained, "BATCH_CELLS", 3)
    again: Any = model.generate(wanted(), seed=3, sampler=FEW)
    assert (first.X != again.X).nnz == 0
    pd.testing.assert_frame_equal(first.obs, again.obs)
    # and whatever cells come after it, or which genes are written
    few: Any = model.generate(wanted(4), seed=3, sampler=FEW, genes=[GENES.ids[7], GENES.ids[2]])
    assert (few.X != first.X[:4][:, [7, 2]]).nnz == 0
    assert list(few.var_names) == [GENES.ids[7], GENES.ids[2]]
    assert few.uns["scldm"]["n_evaluations"] == 4 * 3
    other: Any = model.generate(wanted(), seed=4, sampler=FEW)
    assert (first.X != other.X).nnz > 20
    assert not np.allclose(first.obs["library_size"], other.obs["library_size"])


@pytest.mark.parametrize("kind", ["counts", "means"])
def test_rows_are_the_same_bit_for_bit_whatever_is_asked_for_with_them(
    model: Pretrained, kind: pretrained.Kind
) -> None:
    """A batch of 64 rows and one of 6 sum floats in another order: 64 x 6 is filled up."""
    n, columns = 2 * pretrained.BATCH_CELLS + 6, np.arange(G)[::-1]
    ticks: list[int] = []
    asked = model.check_conditions(wanted(n), seed=5)
    whole, n_evaluations_n = model.make(asked, range(n), columns, FEW, kind, ticks.append)
    assert n_evaluations_n.tolist() == [3] * n
    assert (whole.shape, sum(ticks), whole.dtype) == ((n, G), n, np.int32 if kind == "counts" else np.float32)
    parts = [(0, 64), (64, 134), (3, 70), (133, 134)]
    more = model.check_conditions(wanted(n + 40), seed=5)
    for low, high in parts:
        for of in (asked, more):
            part, _ = model.make(of, range(low, high), columns, FEW, kind, ticks.append)
            assert (part != whole[low:high]).nnz == 0
            np.testing.assert_array_equal(of.library_size(range(low, high)), asked.library_size(range(n))[low:high])


@pytest.mark.parametrize("kind", ["counts", "means"])
def test_ten_genes_asked_are_a_slice_of_all(model: Pretrained, kind: pretrained.Kind) -> None:
    """Bit for bit: shares are of all genes' total, and a gene's count is drawn by its own number."""
    n, columns = 2 * pretrained.BATCH_CELLS + 6, np.random.default_rng(0).permutation(G)[:10]
    asked = model.check_conditions(wanted(n), seed=7)
    whole, some = (model.make(asked, range(n), of, FEW, kind, lambda _: None).matrix for of in (np.arange(G), columns))
    assert some.nnz > n
    assert (some != whole[:, columns]).nnz == 0


def test_means_are_what_counts_are_drawn_from(model: Pretrained) -> None:
    table = pd.DataFrame({"type": ["T cell"] * 400, "library_size": 300.0})
    counts: Any = model.generate(table, seed=0, sampler=FEW)
    means: Any = model.generate(table, seed=0, sampler=FEW, kind="means", genes=GENES.ids[5:0:-1])
    assert means.X.dtype == np.float32
    assert list(means.var_names) == list(GENES.ids[5:0:-1])
    expected = means.X.toarray()
    assert expected.min() > 0
    drawn = counts[:, means.var_names].X.toarray()
    # the sum of 400 draws of NB(mu, theta) is off by its standard deviation, of which 4.5 are never seen
    theta = model.vae.log_theta.weight.exp().numpy()[[model.genes.index_of[g] for g in means.var_names], 0]
    spread = np.sqrt((expected + expected**2 / theta).sum(0))
    assert (np.abs(drawn.sum(0) - expected.sum(0)) < 4.5 * spread).all()


def test_a_table_is_held_as_its_distinct_rows(model: Pretrained) -> None:
    table = pd.DataFrame({"donor": ["d1", "d2", "d1", "d1"], "type": pd.Categorical(["NK", "NK", "B cell", "NK"])})
    code_n, labels = distinct(table)
    assert [tuple(labels.iloc[k]) for k in code_n] == list(zip(table["donor"], table["type"]))
    assert len(labels) == 3
    code_n, labels = distinct(pd.DataFrame(index=range(3)))
    assert (list(code_n), labels.shape) == ([0, 0, 0], (1, 0))


def test_own_library_sizes_are_taken_and_need_no_fit(model: Pretrained) -> None:
    table = pd.DataFrame({"type": ["NK"] * 4, "library_size": [50.0, 50, 5_000, 5_000]})
    made: Any = model.generate(table, seed=0, sampler=FEW)
    totals = np.asarray(made.X.sum(1)).ravel()
    assert totals[:2].max() < 250
    assert totals[2:].min() > 1_000
    assert list(made.obs["library_size"]) == [50, 50, 5_000, 5_000]


@pytest.mark.parametrize(
    "table, seed, said",
    [
        ({"typ": ["T cell"]}, 0, "condition 'typ' is unknown; the model knows type, donor"),
        ({"type": ["T cell", "t-cell"]}, 0, "condition 'type' has no label 't-cell'; nearest of its 3: 'T cell'"),
        ({"type": ["T cell", None]}, 0, "column type, row 1: no label"),
        ({"type": pd.Categorical(["T cell", None])}, 0, "column type, row 1: no label"),
        ({"type": ["NK"]}, 0, "no library sizes were fitted for type=NK"),
        ({"type": []}, 0, "the table of conditions is empty"),
        ({"library_size": [10.0, -1]}, 0, "column library_size must hold positive numbers"),
        ({"library_size": [10.0, np.nan]}, 0, "column library_size must hold positive numbers"),
        ({"library_size": ["many"]}, 0, "column library_size must hold positive numbers"),
        ({"type": ["T cell"]}, -1, "seed=-1"),
    ],
)
def test_what_can_not_be_generated_is_said_in_one_line(model: Pretrained, table: dict, seed: int, said: str) -> None:
    with pytest.raises(InputError, match=said) as refusal:
        model.generate(pd.DataFrame(table), seed=seed, sampler=FEW)
    assert "\n" not in str(refusal.value)


def test_an_untrained_combination_takes_the_library_sizes_of_its_parts_and_says_so(
    model: Pretrained, capsys: pytest.CaptureFixture
) -> None:
    """T cells of d2: T cells alone are 5 and donor 2 alone 4; donor 2 varies as little, so the first choice stays."""
    table = pd.DataFrame({"type": ["T cell", "T cell"], "donor": ["d2", "d1"]})
    made: Any = model.generate(table, seed=0, sampler=FEW)
    said = capsys.readouterr().err
    assert "library sizes of type=T cell, donor=d2: no training cell has this combination" in said
    assert "taken from the 5 with type=T cell" in said
    assert said.count("no training cell") == 1
    assert 90 < made.obs["library_size"].mean() < 250


def origin_of(**hidden: float) -> dict[str, Any]:
    return {"ldm": {"config": {"guidance": hidden}}}


@pytest.mark.parametrize(
    "hidden, table, sampler, said",
    [
        ((0.1, 0.0), {"type": ["T cell"]}, {}, "without the others, which the model never saw: .*drop_each=0"),
        ((0.1, 0.0), {"type": ["T cell"], "donor": ["d1"]}, {"guidance": "additive"}, "drop_each=0"),
        ((0.0, 0.0), {"type": ["T cell"], "donor": ["d1"]}, {"guidance_scale": 2.0}, "never saw: .*drop_all=0"),
        ((0.0, 0.0), {"library_size": [9.0]}, {}, "drop_all=0"),
        ((0.1, 0.1), {"type": ["T cell"]}, {"guidance": "compositional"}, "does not say which combinations"),
        (
            (0.1, 0.1),
            {"type": ["T cell"]},
            {"guidance": "additive", "guidance_weights": {"typ": 1.0}},
            "sampler.guidance_weights: condition 'typ' is unknown; the model knows type, donor",
        ),
    ],
)
def test_guidance_that_the_model_was_not_trained_for_is_refused(
    model: Pretrained, hidden: tuple, table: dict, sampler: dict, said: str
) -> None:
    asked = replace(model, origin=origin_of(drop_all=hidden[0], drop_each=hidden[1]))
    with pytest.raises(InputError, match=said):
        asked.generate(pd.DataFrame(table), seed=0, sampler=SamplerConfig("euler", 2, **sampler))
    # what it was trained for goes on
    both = pd.DataFrame({"type": ["T cell"], "donor": ["d1"]})
    assert asked.generate(both, seed=0, sampler=FEW).n_obs == 1


def test_conditions_dropped_one_by_one_were_at_times_all_dropped(model: Pretrained) -> None:
    """But for a model of one condition, which is dropped by drop_all alone."""
    asked = replace(model, origin=origin_of(drop_all=0.0, drop_each=0.1))
    guided = SamplerConfig("euler", 2, guidance_scale=2.0)
    assert asked.generate(pd.DataFrame({"type": ["T cell"], "donor": ["d1"]}), seed=0, sampler=guided).n_obs == 1
    torch.manual_seed(0)
    alone = replace(asked, dit=DiT(DiTConfig(16, 1, 2), L, Z, {"type": 3}))
    with pytest.raises(InputError, match="never saw: .*drop_all=0"):
        alone.generate(pd.DataFrame({"type": ["T cell"]}), seed=0, sampler=guided)


# --- conditions that are more than a label -------------------------------------------------------------------------


def of_doses(tmp_path: Path) -> Pretrained:
    """A model of dose (the last held out), type (known by vectors, one of which no cell had) and donor (the last held
    out), trained on three combinations."""
    donors = ("d1", "d2", "held out")
    vocab = ConditionVocab({"dose": ("0", "1.0", "10", "20"), "type": ("T cell", "B cell", "NK"), "donor": donors})
    torch.manual_seed(0)
    dit = DiT(
        DiTConfig(16, 1, 2, continuous={"dose": "log"}, combination_tokens=True),
        L,
        Z,
        {name: vocab.n_labels(name) for name in vocab.names},
        values={"dose": torch.tensor([0.0, 1.0, 10.0, 20.0])},
        features={"type": torch.randn(3, 5)},
        combinations_KC=torch.tensor([[2, 1, 1], [0, 0, 0], [1, 0, 0]]),
    )
    for parameter in dit.parameters():
        parameter.data.normal_(std=0.3)
    sizes: dict = {("donor",): {("d1",): LogNormal(20, 6.0, 0.2)}}
    sizes["dose", "type", "donor"] = {("1.0", "T cell", "d1"): LogNormal(20, 5.0, 0.2)}
    save_pretrained(tmp_path / "model", networks()[0], dit, GENES, vocab, LibrarySizeModel(vocab.names, sizes), {})
    return scldm.load(tmp_path / "model")


def test_values_and_labels_never_trained_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = of_doses(tmp_path)
    table = pd.DataFrame({"dose": ["1", "2.5"], "type": ["T cell", "NK"], "donor": ["d1", "d1"]})
    wanted = model.check_conditions(table, 0)
    assert wanted.ids["dose"].tolist() == [1.0, 2.5]
    # 1 is the label 1.0, so this combination has library sizes and a token; of the other only the donor is known
    assert [note.split(":")[0] for note in wanted.notes] == [
        "dose=2.5, type=NK, donor=d1", "library sizes of dose=2.5, type=NK, donor=d1",
    ]  # fmt: skip
    assert wanted.log_mean is not None
    assert wanted.log_mean.tolist() == [5.0, 6.0]
    made: Any = model.generate(table, seed=0, sampler=FEW)
    assert made.obs["dose"].tolist() == [1.0, 2.5]
    assert "no token of its own; it uses the sum" in capsys.readouterr().err
    none: Any = model.generate(table[["type"]].assign(library_size=9.0), seed=0, sampler=FEW)
    assert none.obs["dose"].isna().all()
    for dose, said in (("20", "20 lies beyond the values that were trained, 0 to 10"), ("high", "'high' is no number")):
        with pytest.raises(InputError, match=said):
            model.generate(table.assign(dose=dose), seed=0, sampler=FEW)
    with pytest.raises(InputError, match="condition 'donor': no training cell had the label 'held out'"):
        model.generate(table.assign(donor="held out"), seed=0, sampler=FEW)


@pytest.mark.parametrize("genes, said", [(["nix"], "gene 'nix' is not among"), ([GENES.ids[1]] * 2, "stands twice")])
def test_asked_genes_must_be_known_and_once(model: Pretrained, genes: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        model.generate(wanted(), seed=0, sampler=FEW, genes=genes)


def test_load_embed_and_generate_import_nothing_of_the_training_stack(folder: Path) -> None:
    code = f"""
import json, sys, anndata, numpy, pandas, scldm
from scldm.flow.generate import SamplerConfig
model = scldm.load({str(folder)!r})
made = model.generate(pandas.DataFrame({{"type": ["T cell"] * 3}}), seed=0, sampler=SamplerConfig("euler", 2))
model.embed(made)
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unwanted = {"deepspeed", "mlflow", "tiledbsoma", "cellxgene_census", "webdataset", "data_pipeline", "launch"}
    assert not unwanted & set(json.loads(done.stdout))


# --- transform -----------------------------------------------------------------------------------------------------

FINE = SamplerConfig("heun", 120)


def labelled_cells(n: int = 70) -> Any:
    adata = cells(n)
    adata.obs["type"] = pd.Categorical(["T cell", "B cell"] * (n // 2))
    adata.obs["batch"] = range(n)
    return adata


def test_cells_taken_to_their_own_condition_are_the_same_cells(model: Pretrained) -> None:
    """Then the latent is the cell's own, and what is expected is what `reconstruct` expects."""
    adata = labelled_cells()
    adata = adata[adata.obs["type"] == "T cell"].copy()
    stay: Any = model.transform(adata, {"type": "T cell"}, sampler=FINE, kind="means")
    expected = model.reconstruct(adata).X
    np.testing.assert_allclose(stay.X.toarray(), expected, rtol=1e-3)
    moved: Any = model.transform(adata, {"type": "NK"}, sampler=FINE, kind="means")
    assert np.abs(moved.X.toarray() / expected - 1).max() > 0.01
    assert set(moved.obs["type"]) == {"NK"}
    assert list(moved.obs["source"]) == list(adata.obs_names) == list(moved.obs_names)
    np.testing.assert_allclose(np.asarray(moved.X.sum(1)).ravel(), np.asarray(adata.X.sum(1)).ravel(), rtol=1e-4)


def test_between_two_conditions_cells_go_from_one_to_the_other(model: Pretrained) -> None:
    adata, alphas = labelled_cells(6), (0.0, 0.5, 1.0)
    way: Any = model.transform(adata, {"type": "NK"}, alphas=alphas, sampler=FINE, kind="means")
    assert list(way.obs["alpha"]) == [0.0] * 6 + [0.5] * 6 + [1.0] * 6
    assert list(way.obs["type"]) == list(adata.obs["type"]) + ["NK"] * 12
    assert way.obs_names[6] == "0-0.5"
    assert way.obs_names.is_unique
    assert list(way.obs["batch"]) == list(range(6)) * 3
    own, half, other = (way.X.toarray()[k : k + 6] for k in (0, 6, 12))
    np.testing.assert_allclose(own, model.reconstruct(adata).X, rtol=1e-3)
    far = np.linalg.norm(other - own)
    assert np.linalg.norm(half - own) < far
    assert np.linalg.norm(half - other) < far


def test_the_way_to_noise_is_gone_once_for_all_alphas(model: Pretrained) -> None:
    cost = model.transform(labelled_cells(4), {"type": "NK"}, alphas=(0, 0.5, 1), sampler=FEW).uns["scldm"]
    assert cost["n_evaluations"] == 4 * 3 * (1 + 1 + 2 + 1)  # there; back along the own, both, and the other
    alone: Any = model.transform(labelled_cells(4), {"type": "NK"}, sampler=FEW, seed=2)
    among: Any = model.transform(labelled_cells(4), {"type": "NK"}, alphas=(0, 0.5, 1), sampler=FEW, seed=2)
    assert (among.X[8:] != alone.X).nnz == 0


def test_a_combination_without_a_token_is_told_in_transform_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, adata = of_doses(tmp_path), cells(4)
    adata.obs = pd.DataFrame({"dose": "0", "type": "T cell", "donor": "d1"}, index=adata.obs_names)
    model.transform(adata, {"dose": "1"}, sampler=FEW)
    assert "token" not in capsys.readouterr().err
    model.transform(adata, {"dose": "2.5"}, sampler=FEW)
    said = [line for line in capsys.readouterr().err.splitlines() if "token" in line]
    assert len(said) == 1
    assert said[0].startswith("dose=2.5, type=T cell, donor=d1: this combination was not trained and has no token")


def test_transformed_counts_are_drawn_by_cell(model: Pretrained) -> None:
    adata = labelled_cells()
    some = [GENES.ids[k] for k in (5, 2, 9)]
    made: Any = model.transform(adata, {"type": "NK"}, sampler=FEW, seed=3, genes=some)
    assert (made.X.dtype, made.X.format, list(made.var_names)) == (np.int32, "csr", some)
    again: Any = model.transform(adata, {"type": "NK"}, sampler=FEW, seed=3, genes=some)
    assert (made.X != again.X).nnz == 0
    other: Any = model.transform(adata, {"type": "NK"}, sampler=FEW, seed=4, genes=some)
    assert (made.X != other.X).nnz > 20


@pytest.mark.parametrize(
    "to, more, said",
    [
        ({}, {}, "to names no condition"),
        ({"typ": "NK"}, {}, "condition 'typ' is unknown; the model knows type, donor"),
        ({"type": "NKT"}, {}, "condition 'type' has no label 'NKT'; nearest of its 3"),
        ({"donor": "d1"}, {}, "obs has no column 'donor'; it has type, batch"),
        ({"type": "NK"}, {"by": ["batch"]}, "condition 'batch' is unknown"),
        ({"type": "NK"}, {"by": []}, "by must name 'type' too"),
        ({"type": "NK"}, {"alphas": (1.5,)}, "alphas=1.5 must be numbers from 0 to 1"),
        ({"type": "NK"}, {"sampler": SamplerConfig("sde_heun", 3)}, "sampler.method=sde_heun can't be followed"),
        ({"type": "NK"}, {"genes": ["nix"]}, "gene 'nix' is not among"),
    ],
)
def test_what_can_not_be_transformed_is_said_in_one_line(model: Pretrained, to, more, said: str) -> None:
    with pytest.raises(InputError, match=said) as refusal:
        model.transform(labelled_cells(4), to, **more)
    assert "\n" not in str(refusal.value)


def test_what_is_not_a_number_is_no_count() -> None:
    """A comparison with NaN is false, and so would be that a gene is expressed."""
    value_BQ = torch.tensor([[-1.0, -0.5], [-1.0, torch.nan]])
    keys_BQ = draws.keys(0, "counts", torch.arange(2), torch.arange(1, 3))
    for kind in ("counts", "means"):
        with pytest.raises(InputError, match="1 of 2 cells of a batch have no expected counts"):
            written(Predicted("nb", value_BQ, torch.ones(2)), kind, torch.full((2,), 1e3), keys_BQ)
