"""Genes of several sources as one vocabulary: joined by name, in one namespace; what has no place is counted.

Reading order: namespace_of, SourceGenes, JoinedGenes, join_genes, choose.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scldm.errors import InputError
from scldm.vocab import GeneVocab, Namespace

Join = Literal["union", "intersection"]
ENSEMBL = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?")


def namespace_of(ids: Sequence[str]) -> Namespace:
    """`ensembl` where most ids look like ENSG00000139618 or ENSMUSG00000041147, else `symbol`."""
    return "ensembl" if sum(bool(ENSEMBL.fullmatch(g)) for g in ids) * 2 > len(ids) else "symbol"


@dataclass(frozen=True)
class SourceGenes:
    """The gene ids of a source's columns, in their order."""

    uri: str
    ids: tuple[str, ...]
    namespace: Namespace

    def __post_init__(self) -> None:
        twice = [g for g, n in Counter(self.ids).items() if n > 1]
        if twice:
            some = ", ".join(map(repr, twice[:3]))
            raise InputError(
                f"{self.uri}: {len(twice)} gene ids stand more than once, such as {some}; "
                "name a column of var with unique ids as source.gene_column, or make them unique"
            )


@dataclass(frozen=True)
class JoinedGenes:
    """A vocabulary, and for each source its columns' places in it (int32, -1: dropped). report: what was dropped."""

    vocab: GeneVocab
    column_of: tuple[np.ndarray, ...]
    report: dict[str, Any]


def join_genes(sources: Sequence[SourceGenes], how: Join, namespace: Namespace | None, table: str) -> JoinedGenes:
    """One source keeps its gene names; several are joined by them, the first one's order first.

    namespace: of the vocabulary; None takes the sources' own, which must then agree
    table: CSV with the columns `ensembl` and `symbol`, needed where a source has another namespace
    Raises: InputError where namespaces differ and there is no table, or where no gene is left.
    """
    namespace = namespace or sources[0].namespace
    strange = [s for s in sources if s.namespace != namespace]
    if strange and not table:
        raise InputError(
            f"{strange[0].uri}: its genes are named by {strange[0].namespace} ids (such as {strange[0].ids[0]!r}), the "
            f"vocabulary's by {namespace}; source.gene_table=CSV with the columns ensembl and symbol translates them"
        )
    translation = _read_table(Path(table), namespace) if strange else {}
    names, ambiguous, unknown = [], {}, {}
    for s in sources:
        if s.namespace == namespace:
            names.append(list(s.ids))
            continue
        new: list[str | None] = [translation.get(g) for g in s.ids]
        times = Counter(g for g in new if g is not None)
        unknown[s.uri] = sum(g is None for g in new)
        ambiguous[s.uri] = sum(times[g] > 1 for g in new if g is not None)
        names.append([g if g is not None and times[g] == 1 else None for g in new])
    if how == "union":
        ids = list(dict.fromkeys(g for column in names for g in column if g is not None))
    else:
        in_all = set(names[0]).intersection(*names[1:])
        ids = [g for g in names[0] if g is not None and g in in_all]
    if not ids:
        raise InputError(
            f"no gene is in all {len(sources)} sources (source.join=intersection); are their ids of one kind?"
        )
    place = {g: k for k, g in enumerate(ids)}
    column_of = tuple(
        np.fromiter((-1 if g is None else place.get(g, -1) for g in column), np.int32, len(column)) for column in names
    )
    report = {
        "join": how if len(sources) > 1 else "",
        "not_in_vocabulary": {s.uri: int((c < 0).sum()) for s, c in zip(sources, column_of) if (c < 0).any()},
        "not_in_table": unknown,
        "ambiguous_in_table": ambiguous,
    }
    return JoinedGenes(GeneVocab(tuple(ids), namespace), column_of, {k: v for k, v in report.items() if v})


def _read_table(path: Path, to: Namespace) -> dict[str, str]:
    """Gene id of the other namespace -> id of this one; ids that the table gives twice are left out."""
    if not path.is_file():
        raise InputError(f"source.gene_table: {path}: no such file")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if not {"ensembl", "symbol"} <= set(reader.fieldnames or ()):
            raise InputError(
                f"source.gene_table: {path}: needs the columns ensembl and symbol, has {reader.fieldnames}"
            )
        rows = [(row["ensembl"], row["symbol"]) for row in reader if row["ensembl"] and row["symbol"]]
    pairs = {(s, e) if to == "ensembl" else (e, s) for e, s in rows}
    times = Counter(old for old, _ in pairs)
    return {old: new for old, new in pairs if times[old] == 1}


def choose(joined: JoinedGenes, keep: np.ndarray, why: str) -> JoinedGenes:
    """The vocabulary's genes where `keep` (n_genes,) is True, in order.

    Raises: InputError where none is left.
    """
    if not keep.any():
        raise InputError(f"no gene is left by {why}")
    ids = joined.vocab.ids
    vocab = GeneVocab(tuple(g for g, k in zip(ids, keep) if k), joined.vocab.namespace)
    place = np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32)
    column_of = tuple(np.where(c >= 0, place[c], -1).astype(np.int32) for c in joined.column_of)
    return JoinedGenes(vocab, column_of, {**joined.report, why: int((~keep).sum())})


def in_list(vocab: GeneVocab, path: Path) -> tuple[np.ndarray, int]:
    """Which genes of a vocabulary a file names (one id a line), and how many of its ids the vocabulary lacks."""
    if not path.is_file():
        raise InputError(f"filter.gene_list: {path}: no such file")
    wanted = {line.strip() for line in path.read_text().splitlines() if line.strip()}
    keep = np.fromiter((g in wanted for g in vocab.ids), bool, vocab.n_genes)
    return keep, len(wanted) - int(keep.sum())
