"""A user's own cells: read in batches wherever they lie, checked before anything is computed, and kept as they are."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from anndata._core.sparse_dataset import BaseCompressedSparseDataset as InFile
from anndata.io import sparse_dataset

from scldm import count_matrix
from scldm.errors import InputError
from scldm.pretrained import Pretrained
from tests.scldm.small_model import FEW, GENES, cells

N, BATCH, BLOCK = 70, 9, 18  # a block is as many whole batches as FILE_ROWS has


def own(n: int = N) -> Any:
    """Some of the model's genes in an order of their own, one that it does not know, and what stands beside counts."""
    adata = cells(n)[:, [*range(25, 3, -1)]].copy()
    adata.var_names = ["unknown", *adata.var_names[1:]]
    adata.obs["type"] = pd.Categorical(["T cell", "B cell"] * (n // 2))
    adata.var["length"] = range(adata.n_vars)
    adata.obsm["X_umap"] = np.arange(2.0 * n).reshape(n, 2)
    adata.layers["before"] = adata.X.copy()
    return adata


def in_h5ad(path: Path, made: Callable[[Any], Any] = lambda x: x) -> Any:
    adata = own()
    adata.X = made(adata.X)
    adata.write_h5ad(path / "cells.h5ad")
    return ad.read_h5ad(path / "cells.h5ad", backed="r")


def raw_in_h5ad(path: Path) -> Any:
    adata = own()
    adata.raw = adata.copy()
    adata.X = adata.X * np.float32(0.37)
    adata.write_h5ad(path / "cells.h5ad")
    return ad.read_h5ad(path / "cells.h5ad", backed="r")


def in_zarr(path: Path, made: Callable[[Any], Any], layer: bool = False) -> Any:
    """Its matrices stay in the file, which is how anndata opens a zarr store without reading it."""
    adata = own()
    adata.X = made(adata.X)
    with ad.settings.override(zarr_write_format=3), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what will be written next year
        adata.write_zarr(path / "cells.zarr")
    group: Any = zarr.open_group(str(path / "cells.zarr"), mode="r")["X"]
    matrix = sparse_dataset(group) if hasattr(group, "keys") else group
    made_of = {"layers": {"before": matrix}} if layer else {"X": matrix, "layers": {"before": adata.layers["before"]}}
    return ad.AnnData(obs=adata.obs, var=adata.var, obsm=dict(adata.obsm), **made_of)


def view_of_h5ad(path: Path, made: Callable[[Any], Any]) -> Any:
    """As `adata[model.counted(adata)]` is, with the genes in another order."""
    adata, rows = own()[:, ::-1].copy(), [*range(7), 3, *range(7, N)]
    more = ad.AnnData(
        made(adata.X[rows]), obs=adata.obs.iloc[rows].set_axis([f"{k}" for k in range(N + 1)]), var=adata.var,
        obsm={"X_umap": adata.obsm["X_umap"][rows]}, layers={"before": adata.layers["before"][rows]},
    )  # fmt: skip
    more.write_h5ad(path / "cells.h5ad")
    return ad.read_h5ad(path / "cells.h5ad", backed="r")[np.arange(N + 1) != 7, own().var_names]


LAYOUTS: dict[str, Callable[[Path], Any]] = {
    "csr": in_h5ad,
    "csc": lambda path: in_h5ad(path, sp.csc_matrix),
    "dense": lambda path: in_h5ad(path, lambda x: x.toarray()),
    "raw": raw_in_h5ad,
    "zarr csr": lambda path: in_zarr(path, sp.csr_matrix),
    "zarr csc": lambda path: in_zarr(path, sp.csc_matrix),
    "zarr dense": lambda path: in_zarr(path, lambda x: x.toarray()),
    "layer": lambda path: in_zarr(path, sp.csr_matrix, layer=True),
    "layer dense": lambda path: in_zarr(path, lambda x: x.toarray(), layer=True),
    "view csr": lambda path: view_of_h5ad(path, sp.csr_matrix),
    "view csc": lambda path: view_of_h5ad(path, sp.csc_matrix),
    "view dense": lambda path: view_of_h5ad(path, lambda x: x.toarray()),
}


def results(model: Pretrained, adata: Any, layer: str | None = None) -> dict[str, bytes]:
    """Every number that the model gives of the cells."""
    expected = model.reconstruct(adata, layer=layer)
    some = model.reconstruct(adata, layer=layer, genes=[GENES.ids[1], GENES.ids[9]])
    moved: Any = model.transform(adata, {"type": "NK"}, alphas=(0.5, 1), sampler=FEW, layer=layer)
    told = model.matched(adata, layer)
    out: dict[str, Any] = {
        "embed": model.embed(adata, layer=layer), "expected": expected.X, "some": some.X,
        "log_likelihood": np.asarray(expected.obs["log_likelihood"]), "moved": moved.X.toarray(),
        "matched": told.index_n, "counted": model.counted(adata, layer),
        "layer": sp.csr_matrix(expected.layers["before"]).toarray(),
        "moved layer": sp.csr_matrix(moved.layers["before"]).toarray(),
        "umap": np.asarray(moved.obsm["X_umap"]), "length": np.asarray(moved.var["length"]),
    }  # fmt: skip
    return {name: np.ascontiguousarray(of).tobytes() for name, of in out.items()}


@pytest.fixture
def batched(model: Pretrained, monkeypatch: pytest.MonkeyPatch) -> Pretrained:
    monkeypatch.setattr(count_matrix, "FILE_ROWS", 20)
    return replace(model, batch=BATCH)


@pytest.fixture(scope="module")
def in_memory(model: Pretrained) -> dict[str, bytes]:
    return results(replace(model, batch=BATCH), own())


# --- wherever they lie ---------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cells_in_a_file_give_the_very_numbers_of_those_in_memory(
    batched: Pretrained, in_memory: dict[str, bytes], tmp_path: Path, layout: str
) -> None:
    adata = LAYOUTS[layout](tmp_path)
    found = results(batched, adata, "before" if "layer" in layout else None)
    assert [name for name, of in found.items() if of != in_memory[name]] == []


class Lazy:
    """A matrix as dask has them: a slice is computed when it is asked for."""

    def __init__(self, matrix: Any, seen: list[int]) -> None:
        self.matrix, self.seen, self.shape, self._meta = matrix, seen, matrix.shape, matrix[:0]

    def __getitem__(self, rows: slice) -> Lazy:
        return Lazy(self.matrix[rows], self.seen)

    def compute(self) -> Any:
        self.seen.append(self.matrix.shape[0])
        return self.matrix


@pytest.mark.parametrize("made", [sp.csr_matrix, sp.csc_matrix, lambda x: x.toarray()])
def test_lazy_cells_are_computed_by_rows(batched: Pretrained, monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    adata, seen = own(), []
    expected, lazy = batched.embed(adata), Lazy(made(adata.X), seen)
    monkeypatch.setattr(count_matrix, "x_of", lambda _: lazy)
    assert batched.embed(adata).tobytes() == expected.tobytes()
    assert seen[-1] == (N if lazy._meta.shape == (0, 22) and getattr(lazy._meta, "format", "") == "csc" else N % BLOCK)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens from here on: numbers of rows that are read of a file, and `network` for each batch."""
    seen: list[Any] = []
    monkeypatch.setattr(InFile, "to_memory", lambda self: pytest.fail("all is read at once"))
    for kind in (InFile, h5py.Dataset):

        def read(self: Any, *at: Any, of: Any = kind.__getitem__) -> Any:
            part: Any = of(self, *at)
            if np.ndim(part) == 2 or sp.issparse(part):
                seen.append(part.shape[0])
            return part

        monkeypatch.setattr(kind, "__getitem__", read)
    return seen


@pytest.mark.parametrize("layout", ["csr", "dense", "raw", "zarr csr", "layer", "view csr", "view dense"])
def test_no_more_than_a_block_is_in_memory_while_the_networks_compute(
    batched: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    adata, layer = LAYOUTS[layout](tmp_path), "before" if "layer" in layout else "raw" if layout == "raw" else "X"
    monkeypatch.setattr(count_matrix, "PROBE_ROWS", 5)
    posterior, reads = batched.vae.posterior, watched(monkeypatch)
    monkeypatch.setattr(batched.vae, "posterior", lambda *of: (reads.append("network"), posterior(*of))[1])
    batched.embed(adata, layer=layer)
    to_check = [20, 20, 20, 10]
    blocks = [[n, *["network"] * (n // BATCH)] for n in (BLOCK, BLOCK, BLOCK)]
    assert reads == [*to_check, *(one for block in blocks for one in block), 16, "network", "network"]
    reads.clear()
    batched.counted(adata, layer)
    assert reads == to_check


# --- what is refused -----------------------------------------------------------------------------------------------


def changed(path: Path, change: Callable[[Any], None]) -> Any:
    adata = own()
    adata.X = adata.X.toarray()
    change(adata.X)
    adata.X = sp.csr_matrix(adata.X)
    adata.write_h5ad(path / "cells.h5ad")
    return ad.read_h5ad(path / "cells.h5ad", backed="r")


def fractional(x: np.ndarray) -> None:
    x[55, 3], x[66, 3] = 0.5, 0.25


def with_empty_cells(x: np.ndarray) -> None:
    x[[2, 50, 69], 1:] = 0


@pytest.mark.parametrize(
    "change, said",
    [
        (fractional, "^X holds 0.5, which is not a count. Give raw counts$"),
        (with_empty_cells, "^3 of 70 cells have no count in any gene that the model knows. drop_empty=true leaves"),
    ],
)
def test_all_cells_of_a_file_are_checked_before_a_network_runs(
    batched: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, said: str
) -> None:
    adata = changed(tmp_path, change)
    monkeypatch.setattr(count_matrix, "PROBE_ROWS", 1)
    monkeypatch.setattr("scldm.pretrained.encoder_of", lambda *_: pytest.fail("a network was about to run"))
    for use in (batched.embed, batched.reconstruct, lambda of: batched.transform(of, {"type": "NK"}, sampler=FEW)):
        with pytest.raises(InputError, match=said):
            use(adata)


def test_cells_of_a_file_without_a_count_can_be_left_out(batched: Pretrained, tmp_path: Path) -> None:
    adata = changed(tmp_path, with_empty_cells)
    counted_n = batched.counted(adata)
    assert np.flatnonzero(~counted_n).tolist() == [2, 50, 69]
    found, whole = batched.embed(adata[counted_n]), own()
    assert found.tobytes() == batched.embed(whole[counted_n].copy()).tobytes()


# --- what is kept of them ------------------------------------------------------------------------------------------


def test_layers_are_repeated_for_each_alpha_and_left_out_where_the_file_lacks_a_gene(
    model: Pretrained, capsys: pytest.CaptureFixture[str]
) -> None:
    adata = own(6)
    adata.obsm["table"] = pd.DataFrame({"a": range(6)}, index=adata.obs_names)
    known = adata.layers["before"].toarray()[:, 1:]
    one, two = (model.transform(adata, {"type": "NK"}, alphas=of, sampler=FEW) for of in ((1,), (0, 1)))
    np.testing.assert_array_equal(one.layers["before"].toarray(), known)
    np.testing.assert_array_equal(two.layers["before"].toarray(), np.tile(known, (2, 1)))
    some = model.transform(adata, {"type": "NK"}, sampler=FEW, genes=[GENES.ids[9], GENES.ids[12]])
    np.testing.assert_array_equal(some.layers["before"].toarray(), adata[:, some.var_names].layers["before"].toarray())
    lacking = model.transform(adata, {"type": "NK"}, sampler=FEW, genes=[GENES.ids[9], GENES.ids[1]])
    assert list(lacking.layers) == []
    assert "layers are left out (before): they lack genes" in capsys.readouterr().err
    assert list(two.obsm["table"]["a"]) == [*range(6), *range(6)]  # pyright: ignore[reportArgumentType]


def test_genes_that_stand_twice_beside_counts_in_raw_are_refused_before_a_network_runs(model: Pretrained) -> None:
    adata = own(6)
    adata.raw = adata.copy()
    adata.var_names = [adata.var_names[1], *adata.var_names[1:]]
    with pytest.raises(InputError, match="stands twice in var_names"):
        model.reconstruct(adata, layer="raw")


def told(adata: Any) -> dict[str, Any]:
    return json.loads(adata.uns["scldm"]["before"])


def test_the_record_of_what_made_the_cells_is_kept_once(model: Pretrained, tmp_path: Path) -> None:
    made = model.generate({"type": "T cell"}, n=4, sampler=FEW, seed=7)
    by = made.uns["scldm"]
    for _ in range(2):  # embedding makes no cells, and its own output gives the same record
        model.embed(made, key_added="X_scldm")
        assert made.uns["scldm"]["verb"] == "embed"
        assert told(made) == by
        made.write_h5ad(tmp_path / "made.h5ad")
        made = ad.read_h5ad(tmp_path / "made.h5ad")
    assert told(model.reconstruct(made)) == by
    moved = model.transform(made, {"type": "NK"}, by=["type"], sampler=FEW)
    assert told(moved) == by
    moved_by = {key: value for key, value in moved.uns["scldm"].items() if key != "before"}
    assert told(model.reconstruct(moved)) == moved_by  # one record: what that one had before is left out
    model.embed(moved, key_added="X_scldm")
    assert told(moved) == moved_by


@pytest.mark.parametrize(
    "theirs", ["a text", {"sizes": np.array([1, 2]), "n": np.int64(3)}, {"verb": "embed"}, {np.int64(1): 2}]
)
def test_what_others_wrote_there_is_no_error(model: Pretrained, theirs: Any) -> None:
    adata = own(4)
    assert "before" not in model.reconstruct(adata).uns["scldm"]
    adata.uns["scldm"] = theirs
    made = model.reconstruct(adata)
    if theirs == {"verb": "embed"}:
        assert "before" not in made.uns["scldm"]
    else:
        expected = {"sizes": [1, 2], "n": 3} if "n" in theirs else {"1": 2}
        assert told(made) == (expected if isinstance(theirs, dict) else theirs)


def test_an_embedding_is_written_where_it_is_asked_for(model: Pretrained, tmp_path: Path) -> None:
    adata = own()
    expected = model.embed(adata, pool="mean")
    assert (list(adata.obsm), "scldm" in adata.uns) == (["X_umap"], False)
    np.testing.assert_array_equal(model.embed(adata, pool="mean", key_added="X_mean"), expected)
    np.testing.assert_array_equal(adata.obsm["X_mean"], expected)
    assert (adata.uns["scldm"]["verb"], adata.uns["scldm"]["pool"]) == ("embed", "mean")
    with pytest.raises(InputError, match="key_added=3 must be one text, as key_added='X_scldm'"):
        model.embed(adata, key_added=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="key_added='X_scldm': adata is a view, which can't be added to. Give adata.c"):
        model.embed(in_h5ad(tmp_path)[:5], key_added="X_scldm")
