"""Genes of several sources as one vocabulary, joined by name in one namespace. What has no place is counted."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.convert.config import Join
from scldm.errors import InputError, read_text
from scldm.label_text import texts
from scldm.vocab import MIN_GENE_SHARE, GeneVocab, Namespace, namespace_of, why_few, without_version


def gene_names(names: Iterable[object]) -> tuple[str, ...]:
    """Ids of genes as they are joined: without a version. A gene without a name has an empty text."""
    values = pd.Series(list(names), dtype=object)
    return tuple("" if gone else without_version(text.strip()) for text, gone in zip(texts(values), values.isna()))


def check_whole(place: str, ids: Iterable[str]) -> None:
    """Raises: InputError for ids that are no line of a file."""
    if broken := [g for g in ids if g.splitlines() not in ([g], []) or "\0" in g]:
        raise InputError(
            f"{place}: {len(broken)} gene ids hold a line break or NUL, such as {broken[0]!r}. Rename them"
        )


@dataclass(frozen=True)
class SourceGenes:
    """The gene ids of a source's columns, in their order, as `gene_names` gives them. An empty one is dropped.

    n_versions: Ensembl ids that had a version
    """

    uri: str
    ids: tuple[str, ...]
    namespace: Namespace
    n_versions: int = 0

    @classmethod
    def of(cls, uri: str, names: Iterable[object]) -> SourceGenes:
        """Of the names as the source has them."""
        names = list(names)
        ids = gene_names(names)
        n_versions = sum(bool(g) and str(name).strip() != g and g in str(name) for g, name in zip(ids, names))
        return cls(uri, ids, namespace_of(ids), n_versions)

    def __post_init__(self) -> None:
        twice = [g for g, n in Counter(self.ids).items() if n > 1 and g]
        if twice:
            some = ", ".join(map(repr, twice[:3]))
            raise InputError(
                f"{self.uri}: {len(twice)} gene ids stand more than once, such as {some} (Ensembl ids without their "
                "version). Name a column of var with unique ids as source.gene_column, or make them unique"
            )
        check_whole(self.uri, self.ids)
        if not any(self.ids):
            raise InputError(f"{self.uri}: no gene has a name. Give source.gene_column, a column of var with ids")


@dataclass(frozen=True)
class JoinedGenes:
    """A vocabulary, and for each source its columns' places in it (int32, -1: dropped). report: what was dropped."""

    vocab: GeneVocab
    column_of: tuple[np.ndarray, ...]
    report: dict[str, Any]


def join_genes(
    sources: Sequence[SourceGenes],
    how: Join,
    namespace: Namespace | None,
    table: str,
    min_share: float = MIN_GENE_SHARE,
) -> JoinedGenes:
    """One source keeps its gene names. Several are joined by their names, in the order of the first one.

    namespace: of the vocabulary. None takes the sources' own, which must then agree
    table: CSV with the columns `ensembl` and `symbol`, needed where a source has another namespace
    min_share: of the smallest source's genes that the others must have, where only those of all are taken
    Raises: InputError where namespaces differ and there is no table, or where no gene or too few are left.
    """
    namespace = namespace or sources[0].namespace
    strange = [s for s in sources if s.namespace != namespace]
    if strange and not table:
        raise InputError(
            f"{strange[0].uri}: its genes are named by {strange[0].namespace} ids (such as {strange[0].ids[0]!r}), the "
            f"vocabulary's by {namespace}. source.gene_table=CSV, with the columns ensembl and symbol, translates them"
        )
    translation = _read_table(Path(table), namespace) if strange else {}
    names, ambiguous, unknown = [], {}, {}
    for s in sources:
        if s.namespace == namespace:
            names.append([g or None for g in s.ids])
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
    named, fewest = min((sum(g is not None for g in of), k) for k, of in enumerate(names))
    if not ids or len(ids) < min_share * named:
        other = 1 if fewest == 0 and len(sources) > 1 else 0
        why = why_few([g for g in sources[fewest].ids if g], [g for g in sources[other].ids if g])
        raise InputError(
            f"{len(ids):,} of {named:,} genes of {sources[fewest].uri} are in all {len(sources)} sources "
            f"(source.join=intersection), less than what is needed (source.min_gene_share={min_share:g}){why}"
        )
    place = {g: k for k, g in enumerate(ids)}
    column_of = tuple(
        np.fromiter((-1 if g is None else place.get(g, -1) for g in column), np.int32, len(column)) for column in names
    )
    report = {
        "join": how if len(sources) > 1 else "",
        "not_in_vocabulary": {s.uri: int((c < 0).sum()) for s, c in zip(sources, column_of) if (c < 0).any()},
        "without_name": {s.uri: n for s in sources if (n := s.ids.count(""))},
        "without_version": {s.uri: s.n_versions for s in sources if s.n_versions},
        "not_in_table": unknown,
        "ambiguous_in_table": ambiguous,
    }
    return JoinedGenes(GeneVocab(tuple(ids), namespace), column_of, {k: v for k, v in report.items() if v})


def _read_table(path: Path, to: Namespace) -> dict[str, str]:
    """Gene id of the other namespace -> id of this one. Ids that the table gives twice are left out."""
    if not path.is_file():
        raise InputError(f"source.gene_table: {path}: no such file")
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    pairs = set()
    try:
        columns = list(reader.fieldnames or ())
        if not columns.count("ensembl") == columns.count("symbol") == 1:
            raise InputError(f"source.gene_table: {path}: needs a column ensembl and a column symbol, has {columns}")
        for row in reader:
            if row["ensembl"] and row["symbol"]:
                check_whole(f"source.gene_table: {path}: row {reader.line_num}", (row["ensembl"], row["symbol"]))
                e, s = without_version(row["ensembl"]), row["symbol"]
                pairs.add((s, e) if to == "ensembl" else (e, s))
    except csv.Error as error:
        raise InputError(f"source.gene_table: {path}: row {reader.line_num + 1}: no CSV: {error}") from None
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


def in_list(vocab: GeneVocab, path: Path) -> tuple[np.ndarray, list[str]]:
    """Which genes of a vocabulary a file names (one id a line), and those of its ids that the vocabulary lacks."""
    if not path.is_file():
        raise InputError(f"filter.gene_list: {path}: no such file")
    wanted = {without_version(line.strip()) for line in read_text(path).splitlines() if line.strip()}
    keep = np.fromiter((g in wanted for g in vocab.ids), bool, vocab.n_genes)
    return keep, sorted(wanted - set(vocab.ids))
