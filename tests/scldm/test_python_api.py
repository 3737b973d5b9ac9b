"""A model in a scientist's hands: the ways to ask for cells, how it shows itself, what its answers keep, and what each
mistake says."""

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

import scldm
from scldm.errors import InputError
from scldm.library_size import LibrarySizeModel, LogNormal
from scldm.model_folder import save_pretrained
from scldm.pretrained import Pretrained
from scldm.vocab import ConditionVocab
from tests.scldm.small_model import CONDITIONS, FEW, GENES, cells, library_sizes, networks, of_doses

COLUMNS = {"symbol": [f"S{k}" for k in range(30)]}
HISTORY = {"vae": [{"step": 2, "cells_seen": 20, "time": 1.5, "split": "train", "loss": 3.5}]}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """The small model, which also knows symbols and how it was trained."""
    folder = tmp_path_factory.mktemp("known") / "model"
    origin = {"exported": {"git": "1234abc"}}
    save_pretrained(folder, *networks(), GENES, CONDITIONS, library_sizes(), origin, HISTORY, COLUMNS)
    return scldm.load(folder)


def labelled(n: int = 6) -> Any:
    """The user's own cells, with what a user keeps beside the counts."""
    adata = cells(n)
    adata.obs["type"] = pd.Categorical(["T cell", "B cell"] * (n // 2))
    adata.obs["batch"] = "b1"
    adata.var["length"] = np.arange(adata.n_vars)
    adata.layers["counts"] = adata.X.copy()
    adata.obsm["X_umap"] = np.arange(2.0 * n).reshape(n, 2)
    adata.obsm["scores"] = pd.DataFrame({"s": np.arange(n)}, index=adata.obs_names)
    return adata


# --- which cells ---


def twice(column: str, values: list[Any]) -> pd.DataFrame:
    table = pd.DataFrame({"a": values, "b": values})
    table.columns = [column, column]
    return table


def with_twice(adata: Any, column: str) -> Any:
    adata.obs = twice(column, ["T cell"] * adata.n_obs).set_axis(adata.obs_names)
    return adata


def test_all_ways_to_ask_make_the_same_cells(known: Pretrained) -> None:
    table = pd.DataFrame({"type": ["T cell"] * 4})
    like = ad.AnnData(obs=pd.DataFrame({"type": ["T cell"] * 4, "batch": "x"}, index=list("abcd")))
    made = [known.generate(of, n=n, sampler=FEW) for of, n in ((table, None), ({"type": "T cell"}, 4), (like, None))]
    for other in made[1:]:
        assert (made[0].X != other.X).nnz == 0
        pd.testing.assert_frame_equal(made[0].obs, other.obs)
    assert (made[0].uns["scldm"]["seed"], made[0].uns["scldm"]["verb"]) == (0, "generate")
    assert (known.generate(table, seed=1, sampler=FEW).X != made[0].X).nnz > 0


@pytest.mark.parametrize(
    "given, said",
    [
        ({"conditions": {"type": "T cell"}}, r"conditions=\{'type': 'T cell'\} does not say how many cells. Give n"),
        ({}, r"conditions=\{\} does not say how many cells"),
        (
            {"conditions": "T cell", "n": 3},
            r"conditions='T cell' must map names to values, as conditions=\{\"cell_type",
        ),
        ({"conditions": {"type": ["T cell"]}, "n": 3}, "type=.*must be one label. Else give a DataFrame"),
        ({"conditions": {"type": "T cell"}, "n": 0}, "n=0 must be a whole number, at least 1"),
        ({"conditions": {"type": "T cell"}, "n": 2.5}, "n=2.5 must be a whole number"),
        (
            {"conditions": pd.DataFrame({"type": ["T cell"]}), "n": 3},
            "n=3 can't be given with a table of cells: it has 1",
        ),
        ({"conditions": {"kind": "T cell"}, "n": 3}, "condition 'kind' is unknown. The model knows type, donor"),
        ({"conditions": {"type": "T sell"}, "n": 3}, "has no label 'T sell'. It has 'T cell', 'B cell', 'NK'"),
        ({"conditions": ad.AnnData(obs=pd.DataFrame({"x": ["1"]}, index=["a"]))}, "obs has none of the model's cond"),
        (
            {"conditions": {"type": "T cell"}, "n": 3, "kind": "mean"},
            "kind='mean' must be one of 'counts', 'means'. Did",
        ),
        ({"conditions": {"type": "T cell"}, "n": 3, "genes": "ENSG00001"}, r"genes='ENSG00001' must be a list of gene"),
        ({"conditions": {"type": "T cell"}, "n": 3, "sampler": {"n_steps": 2}}, "must be a scldm.SamplerConfig"),
        ({"conditions": twice("type", ["T cell"])}, "conditions: column 'type' stands twice"),
        ({"conditions": twice("library_size", [50.0])}, "conditions: column 'library_size' stands twice"),
        ({"conditions": pd.DataFrame({0: ["T cell"]})}, "conditions: column 0 is no text, so it names no condition"),
        ({"conditions": pd.DataFrame({"type": [["T cell"]]})}, "column type holds what is no label"),
        ({"conditions": pd.DataFrame({"type": [b"\xff\xfe"]})}, r"label b'\\xff\\xfe' is no text in UTF-8"),
    ],
)
def test_what_generate_refuses(known: Pretrained, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        known.generate(**given)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m: m.embed(cells(2), pool="avg"), "pool='avg' must be one of 'flat', 'mean'"),
        (lambda m: m.transform(labelled(), "stim"), "to='stim' must map names to values"),
        (lambda m: m.transform(labelled(), {"type": "NK"}, by="type"), r"by='type' must be a list.*by=\['type'\]"),
        (lambda m: m.transform(labelled(), {"type": "NK"}, kind="count"), "kind='count'.*Did you mean 'counts'"),
        (lambda m: m.reconstruct(cells(2), genes="ENSG00001"), "genes='ENSG00001' must be a list of gene ids"),
        (lambda m: m.log_fold_changes("typ", "T cell", "B cell"), "condition 'typ' is unknown. The model knows type"),
        (lambda m: m.log_fold_changes("type", "T cell", "B cell", by="donor"), "by='donor' must be a list"),
        (lambda m: m.log_fold_changes("type", "T cell", "B cell", by=["type"]), "by names 'type', which is the cond"),
        (lambda m: m.log_fold_changes("type", "T cell", "B cell", n=1), "n=1 must be a whole number, at least 2"),
        (lambda m: m.log_fold_changes("type", "T cell", "B cell", n="5"), "n='5' must be a whole number, at least 2"),
        (lambda m: m.log_fold_changes("type", ["T cell"], "B cell"), r"a=\['T cell'\] must be one label, as a text"),
        (lambda m: m.log_fold_changes(["type"], "T cell", "B cell"), r"condition=\['type'\] must be one text"),
        (lambda m: m.embed(cells(2), layer=["X"]), r"layer=\['X'\] must be the name of one layer"),
        (lambda m: m.generate({"type": "T cell"}, n=2, genes=[]), r"genes=\[\] names no gene"),
        (lambda m: m.transform(labelled(), {"type": ["NK"]}), r"to: type=\['NK'\] must be one label"),
        (lambda m: m.transform(labelled(), {"type": "NK"}, alphas=0.5), r"a list of numbers .*, as alphas=\[0.5\]"),
        (lambda m: m.transform(labelled(), {"type": "NK"}, alphas="1"), r"alphas='1' must be a list of numbers"),
        (lambda m: m.transform(labelled(), {"type": "NK"}, alphas=["1"]), "alphas='1' must be a number from 0 to 1"),
        (lambda m: m.transform(labelled(), {"type": "NK"}, alphas=[]), r"alphas=\[\] must hold a number"),
        (lambda m: m.evaluate("g.h5ad", cells(2)), "generated is of type str. It must be an AnnData"),
        (lambda m: m.evaluate(cells(2), cells(2)[:0]), "real: there are no cells"),
        (lambda m: m.evaluate(cells(2), cells(2), seed=1 << 31), r"seed=2147483648 must be .* below 2\^31"),
        (lambda m: m.evaluate(cells(2), cells(2), split=["x"]), r"split=\['x'\] must be one text"),
        (
            lambda m: m.log_fold_changes("type", "T cell", "B cell", n=10**12),
            "n=1000000000000 must be at most 50,0",
        ),
        (lambda m: m.evaluate(cells(2), cells(2), protocol=["scldm"]), r"protocol=\['scldm'\] must be one of 'scldm'"),
        (lambda m: m.evaluate(cells(2), with_twice(cells(2), "split"), split="split"), "split='split' stands twice"),
        (lambda m: m.transform(with_twice(cells(2), "type"), {"type": "NK"}), "column 'type' of the cells or genes st"),
        (lambda m: m.save(__file__), "is a file. Name a folder"),
        (lambda m: m.save("a\0b"), r"folder='a\\x00b' must be a path of at most"),
        (lambda m: m.save("/dev/null"), "folder=/dev/null: /dev/null can't be written to"),
        (lambda m: m.save(f"{__file__}/x"), "can't be written to"),
        (lambda m: scldm.load("n" * 300), "folder='nnn.* must be a path of at most 2,000 bytes, with names of at mos"),
        (lambda m: scldm.load(3), "folder=3 must be the path of a folder"),
        (lambda m: scldm.load("x", batch="a"), "batch='a' must be a whole number, at least 1"),
        (lambda m: scldm.load("x", min_gene_share="a"), "min_gene_share='a' must be a number from 0 to 1"),
        (lambda m: scldm.load("x", "gpu"), "device=gpu: torch knows cpu, cuda"),
        (lambda m: scldm.SamplerConfig(n_steps="3"), "n_steps='3' must be a whole number"),
        (lambda m: scldm.SamplerConfig(n_steps=2.5), "n_steps=2.5 must be a whole number"),
        (lambda m: scldm.SamplerConfig(n_steps=None), "n_steps=None must be a whole number"),
        (lambda m: scldm.SamplerConfig(guidance_scale="2"), "guidance_scale='2' must be a number"),
        (lambda m: scldm.SamplerConfig(guidance_weights={"a": "b"}), "guidance_weights.a='b' must be a number"),
        (lambda m: m.evaluate(cells(2), cells(2), conditions="type"), "conditions='type' must be a list"),
        (lambda m: m.evaluate(cells(2), cells(2), protocol="cell"), "protocol='cell' must be one of 'scldm', 'cfgen'"),
        (lambda m: scldm.SamplerConfig(guidance="jont"), "sampler.guidance='jont' must be one of .*mean 'joint'"),
        (lambda m: scldm.SamplerConfig(method="rk4"), "sampler.method='rk4' must be one of 'euler', 'heun'"),
    ],
)
def test_every_word_is_checked(known: Pretrained, call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call(known)


def test_numbers_of_arrays_are_numbers(known: Pretrained, tmp_path: Path) -> None:
    """As n of a sum over a column. What is recorded of them can be written."""
    sampler = scldm.SamplerConfig("euler", np.int64(3), guidance_scale=np.float32(1))
    made = known.generate({"type": "T cell"}, n=np.int64(3), seed=np.int32(4), sampler=sampler)
    same = known.generate({"type": "T cell"}, n=3, seed=4, sampler=FEW)
    assert made.uns["scldm"] == same.uns["scldm"]
    assert type(made.uns["scldm"]["seed"]) is int
    assert list(made.obs_names) == list(same.obs_names)


def test_a_sampler_is_a_key() -> None:
    of = [
        scldm.SamplerConfig(guidance="additive", guidance_weights={"a": w, "b": 1.0}) for w in (2.0, np.float32(2), 3)
    ]
    assert of[0] == of[1] != of[2]
    assert len({*of, scldm.SamplerConfig()}) == 3
    assert type(of[1].guidance_weights["a"]) is float


def test_changes_between_generated_labels(known: Pretrained) -> None:
    """Against the definition, from the very cells; and for each label of another condition."""
    n = 40
    found = known.log_fold_changes("type", "T cell", "B cell", n=n, seed=3, sampler=FEW)
    asked = pd.DataFrame({"type": ["T cell"] * n + ["B cell"] * n})
    counts = known.generate(asked, seed=3, sampler=FEW).X.toarray().astype(float)
    share = 1e4 * counts / counts.sum(1, keepdims=True)
    expected = np.log2(share[n:].mean(0) + 1) - np.log2(share[:n].mean(0) + 1)
    np.testing.assert_allclose(found["log2_fold_change"], expected, rtol=1e-9)
    assert list(found["gene"]) == list(GENES.ids)
    told = found.attrs["scldm"]
    assert (told["seed"], told["n"], json.loads(told["sampler"])["n_steps"]) == (3, n, 3)
    assert (np.sign(found["z"]) == np.sign(found["log2_fold_change"])).mean() > 0.8


def test_changes_by_trained_labels_of_other_conditions(tmp_path: Path) -> None:
    sizes = {("donor",): {(donor,): LogNormal(20, 6.0, 0.2) for donor in ("d1", "d2")}}
    sizes["dose", "type", "donor"] = {("1.0", "T cell", "d1"): LogNormal(20, 5.0, 0.2)}
    model = of_doses(tmp_path)  # trained on donors d1 and d2, not on the one held out
    model = replace(model, library_sizes=LibrarySizeModel(model.conditions.names, sizes))
    some = list(GENES.ids[:2])
    found = model.log_fold_changes("dose", "0", "10", by=["donor"], n=2, sampler=FEW, genes=some)
    assert list(found["donor"]) == ["d1", "d1", "d2", "d2"]
    assert list(found["gene"]) == some * 2


# --- what answers keep ---


def test_generated_genes_have_their_columns(known: Pretrained, model: Pretrained) -> None:
    some = [GENES.ids[7], GENES.ids[2]]
    made = known.generate({"type": "T cell"}, n=2, sampler=FEW, genes=some)
    assert list(made.var["symbol"]) == ["S7", "S2"]
    assert list(made.var_names) == some
    assert list(model.generate({"type": "T cell"}, n=2, sampler=FEW).var.columns) == []


def test_own_cells_keep_what_is_theirs(known: Pretrained, tmp_path: Path) -> None:
    adata = labelled()
    found = known.reconstruct(adata)
    assert list(found.var["length"]) == list(range(30))
    assert (found.layers["counts"] != adata.layers["counts"]).nnz == 0
    for name in ("X_umap", "scores"):
        np.testing.assert_array_equal(np.asarray(found.obsm[name]), np.asarray(adata.obsm[name]))
    some = known.reconstruct(adata[:, :5].copy(), genes=[GENES.ids[3], GENES.ids[1]])
    assert list(some.var["length"]) == [3, 1]
    np.testing.assert_array_equal(some.layers["counts"].toarray(), adata.X.toarray()[:, [3, 1]])
    more = known.reconstruct(adata[:, :5].copy(), genes=[GENES.ids[3], GENES.ids[9]])
    assert (list(more.var["symbol"]), list(more.layers)) == (["S3", "S9"], [])
    moved = known.transform(adata, {"type": "NK"}, alphas=(0, 1), sampler=FEW)
    np.testing.assert_array_equal(moved.obsm["X_umap"], np.tile(adata.obsm["X_umap"], (2, 1)))
    assert list(moved.obsm["scores"]["s"]) == [*range(6), *range(6)]
    assert list(moved.var["length"]) == list(range(30))
    np.testing.assert_array_equal(moved.layers["counts"].toarray(), np.tile(adata.X.toarray(), (2, 1)))
    for k, of in enumerate((found, moved, some)):
        of.write_h5ad(tmp_path / f"{k}.h5ad")
        told = ad.read_h5ad(tmp_path / f"{k}.h5ad").uns["scldm"]
        assert dict(told) == of.uns["scldm"]
        assert told["version"] == scldm.__version__
        assert told["model"] == known.hash
        assert all(isinstance(value, str | int) for value in of.uns["scldm"].values())
    assert json.loads(moved.uns["scldm"]["sampler"])["n_steps"] == 3
    assert (json.loads(moved.uns["scldm"]["to"]), moved.uns["scldm"]["seed"]) == ({"type": "NK"}, 0)


# --- the model itself ---


def test_it_shows_itself_in_a_few_lines(known: Pretrained) -> None:
    text = repr(known)
    assert len(text) < 1_000
    for part in ("30 (ensembl: ENSG00000,", "type ", "3 labels: T cell, B cell, NK", "9 cells", "1234abc", "on cpu"):
        assert part in text
    html = known._repr_html_()
    assert html.startswith("<table>")
    assert "<td>3 labels: T cell, B cell, NK</td>" in html


@pytest.mark.parametrize(
    "passed, said", [(None, ""), (0.0, "no more than mean profiles: do not trust"), (1.0, "more than")]
)
def test_a_model_says_what_its_autoencoder_was_found_to_be_worth(known: Pretrained, passed, said: str) -> None:
    rows = [{"split": "train", "loss": 1.0}, *([] if passed is None else [{"split": "gate", "passed": passed}])]
    text = repr(replace(known, history={"vae": pd.DataFrame(rows)}))
    assert ("of held-out cells" in text, said in text) == (passed is not None, True)


def test_a_hostile_label_stays_text(known: Pretrained, tmp_path: Path) -> None:
    labels = ConditionVocab({"type": ("<script>", "B cell", "NK"), "donor": ("d1", "d2")})
    save_pretrained(tmp_path / "model", *networks(), GENES, labels, library_sizes(), {})
    assert "<script>" not in scldm.load(tmp_path / "model")._repr_html_()


def test_it_is_a_key_and_equal_to_itself_alone(known: Pretrained) -> None:
    other = known.to("cpu")
    assert {known: 1}[known] == 1
    assert known == known
    assert known != other
    assert (other.hash, list(other.history)) == (known.hash, ["vae"])


def test_saved_it_is_the_same(known: Pretrained, tmp_path: Path) -> None:
    known.save(tmp_path / "again")
    again = scldm.load(tmp_path / "again")
    assert again.hash == known.hash
    pd.testing.assert_frame_equal(again.history["vae"], known.history["vae"])
    pd.testing.assert_frame_equal(again.gene_columns, known.gene_columns)
    assert again.history["vae"].to_dict("records") == HISTORY["vae"]


@pytest.mark.parametrize(
    "name, text",
    [("gene_columns.json", '{"symbol": ["a"]}'), ("gene_columns.json", "[]"), ("history.json", '{"vae": 3}')],
)
def test_damaged_tables_are_named(known: Pretrained, tmp_path: Path, name: str, text: str) -> None:
    known.save(tmp_path / "model")
    (tmp_path / "model" / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}: its SHA-256 is not that of config.json"):
        scldm.load(tmp_path / "model")


@pytest.mark.heavy
def test_the_package_says_what_it_has() -> None:
    assert dir(scldm) == ["InputError", "Pretrained", "SamplerConfig", "__version__", "fit", "load"]
    for name in dir(scldm):
        assert getattr(scldm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = scldm.laod
    assert (Path(scldm.__file__).parent / "py.typed").is_file()
    # a module that is imported must not take the place of a function
    code = "import scldm, scldm.fitting; assert callable(scldm.fit) and callable(scldm.load); print(scldm.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{scldm.__version__}\n", done.stderr
