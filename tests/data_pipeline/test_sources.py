"""Which matrix holds the counts, what joins, what is refused: before a count is read."""

from __future__ import annotations

import re
import shutil
import tracemalloc
from dataclasses import replace
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from data_pipeline.convert.config import SourceConfig, SplitConfig
from data_pipeline.convert.genes import SourceGenes, gene_names, in_list, join_genes
from data_pipeline.convert.open import open_matrix, open_sources
from data_pipeline.convert.plan import make_plan
from data_pipeline.convert.row_filter import matches
from data_pipeline.convert.source import spans
from data_pipeline.convert.source_h5ad import find_counts
from data_pipeline.convert.source_soma import SomaMatrix
from data_pipeline.convert.splits import columns_of, draw_splits, keys
from data_pipeline.convert.write_shards import write_shards
from data_pipeline.write_soma import SomaWriteConfig, write_soma
from scldm.cells_opened import open_cells
from scldm.errors import InputError
from scldm.label_text import as_labels, texts
from scldm.request.wanted import distinct
from scldm.vocab import GeneVocab
from tests.data_pipeline.atlases import FilterConfig, atlas, config, counts, read_set, row_counts

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
            r"whole\); also there: layers/other. Choose another with source.layer=NAME",
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
    with pytest.raises(InputError, match="can't be opened"):
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
        with pytest.raises(InputError, match=r"column 'c' has no value in 1 cells, first at position 1; missing=LABEL"):
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


# --- several sources -----------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_several_files_join_by_their_genes(tmp_path):
    """Different genes in another order, barcodes that repeat: union and intersection give each cell its own counts."""
    first, second = atlas(120, 50), atlas(90, 60, seed=5)
    second.var_names = [f"GENE{(7 * k + 20) % 80}" for k in range(60)]
    first.write_h5ad(tmp_path / "b.h5ad")
    second.write_h5ad(tmp_path / "a.h5ad")
    shared = [g for g in second.var_names if g in set(first.var_names)]
    for join, genes in (
        ("intersection", shared),
        ("union", [*second.var_names, *(g for g in first.var_names if g not in set(second.var_names))]),
    ):
        out = tmp_path / join
        paths = (tmp_path / "b.h5ad", tmp_path / "a.h5ad")
        manifest = write_shards(config(out, *paths, source={"join": join}, conditions=("donor",)))
        assert manifest is not None
        assert [s["uri"][-6:] for s in manifest.sources] == [
            "a.h5ad",
            "b.h5ad",
        ]  # whatever the order they were given in
        assert list(manifest.genes.ids) == genes
        cells = read_set(str(out))[1]
        for (number, row), cell in cells.items():
            whole = row_counts((second, first)[number], row)
            assert cell["counts"] == {g: n for g, n in whole.items() if g in set(genes)}
        lost = sum(not set(row_counts(a, r)) & set(genes) for a in (first, second) for r in range(a.n_obs))
        assert len(cells) + lost == 210
        if join == "intersection":
            assert manifest.report["genes"]["not_in_vocabulary"] == {
                str(tmp_path / "a.h5ad"): 60 - len(shared),
                str(tmp_path / "b.h5ad"): 50 - len(shared),
            }


def test_namespaces_need_a_table(tmp_path):
    ensembl = SourceGenes("e.h5ad", tuple(f"ENSG0000000000{k}" for k in range(5)), "ensembl")
    symbol = SourceGenes("s.h5ad", ("A", "B", "C", "D"), "symbol")
    with pytest.raises(InputError, match=r"s.h5ad: its genes are named by symbol ids \(such as 'A'\).*gene_table=CSV"):
        join_genes([ensembl, symbol], "intersection", None, "")
    table = tmp_path / "table.csv"
    rows = [("0", "A"), ("1", "B"), ("2", "C"), ("3", "C"), ("9", "X")]  # C is ambiguous, D is not there
    table.write_text("ensembl,symbol\n" + "".join(f"ENSG0000000000{e},{s}\n" for e, s in rows))
    joined = join_genes([ensembl, symbol], "intersection", None, str(table))
    assert joined.vocab.ids == ("ENSG00000000000", "ENSG00000000001")
    assert [c.tolist() for c in joined.column_of] == [[0, 1, -1, -1, -1], [0, 1, -1, -1]]
    assert joined.report["not_in_table"] == {"s.h5ad": 2}
    back = join_genes([ensembl, symbol], "union", "symbol", str(table))
    assert back.vocab.ids == ("A", "B", "C", "D")
    assert back.report["ambiguous_in_table"] == {"e.h5ad": 2}
    assert [c.tolist() for c in back.column_of] == [[0, 1, -1, -1, -1], [0, 1, 2, 3]]


