"""A user's own cells as a model takes them: checked, read in batches, with what is kept of them beside the counts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scldm.cells_file import storable
from scldm.count_matrix import CountMatrix, count_matrix, in_memory, row_blocks, table_in_memory
from scldm.errors import InputError
from scldm.networks import Networks
from scldm.vocab import GeneMatch, stands_twice

MAX_COUNT = 2**31 - 1  # of int32, as cells are given to the encoder and written


@dataclass(frozen=True)
class Given:
    """Cells whose counts were checked, of the genes that the model knows, in the file's order.

    whole: their counts, (n, S) int32, where they were in memory or took one block. Else they are read again
    match: which genes they are
    expressed_S: how many cells express each gene
    counted_n: which cells have a count in any of these genes
    """

    found_in: CountMatrix
    whole: sp.csr_matrix | None
    match: GeneMatch
    expressed_S: np.ndarray
    counted_n: np.ndarray

    @property
    def ids_S(self) -> np.ndarray:
        """Vocabulary indices of the genes."""
        return self.match.index_n[self.match.index_n > 0]

    @property
    def share_S(self) -> np.ndarray:
        """Share of cells that express each gene, float64."""
        return self.expressed_S / len(self.counted_n)

    def batches(self, size: int) -> Iterator[tuple[slice, np.ndarray]]:
        """All cells in order, `size` at a time: which they are, and their counts, (B, S) int32."""
        counts: Any  # scipy's stubs give no shape
        start = 0
        for counts in [self.whole] if self.whole is not None else self._blocks(size):
            for first in range(0, counts.shape[0], size):
                dense_BS = counts[first : first + size].toarray()
                yield slice(start + first, start + first + len(dense_BS)), dense_BS
            start += counts.shape[0]

    def _blocks(self, size: int) -> Iterator[Any]:
        for block in row_blocks(self.found_in.matrix, size):
            yield _known(block, self.match).astype(np.int32)


def given_cells(of: Networks, adata: ad.AnnData, layer: str | None, empty_too: bool = False) -> Given:
    """The cells for a model. All their counts are read once to check them. Arguments and errors as for `embed`.

    empty_too: cells without a count are not refused
    """
    run = of.origin.get("vae", {}).get("config", {})
    policy = run.get("data", {}).get("given", {}).get("policy")
    if policy in ("expressed", "expressed_plus_zeros"):
        raise InputError(
            f"this autoencoder was trained with data.given.policy={policy} and is given all genes of a file here, "
            f"which is another function. `scldm encode` with genes.policy={policy} encodes cells as it was trained"
        )
    found_in = count_matrix(adata, layer)
    names = found_in.genes
    if (twice := stands_twice(names)) is not None:
        raise InputError(f"gene {twice!r} stands twice in var_names. They must be unique")
    match = of.genes.match(names, "the cells", of.min_gene_share)
    expressed_S, counted, whole = 0, [], None
    for block in row_blocks(found_in.matrix):
        counts = _known(block, match)
        wrong = counts.data[~((counts.data >= 0) & (counts.data <= MAX_COUNT) & (counts.data == np.rint(counts.data)))]
        if len(wrong):
            raise InputError(f"{found_in.name} holds {wrong[0]:g}, which is not a count. Give raw counts")
        expressed_S = expressed_S + counts.getnnz(0).astype(np.int64)
        counted.append(counts.getnnz(1) > 0)
        whole = counts.astype(np.int32) if counts.shape[0] == adata.n_obs else None
    counted_n = np.concatenate(counted)
    empty = int((~counted_n).sum())
    if empty and not empty_too:
        raise InputError(
            f"{empty} of {adata.n_obs} cells have no count in any gene that the model knows. drop_empty=true "
            "leaves them out, in Python adata[model.counted(adata)]"
        )
    return Given(found_in, whole, match, np.asarray(expressed_S), counted_n)


def _known(block: Any, match: GeneMatch) -> Any:
    """Counts of the genes that the model knows, those above 0."""
    counts = block[:, match.index_n > 0]
    counts.eliminate_zeros()
    return counts


# --- what is kept of them ------------------------------------------------------------------------------------------


def var_of(of: Networks, adata: ad.AnnData, ids_Q: np.ndarray) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Rows of the cells' var for these genes of the vocabulary, and where they stand there. Where one is not there,
    what the model knows of the genes, and None."""
    columns = ids_Q - 1
    if not adata.var_names.is_unique:
        raise InputError(f"gene {adata.var_names[adata.var_names.duplicated()][0]!r} stands twice in var_names")
    at = adata.var_names.get_indexer(pd.Index([of.genes.ids[k] for k in columns]))
    return (of.var(columns), None) if (at < 0).any() else (storable(table_in_memory(adata.var)).iloc[at], at)


def kept_beside(made: ad.AnnData, adata: ad.AnnData, at: np.ndarray | None, times: int = 1) -> None:
    """Give `made` the obsm of the cells that it was made from, and their layers at the columns `at`, if there are any.

    times: how often all cells stand in `made`, one set after another
    """
    rows = None if times == 1 else np.tile(np.arange(adata.n_obs), times)
    for name, lazy in adata.obsm.items():
        of = in_memory(lazy)
        if rows is None:
            made.obsm[name] = of
        elif isinstance(of, pd.DataFrame):
            made.obsm[name] = of.iloc[rows].set_axis(made.obs_names)
        else:
            made.obsm[name] = of[rows]
    if at is None and adata.layers:
        print(f"layers are left out ({', '.join(adata.layers)}): they lack genes that are written", file=sys.stderr)
    for name, of in adata.layers.items() if at is not None else ():
        some = in_memory(of)[:, at]
        made.layers[name] = some if rows is None else some[rows]


def before(adata: ad.AnnData) -> dict[str, Any]:
    """For the record of cells that are made of others: who made those, as JSON, if a model did. It is one record. What
    it says of cells before is left out, and one of `embed`, which makes no cells, gives what it says of them."""
    told: Any = adata.uns.get("scldm")
    if told is None:
        return {}
    if isinstance(told, Mapping):
        if told.get("verb") == "embed":
            return {"before": str(told["before"])} if "before" in told else {}
        told = {str(key): value for key, value in told.items() if key != "before"}
    return {"before": json.dumps(told, default=lambda of: of.tolist() if hasattr(of, "tolist") else str(of))}
