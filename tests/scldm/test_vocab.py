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
    with pytest.raises(InputError, match="condition 'cell_type' has no label 'B cells'; nearest of its 3: 'B cell'"):
        CONDITIONS.encode("cell_type", ["T cell", "B cells"])
    with pytest.raises(InputError, match="condition 'tissue' is unknown; the model knows cell_type, donor"):
        CONDITIONS.encode("tissue", ["lung"])


def test_conditions_come_back_from_disk(tmp_path: Path) -> None:
    CONDITIONS.save(tmp_path / "conditions.json")
    assert ConditionVocab.load(tmp_path / "conditions.json") == CONDITIONS