@pytest.mark.heavy
def test_versions_of_ensembl_ids_are_one_gene(tmp_path):
    ids = [f"ENSG{k:011d}" for k in range(30)]
    for name, versions in (
        ("a", [f"{g}.{k % 9}" for k, g in enumerate(ids)]),
        ("b", [f"{g}.12" for g in ids]),
        ("c", ids),
    ):
        adata = atlas(20, 30)
        adata.var_names = versions
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    for join in ("intersection", "union"):
        paths = (tmp_path / f"{name}.h5ad" for name in "abc")
        manifest = write_shards(config(tmp_path / join, *paths, source={"join": join}))
        assert manifest is not None
        assert list(manifest.genes.ids) == ids
    with pytest.raises(
        InputError, match=r"1 gene ids stand more than once, such as 'ENSG00000000000' \(Ensembl ids wi"
    ):
        SourceGenes("x.h5ad", gene_names(["ENSG00000000000.1", "ENSG00000000000.2", "ENSG00000000001.2"]), "ensembl")


def test_genes_without_a_name_are_dropped_and_counted(tmp_path):
    adata = atlas(20, 30)
    adata.var["symbol"] = [None, "", " ", *adata.var_names[3:]]
    adata.write_h5ad(tmp_path / "a.h5ad")
    manifest = write_shards(config(tmp_path / "set", tmp_path / "a.h5ad", source={"gene_column": "symbol"}))
    assert manifest is not None
    assert list(manifest.genes.ids) == list(adata.var_names[3:])
    assert manifest.report["genes"]["without_name"] == {str(tmp_path / "a.h5ad"): 3}
    for (_, row), cell in read_set(str(tmp_path / "set"))[1].items():
        assert cell["counts"] == {g: n for g, n in row_counts(adata, row).items() if g in set(manifest.genes.ids)}
    with pytest.raises(InputError, match=r"a.h5ad: 1 gene ids hold a line break, such as 'A\\nB'"):
        SourceGenes("a.h5ad", gene_names(["A\nB", "C"]), "symbol")
    with pytest.raises(InputError, match="a.h5ad: no gene has a name. Give source.gene_column"):
        SourceGenes("a.h5ad", gene_names([None, ""]), "symbol")


def test_sources_that_share_few_genes_are_refused_with_a_guess():
    human, mouse = (
        SourceGenes(k, tuple(f(f"Gene{n}") for n in range(20)), "symbol") for k, f in (("h", str.upper), ("m", str))
    )
    said = r"0 of 20 genes of h are in all 2 .*less than source.min_gene_share=0.1; 20 match but for upper and lower"
    with pytest.raises(InputError, match=said):
        join_genes([human, mouse], "intersection", None, "")
    few = SourceGenes("f", (*human.ids[:1], *(f"X{k}" for k in range(19))), "symbol")
    with pytest.raises(InputError, match="1 of 20 genes of h are in all 2"):
        join_genes([human, few], "intersection", None, "")
    assert join_genes([human, few], "intersection", None, "", 0.05).vocab.ids == human.ids[:1]


def test_a_byte_order_mark_begins_no_name(tmp_path):
    """As Excel writes tables."""
    (tmp_path / "list.txt").write_bytes("\ufeffG1\r\nENSG00000000001.3\r\n".encode())
    vocab = GeneVocab(("G1", "ENSG00000000001", "G3"), "symbol")
    keep, n_unknown = in_list(vocab, tmp_path / "list.txt")
    assert (keep.tolist(), n_unknown) == ([True, True, False], 0)
    (tmp_path / "table.csv").write_bytes("\ufeffensembl,symbol\nENSG00000000001.2,A\n".encode())
    ensembl, symbol = SourceGenes("e", ("ENSG00000000001",), "ensembl"), SourceGenes("s", ("A",), "symbol")
    assert join_genes([ensembl, symbol], "union", None, str(tmp_path / "table.csv")).vocab.ids == ("ENSG00000000001",)


