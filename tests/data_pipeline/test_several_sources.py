"""Several sources: whose genes join, by which names, and what is read once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pandas as pd
import pytest

from data_pipeline.convert.config import SourceConfig
from data_pipeline.convert.genes import SourceGenes, gene_names, in_list, join_genes
from data_pipeline.convert.open import open_sources
from data_pipeline.convert.plan import make_plan
from data_pipeline.convert.write_shards import write_shards
from data_pipeline.write_soma import SomaWriteConfig, write_soma
from scldm.errors import InputError
from scldm.vocab import GeneVocab
from tests.data_pipeline.atlases import atlas, config, read_set, row_counts


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


@pytest.mark.parametrize(
    "text, said",
    [
        ("ensembl,symbol,symbol\nENSG0,A,B\n", "needs a column ensembl and a column symbol, has .*'symbol', 'symbol'"),
        ('ensembl,symbol\nENSG0,"A\nB"\n', r"row 3: 1 gene ids hold a line break or NUL, such as 'A\\nB'"),
        ("ensembl,symbol\nENSG0,A\0\n", r"row 2: 1 gene ids hold a line break or NUL, such as 'A\\x00'"),
    ],
)
def test_a_gene_table_says_each_thing_once(tmp_path, text, said):
    (tmp_path / "table.csv").write_text(text)
    sources = [SourceGenes("e.h5ad", ("ENSG0",), "ensembl"), SourceGenes("s.h5ad", ("A",), "symbol")]
    with pytest.raises(InputError, match=rf"^source.gene_table: {tmp_path}/table.csv: {said}"):
        join_genes(sources, "intersection", None, str(tmp_path / "table.csv"))


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
    with pytest.raises(InputError, match=r"a.h5ad: 1 gene ids hold a line break or NUL, such as 'A\\nB'"):
        SourceGenes("a.h5ad", gene_names(["A\nB", "C"]), "symbol")
    with pytest.raises(InputError, match="a.h5ad: no gene has a name. Give source.gene_column"):
        SourceGenes("a.h5ad", gene_names([None, ""]), "symbol")


def test_sources_that_share_few_genes_are_refused_with_a_guess():
    human, mouse = (
        SourceGenes(k, tuple(f(f"Gene{n}") for n in range(20)), "symbol") for k, f in (("h", str.upper), ("m", str))
    )
    said = (
        r"0 of 20 genes of h .*less than what is needed .source.min_gene_share=0.1.. 20 match but for upper and lower"
    )
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
    keep, unknown = in_list(vocab, tmp_path / "list.txt")
    assert (keep.tolist(), len(unknown)) == ([True, True, False], 0)
    (tmp_path / "table.csv").write_bytes("\ufeffensembl,symbol\nENSG00000000001.2,A\n".encode())
    ensembl, symbol = SourceGenes("e", ("ENSG00000000001",), "ensembl"), SourceGenes("s", ("A",), "symbol")
    assert join_genes([ensembl, symbol], "union", None, str(tmp_path / "table.csv")).vocab.ids == ("ENSG00000000001",)


def test_a_table_that_can_not_be_read_is_refused_by_its_name(tmp_path):
    """As a spreadsheet may save it."""
    path = tmp_path / "table.csv"
    path.write_bytes("ensembl,symbol\nENSG00000000001,Aé\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"table\.csv is no text in UTF-8 .*\. Save it in that encoding"):
        in_list(GeneVocab(("G1",), "symbol"), path)
    ensembl, symbol = SourceGenes("e", ("ENSG00000000001",), "ensembl"), SourceGenes("s", ("A",), "symbol")
    with pytest.raises(InputError, match=r"table\.csv is no text in UTF-8"):
        join_genes([ensembl, symbol], "union", None, str(path))
    path.write_text(f"ensembl,symbol\nENSG00000000001,{'A' * 200_000}\n")
    with pytest.raises(InputError, match=r"table\.csv: row 2: no CSV: field larger than"):
        join_genes([ensembl, symbol], "union", None, str(path))


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


def test_versions_that_are_left_out_are_counted_by_source() -> None:
    names = [f"ENSG0000000000{k}" for k in range(4)]
    sources = [SourceGenes.of("a", [f"{names[0]}.7", f"{names[1]}.12", names[2]]), SourceGenes.of("b", names)]
    joined = join_genes(sources, "intersection", None, "")
    assert joined.vocab.n_genes == 3
    assert joined.report["without_version"] == {"a": 2}
