"""Which matrix holds the counts, what joins, what is refused: before a count is read."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from data_pipeline.convert.config import SourceConfig
from data_pipeline.convert.open import named, open_matrix, open_sources
from data_pipeline.convert.row_filter import matches
from data_pipeline.convert.source import spans
from data_pipeline.convert.source_h5ad import find_counts
from data_pipeline.convert.source_soma import SomaMatrix
from data_pipeline.convert.write_shards import write_shards
from data_pipeline.write_soma import SomaWriteConfig, write_soma
from scldm.cells_opened import open_cells
from scldm.errors import InputError
from scldm.label_text import as_labels, texts
from scldm.request.wanted import distinct
from tests.data_pipeline.atlases import FilterConfig, atlas, config, counts

# --- counts --------------------------------------------------------------------------------------------------------


def layered(tmp_path, x=None, counts_layer=None, raw=None, other=None, layer_raw=None):
    adata = atlas(60, 40)
    whole = adata.X
    for value, put in ((raw, "raw"), (counts_layer, "counts"), (other, "other"), (layer_raw, "layers/raw")):
        if value is not None:
            if put == "raw":
                adata.X = value(whole)
                adata.raw = adata.copy()
            else:
                adata.layers[put.removeprefix("layers/")] = value(whole)
    adata.X = x(whole) if x else None
    adata.write_h5ad(tmp_path / "a.h5ad")
    return open_cells(str(tmp_path / "a.h5ad"))


def same(m):
    return m


def scaled(m):
    return m * np.float32(0.5)


@pytest.mark.parametrize(
    "matrices, layer, found",
    [
        ({"x": same}, "", "X"),
        ({"x": scaled, "counts_layer": same}, "", "layers/counts"),
        ({"x": scaled, "raw": same}, "", "raw/X"),
        ({"counts_layer": same}, "", "layers/counts"),
        ({"x": same, "counts_layer": same}, "", "X"),  # twice the same counts is no question
        ({"x": scaled, "other": same}, "other", "layers/other"),
        ({"x": same, "raw": lambda m: m * 2}, "raw", "raw/X"),
        ({"x": scaled, "layer_raw": same}, "raw", "layers/raw"),
        ({"x": scaled, "layer_raw": lambda m: m * 2, "raw": same}, "raw", "raw/X"),
    ],
)
def test_counts_are_found(tmp_path, matrices, layer, found):
    with layered(tmp_path, **matrices) as file:
        assert find_counts(file, layer) == found


@pytest.mark.parametrize(
    "matrices, layer, message",
    [
        (
            {"x": scaled, "other": same},
            "",
            r"no counts in X, layers/counts, raw/X: X \(60 x 40, float32, from 0.5 to 35000, .* % of its values "
            r"whole\). Also there: layers/other. Choose another with source.layer=NAME",
        ),
        (
            {"x": same, "raw": lambda m: m * 2},
            "",
            r"several matrices hold counts and differ: X \(.*; raw/X \(",
        ),
        ({"x": same}, "umis", r"source.layer='umis' is not in the file. It has X"),
        ({"x": lambda m: -m}, "X", r"source.layer='X' does not hold counts: X \(.*from -70000 to -1"),
    ],
)
def test_counts_that_can_not_be_told(tmp_path, matrices, layer, message):
    with layered(tmp_path, **matrices) as file, pytest.raises(InputError, match=message):
        find_counts(file, layer)


@pytest.mark.parametrize(
    "value, fault",
    [(-2, "-2.0 (negative)"), (1.5, "1.5 (fractional)"), (np.nan, "nan (not a number)"), (np.inf, "inf (inf")],
)
@pytest.mark.parametrize("storage", ["csr", "csc", "dense"])
def test_one_bad_value_among_counts_is_named(tmp_path, value, fault, storage):
    x = counts(60, 40).toarray()
    x[7, 3], x[9, 5] = value, value
    adata = atlas(60, 40)
    adata.X = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.array}[storage](x)
    adata.write_h5ad(tmp_path / "a.h5ad")
    first = "cell cell7 (row 7), gene GENE3: "
    with open_cells(str(tmp_path / "a.h5ad")) as file:
        with pytest.raises(InputError, match=re.escape(first + fault)):
            find_counts(file)
        with pytest.raises(InputError, match=re.escape(first + fault)):
            find_counts(file, "X")


# --- files ---------------------------------------------------------------------------------------------------------


def test_broken_files(tmp_path):
    atlas(200, 300).write_h5ad(tmp_path / "whole.h5ad")
    data = (tmp_path / "whole.h5ad").read_bytes()
    for name, content, message in (
        ("cut.h5ad", data[: len(data) // 2], "truncated"),
        ("text.h5ad", b"cells", "can't be opened: not an HDF5 file"),
        ("empty.h5ad", b"", "can't be opened"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: can't be .*{message}|{name}: {message}"):
            open_sources(SourceConfig(paths=(str(tmp_path / name),)), (), "")
    with pytest.raises(InputError, match="no such file"):
        open_sources(SourceConfig(paths=(str(tmp_path / "none.h5ad"),)), (), "")
    with pytest.raises(InputError, match="no file matches"):
        open_sources(SourceConfig(paths=(str(tmp_path / "n*.h5ad"),)), (), "")
    with pytest.raises(InputError, match="no-soma: no such file or folder"):
        open_sources(SourceConfig(paths=(str(tmp_path / "no-soma"),)), (), "")
    (tmp_path / "no-soma").mkdir()
    with pytest.raises(InputError, match="a folder, and no zarr store.*no SOMA experiment"):
        open_sources(SourceConfig(paths=(str(tmp_path / "no-soma"),)), (), "")
    for key, change in (
        ("X/indptr", lambda d: d[-1:] * 0 + d[-1] + 5),
        ("X/indices", lambda d: d[-1:] * 0 + (1 << 30)),
    ):
        (tmp_path / "bent.h5ad").write_bytes(data)
        with h5py.File(tmp_path / "bent.h5ad", "r+") as file:
            values: Any = file[key]
            values[-1] = change(values[:])[0]
        for chosen in (FilterConfig(), FilterConfig(min_cells=1)):  # genes are counted by a kernel of its own
            with pytest.raises(InputError, match=r"bent\.h5ad.*damaged"):
                write_shards(config(tmp_path / key, tmp_path / "bent.h5ad", filter=chosen))
            assert not (tmp_path / key / "manifest.json").exists()
            shutil.rmtree(tmp_path / key, ignore_errors=True)


def test_a_gene_given_twice_for_a_cell(tmp_path):
    """Adding the two up, or taking one, would be a guess."""
    adata = atlas(20, 30)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        indices: Any = file["X/indices"]
        indices[1] = indices[0]
    with pytest.raises(InputError, match=r"cell cell0 \(row 0\), gene GENE0: .* \(given twice for the gene\)"):
        write_shards(config(tmp_path / "set", tmp_path / "a.h5ad"))


def test_names_that_stand_twice(tmp_path):
    adata = atlas(20, 30)
    adata.obs_names = [*adata.obs_names[:-1], "cell3"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(InputError, match=r"cell 'cell3' stands twice in obs"):
        open_sources(SourceConfig(paths=(str(tmp_path / "cells.h5ad"),)), (), "")
    adata = atlas(20, 30)
    adata.var["symbol"] = ["A", "A", *adata.var_names[2:]]
    adata.write_h5ad(tmp_path / "genes.h5ad")
    source = SourceConfig(paths=(str(tmp_path / "genes.h5ad"),), gene_column="symbol")
    with pytest.raises(InputError, match=r"1 gene ids stand more than once, such as 'A'"):
        open_sources(source, (), "")


def test_categories_as_older_files_keep_them(tmp_path):
    """anndata 0.7 wrote codes with a reference to their labels; before that, obs was one table."""
    atlas(30, 20).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        obs: Any = file["obs"]
        labels, codes = obs["cell_type/categories"][:], obs["cell_type/codes"][:]
        del obs["cell_type"]
        obs["__categories/cell_type"] = labels
        obs["cell_type"] = codes
        obs["cell_type"].attrs["categories"] = obs["__categories/cell_type"].ref
    source = SourceConfig(paths=(str(tmp_path / "a.h5ad"),))
    read = open_sources(source, ("cell_type",), "")[0].obs["cell_type"]
    assert read.tolist() == atlas(30, 20).obs["cell_type"].tolist()
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        del file["obs"]
        file["obs"] = np.zeros(30, [("index", "S8"), ("cell_type", "i4")])
    with pytest.raises(InputError, match="anndata before 0.7"):
        open_sources(source, ("cell_type",), "")


@pytest.mark.heavy
def test_filters_take_what_is_true(tmp_path):
    """A missing value is not true; text and numbers are no answer, though Python calls them true."""
    adata = atlas(4, 30)
    adata.obs["flag"] = pd.array([True, None, False, True], "boolean")
    adata.obs["kind"] = pd.Categorical([True, False, None, True])
    adata.obs["age"] = [3.0, 0.0, np.nan, 5.0]
    adata.obs["is_primary_data"] = ["True", "False", "False", "True"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    source = SourceConfig(paths=(str(tmp_path / "a.h5ad"),))
    for expression, rows in (("flag", [0, 3]), ("kind", [0, 3]), ("age > 2", [0, 3]), ("True", [0, 1, 2, 3])):
        assert open_sources(replace(source, obs_filter=expression), (), "")[0].rows.tolist() == rows
    for settings, message in (
        ({"obs_filter": "age"}, r"a.h5ad: source.obs_filter='age' gives 3.0, not true or false"),
        ({"obs_filter": "cell_type"}, r"source.obs_filter='cell_type' gives '.*', not true or false"),
        ({"obs_filter": "age = 3"}, r"source.obs_filter='age = 3' can't be applied: .*. == compares"),
        ({"var_filter": "1"}, r"source.var_filter='1' gives 1, not true or false"),
        ({"primary_data_only": True}, r"a.h5ad: source.primary_data_only: is_primary_data gives 'True', not true or"),
    ):
        with pytest.raises(InputError, match=message):
            open_sources(replace(source, **settings), (), "")


FILTERS = {
    "kind == 'a'": [0, 3], "kind != 'a'": [2], "not (kind == 'a')": [2], "kind in ['a']": [0, 3],
    "kind not in ['a']": [2], "age > 2": [0, 3], "age != 3": [1, 3], "not (age > 2)": [1],
    "age != 3 or kind == 'a'": [0, 1, 3], "age > 2 and kind == 'a'": [0, 3], "n != 1": [2, 3], "flag != True": [2],
}  # fmt: skip


@pytest.mark.heavy
def test_a_filter_means_the_same_where_values_are_missing(tmp_path):
    """What is missing is neither equal nor unequal: h5ad chooses the rows that TileDB does."""
    adata = atlas(4, 30)
    adata.obs["flag"] = pd.array([True, None, False, True], "boolean")
    adata.obs["kind"] = pd.Categorical(["a", None, "b", "a"])
    adata.obs["age"] = [3.0, 0.0, np.nan, 5.0]
    adata.obs["n"] = pd.array([1, None, 2, 3], "Int64")
    adata.write_h5ad(tmp_path / "a.h5ad")
    write_soma(SomaWriteConfig(h5ad=str(tmp_path / "a.h5ad"), out=str(tmp_path / "soma")))
    for expression, rows in FILTERS.items():
        for path in ("a.h5ad", "soma"):
            source = SourceConfig(paths=(str(tmp_path / path),), obs_filter=expression)
            assert open_sources(source, (), "")[0].rows.tolist() == rows, (expression, path)


@pytest.mark.parametrize(
    "expression, said",
    [
        ("__import__('os').system('true')", r"is none of: comparisons of columns, in, and, or, not"),
        ("cell_type.str.len() > 1", r"'cell_type.str.len\(\)' is none of"),
        ("@config", "can't be applied"),
        ("donor == 3", "it compares numbers with text"),
        ("tissue == 'x'", "there is no column 'tissue'. There are cell_type, donor, batch"),
        ("cell_type in 'B'", "`in` needs a column and a list"),
        ("1 == 1", "a comparison needs a column"),
        (f"{'(' * 500}donor{')' * 500} == 'd1'", "can't be applied"),
    ],
)
def test_a_filter_is_comparisons_and_nothing_else(expression, said):
    with pytest.raises(InputError, match=said):
        matches(pd.DataFrame(atlas(4, 3).obs), expression, "x", "key")


def test_filters_of_quoted_names_lists_and_chains():
    frame = pd.DataFrame({"my column": [1, 2, 3], "b": ["x", "y", "z"]})
    for expression, rows in (
        ("`my column` > 1 and b.isin(['x', 'z'])", [False, False, True]),
        ("1 < `my column` <= 3", [False, True, True]),
        ("~(b == 'x') & (`my column` != 3)", [False, True, False]),
        ("b == 'x' || b == 'y'", [True, True, False]),
        ("b == '`my column` && ||' or b == 'z'", [False, False, True]),
        ("`my column` > -1 && b > 'x'", [False, True, True]),
    ):
        assert matches(frame, expression, "x", "key").tolist() == rows


def test_labels():
    """Whole numbers are one label however they are stored; a missing value is refused or named."""
    assert as_labels(pd.Series([1.0, 2.0]), "x", "").tolist() == ["1", "2"]
    # the label of a number must not depend on the others of its file, or a held-out dose of one stays in another
    assert as_labels(pd.Series([1.5, 2.0]), "x", "").tolist() == ["1.5", "2"]
    for dtype in ("f4", "f8", "Float32", "Float64"):
        assert as_labels(pd.Series([0.1, 3, 1e-5], dtype=dtype), "x", "").tolist() == ["0.1", "3", "1e-05"]
    with pytest.raises(InputError, match="column 'dose' has an infinite value"):
        as_labels(pd.Series([1.0, np.inf], name="dose"), "x", "")
    assert as_labels(pd.Series([True, False]), "x", "").tolist() == ["True", "False"]
    for column in (
        pd.Series(["a", None, "b"], name="c"),
        pd.Series(pd.Categorical(["a", None, "b"]), name="c"),
        pd.Series(["a", "", "b"], name="c"),
    ):
        with pytest.raises(InputError, match=r"column 'c' has no value in 1 cells, first at position 1. missing=LABEL"):
            as_labels(column, "x", "")
        assert as_labels(column, "x", "none").tolist() == ["a", "none", "b"]
    assert as_labels(pd.Series([1.0, np.nan], name="c"), "x", "none").tolist() == ["1", "none"]


@pytest.mark.parametrize("dtype", ["f4", "f8", "Float32", "object", "category", "string"])
def test_labels_that_are_asked_for_are_those_that_were_kept(dtype):
    """A dose that a set keeps as `10` is asked for as `10`, in generate, transform and in Python."""
    values = ["0", "0.1", "1", "10"] if dtype == "string" else [0.0, 0.1, 1.0, 10.0]
    dose = pd.Series(values, dtype=dtype, name="dose")
    assert as_labels(dose, "x", "").tolist() == texts(dose).tolist() == ["0", "0.1", "1", "10"]
    assert distinct(pd.DataFrame({"dose": dose}), {})[1]["dose"].tolist() == ["0", "0.1", "1", "10"]
    mixed = pd.DataFrame({"dose": pd.Series([1, 1.0, "1", b"1"], dtype=object)})
    assert distinct(mixed, {})[0].tolist() == [0, 0, 0, 0]


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_chosen_rows_in_small_chunks(tmp_path):
    """Any choice of rows, in chunks of any size, from every storage: gaps and boundaries lose nothing."""
    adata = atlas(300, 120)
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(300, 140, replace=False)).astype(np.int64)
    paths = {}
    dense = counts(300, 120).toarray()
    layouts = {"csr": adata.X, "csc": sp.csc_matrix(adata.X), "dense": dense, "big-endian": dense.astype(">f4")}
    for name, x in layouts.items():
        adata.X = x
        paths[name] = tmp_path / f"{name}.h5ad"
        adata.write_h5ad(paths[name])
    write_soma(SomaWriteConfig(h5ad=str(paths["csr"]), out=str(tmp_path / "soma")))
    wanted = counts(300, 120).toarray()
    for path in [*paths.values(), tmp_path / "soma"]:
        spec = open_sources(SourceConfig(paths=(str(path),)), (), "")[0].spec
        matrix = open_matrix(spec)
        for chunk_bytes in (1, 40_000, 1 << 30):
            at = 0
            for chunk in matrix.read(rows, chunk_bytes):
                assert (chunk.rows == rows[at : at + len(chunk.rows)]).all()
                got = sp.csr_matrix((chunk.values, chunk.columns, chunk.indptr), (len(chunk.rows), 120)).toarray()
                np.testing.assert_array_equal(got, wanted[chunk.rows])
                at += len(chunk.rows)
            assert at == len(rows)
        matrix.close()


def test_zeros_of_a_dense_matrix_take_no_room(tmp_path):
    """What is planned for unfinished work goes by the counts that there are."""
    means = []
    for name, x in (("csr", counts(300, 120)), ("dense", counts(300, 120).toarray())):
        adata = atlas(300, 120)
        adata.X = x
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        means.append(open_sources(SourceConfig(paths=(str(tmp_path / f"{name}.h5ad"),)), (), "")[0].spec.mean_nonzeros)
    assert means[0] == pytest.approx(means[1])


def test_soma_is_read_by_ranges(tmp_path, monkeypatch):
    """A sparse choice of rows takes a few ranges, not one read a row, nor the whole array."""
    atlas(2000, 60).write_h5ad(tmp_path / "a.h5ad")
    write_soma(SomaWriteConfig(h5ad=str(tmp_path / "a.h5ad"), out=str(tmp_path / "soma")))
    spec = open_sources(SourceConfig(paths=(str(tmp_path / "soma"),)), (), "")[0].spec
    ranges = []
    read = SomaMatrix._read_range
    monkeypatch.setattr(
        SomaMatrix, "_read_range", lambda self, rows: ranges.append((rows[0], rows[-1])) or read(self, rows)
    )
    matrix = open_matrix(spec)
    rows = np.concatenate([np.arange(0, 100, 3), np.arange(1500, 1600)]).astype(np.int64)
    assert sum(len(c.rows) for c in matrix.read(rows, 1 << 30)) == len(rows)
    assert ranges == [(0, 99), (1500, 1599)]
    matrix.close()


def test_spans_keep_to_budget_and_gaps():
    rng = np.random.default_rng(0)
    cost = rng.integers(0, 50, 500)
    end = np.cumsum(cost)
    rows = np.sort(rng.choice(500, 200, replace=False))
    found = list(spans(rows, (end - cost)[rows], end[rows], 300, gap=40))
    assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])]
    assert found[-1][1] == len(rows)
    for a, b in found:
        assert end[rows[b - 1]] - (end - cost)[rows[a]] <= 300 or b == a + 1
        for k in range(a, b - 1):
            assert (end - cost)[rows[k + 1]] - end[rows[k]] <= 40


def test_a_file_that_is_damaged_where_its_groups_are_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens, as its first bytes are right. So it was once in ten runs of which the input changed."""

    def broken(group: h5py.Group, name: str) -> bool:
        raise RuntimeError("Unable to synchronously check link existence (bad heap free list)")

    path = tmp_path / "cells.h5ad"
    h5py.File(path, "w").close()
    monkeypatch.setattr(h5py.Group, "__contains__", broken)
    with pytest.raises(InputError, match=r"cells\.h5ad: can't be read: damaged or truncated \(Unable to synchr"):
        open_cells(path)


def test_a_folder_that_is_no_source_is_called_one(tmp_path):
    with pytest.raises(InputError, match="a folder, and no zarr store. An AnnData file ends in .h5ad or .zarr"):
        named(SourceConfig(paths=(str(tmp_path),)))