@pytest.mark.heavy
def test_a_file_under_several_names_is_read_once(tmp_path, monkeypatch):
    """Twice the same cells could lie in training and in test."""
    atlas(20, 30).write_h5ad(tmp_path / "a.h5ad")
    write_soma(SomaWriteConfig(h5ad=str(tmp_path / "a.h5ad"), out=str(tmp_path / "soma")))
    (tmp_path / "b.h5ad").symlink_to(tmp_path / "a.h5ad")
    (tmp_path / "c.h5ad").hardlink_to(tmp_path / "a.h5ad")
    monkeypatch.chdir(tmp_path)
    for paths in (
        ("b.h5ad", "a.h5ad", "./a.h5ad", str(tmp_path / "a.h5ad"), "*.h5ad"),
        ("soma", "soma/", str(tmp_path / "soma"), (tmp_path / "soma").as_uri()),
    ):
        assert sum(len(s.rows) for s in open_sources(SourceConfig(paths=paths), (), "")) == 20


def test_a_stated_namespace_must_be_the_sources(tmp_path):
    """Symbols that are called Ensembl ids would be a vocabulary of both."""
    atlas(20, 30).write_h5ad(tmp_path / "symbol.h5ad")
    atlas(20, 30, prefix="ENSG000000000").write_h5ad(tmp_path / "ensembl.h5ad")
    write_soma(SomaWriteConfig(h5ad=str(tmp_path / "symbol.h5ad"), out=str(tmp_path / "soma")))
    for names in (["symbol.h5ad"], ["symbol.h5ad", "ensembl.h5ad"], ["soma"]):
        given = config(
            tmp_path / "set", *(tmp_path / n for n in names), source={"namespace": "ensembl", "join": "union"}
        )
        with pytest.raises(InputError, match=r"its genes are named by symbol ids \(such as 'GENE0'\), .* by ensembl"):
            write_shards(given)


@pytest.mark.heavy
def test_long_labels_take_no_memory_for_each_cell(tmp_path):
    """Of a column of categories, cells hold codes while a command is planned."""
    adata = atlas(40_000, 2)
    adata.obs["text"] = pd.Categorical.from_codes(np.arange(40_000) % 3, [letter * 2000 for letter in "cab"])
    adata.write_h5ad(tmp_path / "a.h5ad")
    command = config(tmp_path / "set", tmp_path / "a.h5ad", conditions=("text",))
    tracemalloc.start()
    try:
        plan = make_plan(command, tmp_path / "plan")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6  # each cell's own text would be 320 MB
    assert [label[0] for label in plan.conditions.labels["text"]] == ["a", "b", "c"]
    assert plan.condition_ids[0][:4].tolist() == [2, 0, 1, 2]


# --- splits --------------------------------------------------------------------------------------------------------


def identities(n: int):
    return np.zeros(n, np.uint16), np.arange(n, dtype=np.int64)


def test_a_cell_keeps_its_split_whatever_stands_around_it():
    """Drawn from identities: the order of cells changes nothing; another seed changes about what chance does."""
    obs = pd.DataFrame({"t": np.random.default_rng(0).choice(["a", "b"], 2000)})
    source, row = identities(2000)
    split, names, _ = draw_splits(SplitConfig(stratify=("t",)), 3, obs, source, row)
    assert names == ("train", "validation", "test")
    order = np.random.default_rng(1).permutation(2000)
    again, _, _ = draw_splits(
        SplitConfig(stratify=("t",)), 3, obs.iloc[order].reset_index(drop=True), source, row[order]
    )
    np.testing.assert_array_equal(again, split[order])
    other, _, _ = draw_splits(SplitConfig(stratify=("t",)), 4, obs, source, row)
    assert 0.25 < (other != split).mean() < 0.45  # 1 - .8^2 - .1^2 - .1^2 = .34
    both = np.unique(keys(0, "x", np.repeat([0, 1], 500), np.tile(np.arange(500), 2)))
    assert len(both) == 1000


