"""Vocabularies: index 0 is padding, null follows the labels, and a stored vocabulary proves that it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scldm.errors import InputError
from scldm.vocab import ConditionVocab, GeneVocab

GENES = GeneVocab(("CD3D", "MS4A1", "NKG7"), "symbol")
CONDITIONS = ConditionVocab({"cell_type": ("B cell", "NK cell", "T cell"), "donor": ("d1",)})


def test_genes_start_at_one_and_zero_is_what_is_not_there() -> None:
    np.testing.assert_array_equal(GENES.lookup(["NKG7", "none", "CD3D"]), [3, 0, 1])
    assert GENES.lookup([]).dtype == np.int64
    assert (GENES.n_genes, GENES.table_size) == (3, 4)


def test_a_gene_that_stands_twice_is_named() -> None:
    with pytest.raises(InputError, match="'B' stands twice"):
        GeneVocab(("A", "B", "C", "B"), "symbol")


def test_the_hash_tells_order_and_namespace_apart() -> None:
    hashes = {
        GENES.hash,
        GeneVocab(GENES.ids[::-1], "symbol").hash,
        GeneVocab(GENES.ids, "ensembl").hash,
        GeneVocab(("CD3D", "MS4A1"), "symbol").hash,
    }
    assert len(hashes) == 4


def test_genes_come_back_from_disk_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "genes.json"
    GENES.save(path)
    assert GeneVocab.load(path) == GENES
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"ids": ["CD3D", "NKG7", "MS4A1"]}))
    with pytest.raises(InputError, match=r"genes\.json: hash .* does not match its 3 genes"):
        GeneVocab.load(path)


def test_labels_and_ids() -> None:
    np.testing.assert_array_equal(CONDITIONS.encode("cell_type", ["T cell", "B cell"]), [2, 0])
    assert CONDITIONS.decode("cell_type", [2, 0]) == ["T cell", "B cell"]
    assert CONDITIONS.encode("donor", []).dtype == np.int64


def test_what_the_model_never_saw_is_named_with_the_nearest() -> None:
    every = "'B cells'. It has 'B cell', 'NK cell', 'T cell'"
    with pytest.raises(InputError, match=f"condition 'cell_type' has no label {every}"):
        CONDITIONS.encode("cell_type", ["T cell", "B cells"])
    many = ConditionVocab({"gene": tuple(f"GENE{k}" for k in range(40))})
    with pytest.raises(InputError, match="has no label 'GENE40'. Nearest of its 40: 'GENE"):
        many.encode("gene", ["GENE40"])
    with pytest.raises(InputError, match="condition 'tissue' is unknown. The model knows cell_type, donor"):
        CONDITIONS.encode("tissue", ["lung"])


def test_conditions_come_back_from_disk(tmp_path: Path) -> None:
    CONDITIONS.save(tmp_path / "conditions.json")
    assert ConditionVocab.load(tmp_path / "conditions.json") == CONDITIONS


def test_an_ensembl_id_is_one_gene_whatever_its_version() -> None:
    bare, versioned = (GeneVocab(tuple(f"ENSG{k:011d}{v}" for k in range(4)), "ensembl") for v in ("", ".3"))
    for vocab in (bare, versioned):
        for version in ("", ".3", ".12"):
            assert vocab.lookup([f"ENSG{k:011d}{version}" for k in (2, 0, 9)]).tolist() == [3, 1, 0]
    both = GeneVocab(("ENSG00000000001.1", "ENSG00000000001.2"), "ensembl")  # of sets that were written before
    assert both.lookup(["ENSG00000000001.2", "ENSG00000000001.3"]).tolist() == [2, 0]
    # a gene of the Y chromosome beside its twin of the X, a symbol with a point
    assert bare.lookup(["ENSG00000000002.5_PAR_Y"]).tolist() == [0]
    assert GeneVocab(("RP11-34P13.7",), "symbol").lookup(["RP11-34P13.7", "RP11-34P13.8"]).tolist() == [1, 0]


def test_how_many_genes_match_is_said_and_too_few_are_refused_with_a_guess() -> None:
    ids = tuple(f"ENSG{k:011d}" for k in range(20))
    vocab = GeneVocab(ids, "ensembl")
    found = vocab.match([*ids[:8], "x"], "a.h5ad", 0.1)
    assert str(found) == "8 of 20 genes matched (40 %)"
    assert found.to_json() == {"genes_matched": 8, "genes_of_model": 20, "genes_of_file": 9}
    assert vocab.match(ids[:1], "a.h5ad", 0.05).n_matched == 1
    mouse = GeneVocab(tuple(f"Gene{k}" for k in range(20)), "symbol")
    for of, given, said in (
        (vocab, ids[:1], r"a.h5ad: 1 of 20 genes matched \(5 %\), and at least 10 % are needed \(min_gene_share=0.1\)"),
        (vocab, ["CD4"], "0 of 20 .*. They are named like 'CD4'.*: symbols here, Ensembl ids there"),
        (
            vocab,
            [g.replace("ENSG", "ENSMUSG") for g in ids],
            r". Ids of another species: ENSMUSG... here, ENSG... there",
        ),
        (mouse, [g.upper() for g in mouse.ids], ". 20 match but for upper and lower case"),
        (vocab, [*ids, f"{ids[3]}.2"], "a.h5ad: 'ENSG00000000003' and 'ENSG00000000003.2' are one gene"),
    ):
        with pytest.raises(InputError, match=said):
            of.match(given, "a.h5ad", 0.1)