@pytest.mark.parametrize("size, validation, test", [(4, 0.1, 0.1), (3, 0.2, 0.1), (1, 0.1, 0.3), (7, 0.0, 0.1)])
def test_small_strata_have_the_shares_together(size, validation, test):
    """What rounding leaves of one stratum is carried to the next; the order of cells still changes nothing."""
    n = 75 * size
    obs = pd.DataFrame({"t": np.repeat(np.arange(75).astype(str), size)})
    source, row = identities(n)
    config = SplitConfig(stratify=("t",), validation=validation, test=test)
    split, _, _ = draw_splits(config, 0, obs, source, row)
    for number, share in ((1, validation), (2, test)):
        assert abs((split == number).sum() - n * share) <= 1
        of_stratum = np.bincount(np.arange(n)[split == number] // size, minlength=75)
        assert abs(of_stratum - size * share).max() < 1.5
    order = np.random.default_rng(1).permutation(n)
    again, _, _ = draw_splits(config, 0, obs.iloc[order].reset_index(drop=True), source, row[order])
    np.testing.assert_array_equal(again, split[order])


def test_values_and_combinations(tmp_path):
    n = 1200
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"donor": rng.choice([f"d{k}" for k in range(10)], n), "type": rng.choice(["a", "b", "c"], n)})
    source, row = identities(n)
    split, _, _ = draw_splits(SplitConfig(by="donor", validation=0.2, test=0.2), 0, obs, source, row)
    assert [len(set(split[obs["donor"] == d])) for d in set(obs["donor"])] == [1] * 10
    assert [len(set(obs["donor"][split == k])) for k in range(3)] == [6, 2, 2]

    named = SplitConfig(by="donor", validation=0.2, test_values=("d3", "d7"))
    split, _, _ = draw_splits(named, 0, obs, source, row)
    assert set(obs["donor"][split == 2]) == {"d3", "d7"}
    assert [len(set(obs["donor"][split == k])) for k in range(3)] == [6, 2, 2]  # two of the eight others
    every = SplitConfig(by="donor", validation_values=("d1",), test_values=("d3",))
    split, _, _ = draw_splits(every, 0, obs, source, row)
    assert [len(set(obs["donor"][split == k])) for k in range(3)] == [8, 1, 1]

    table = tmp_path / "held_out.csv"
    table.write_text("type,donor,split\na,d1,test\nb,d2,unseen\n")
    split, names, rule = draw_splits(SplitConfig(held_out=str(table), validation=0.1), 0, obs, source, row)
    assert names == ("train", "validation", "test", "unseen")
    assert ((split == 2) == ((obs["type"] == "a") & (obs["donor"] == "d1"))).all()
    assert ((split == 3) == ((obs["type"] == "b") & (obs["donor"] == "d2"))).all()
    assert rule["held_out"]["donor"] == ["d1", "d2"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"t.csv: needs a header of obs columns and a row"),
        (b"type,donor\na,d1\nb,d2,test\n", r"t.csv: row 3 has 3 fields, the header 2"),
        (b"type,donor\na\n", r"t.csv: row 2 has 1 fields, the header 2"),
        (b"type,donor\n\xe9,d1\n", r"t.csv: can't be read as CSV in UTF-8"),
        (b"type,type\na,b\n", r"t.csv: column 'type' stands twice"),
    ],
)
def test_held_out_tables_that_can_not_be_read(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        columns_of(SplitConfig(held_out=str(tmp_path / "t.csv")))


@pytest.mark.parametrize(
    "settings, table, message",
    [
        ({"held_out": "t.csv"}, "type,donor\na,d77\n", r"line 2: no cell has type='a', donor='d77'"),
        ({"held_out": "t.csv"}, "type,donor\na,d1\na,d1\n", r"\('a', 'd1'\) stands twice"),
        ({"held_out": "t.csv"}, "type,split\na,my split\n", r"'my split' is no name for a held-out split"),
        ({"by": "donor", "test_values": ("d77",)}, "", r"split.by=donor: no cell has 'd77'. There are 10 values"),
        ({"by": "type", "validation": 0.4, "test": 0.4}, "", None),
        ({"by": "one"}, "", r"its 1 values are too few"),
    ],
)
def test_splits_that_can_not_be_drawn(tmp_path, monkeypatch, settings, table, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text(table)
    rng = np.random.default_rng(0)
    donors = rng.choice([f"d{k}" for k in range(10)], 500)
    obs = pd.DataFrame({"donor": donors, "type": rng.choice(["a", "b", "c"], 500), "one": "x"})
    if message is None:
        draw_splits(SplitConfig(**settings), 0, obs, *identities(500))
        return
    with pytest.raises(InputError, match=message):
        draw_splits(SplitConfig(**settings), 0, obs, *identities(500))
    refused: list[dict[str, Any]] = [
        {"validation": 0.5, "test": 0.5},
        {"test_values": ("a",)},
        {"by": "a", "stratify": ("b",)},
    ]
    for wrong in refused:
        with pytest.raises(InputError):
            SplitConfig(**wrong)
