"""Vocabularies: which gene is index 17, which label of a condition is id 3. JSON on disk. It needs numpy alone.

Reading order: ids of genes, GeneVocab and GeneMatch, ConditionVocab.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from scldm.errors import InputError
from scldm.given_json import JsonFile, typed
from scldm.label_text import known_label

Namespace = Literal["ensembl", "symbol"]
PADDING = 0
FEW_LABELS = 10  # so many are all listed where one is unknown
ENSEMBL = re.compile(r"(ENS[A-Z]*G)(\d{6,})(\.\d+)?")  # ENSG00000139618.19, ENSMUSG00000041147
MIN_GENE_SHARE = 0.1  # of a model's genes that a file must have: with fewer, most likely the ids are of another kind


def namespace_of(ids: Sequence[str]) -> Namespace:
    """`ensembl` where most ids look like ENSG00000139618 or ENSMUSG00000041147, else `symbol`."""
    return "ensembl" if sum(bool(ENSEMBL.fullmatch(g)) for g in ids) * 2 > len(ids) else "symbol"


def without_version(gene: str) -> str:
    """ENSG00000139618.19 is ENSG00000139618 in another release. Every other id is itself."""
    found = ENSEMBL.fullmatch(gene)
    return f"{found[1]}{found[2]}" if found else gene


def unversioned(ids: Sequence[str]) -> tuple[str, ...]:
    """Ids without versions. As they are where two would then be one."""
    bare = tuple(map(without_version, ids))
    return bare if len(set(bare)) == len(set(ids)) else tuple(ids)


def stands_twice(ids: Sequence[str]) -> str | None:
    """The first id that stands before it too."""
    seen: set[str] = set()
    return None if len(set(ids)) == len(ids) else next(g for g in ids if g in seen or seen.add(g))


def why_few(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """A guess why ids of genes don't meet, to end a message with. Empty where there is none."""
    kinds = namespace_of(theirs), namespace_of(ours)
    if kinds[0] != kinds[1]:
        named = {"ensembl": "Ensembl ids", "symbol": "symbols"}
        return f": {named[kinds[0]]} here, {named[kinds[1]]} there"
    if kinds[0] == "ensembl":
        prefix, own = (
            Counter(m[1] for g in ids if (m := ENSEMBL.fullmatch(g))).most_common(1)[0][0] for ids in (theirs, ours)
        )
        return f". Ids of another species: {prefix}... here, {own}... there" if prefix != own else ""
    exact, folded = len(set(theirs) & set(ours)), len({g.upper() for g in theirs} & {g.upper() for g in ours})
    if folded > 2 * exact:
        return f". {folded:,} match but for upper and lower case, in which symbols of mouse and human differ"
    return ""


@dataclass(frozen=True)
class _StoredGenes:
    ids: tuple[str, ...]
    namespace: Namespace
    hash: str


@dataclass(frozen=True)
class GeneVocab(JsonFile):
    """The genes of a run. Index 0 is padding. Gene `ids[k]` has index k + 1.

    ids: the source's gene ids, without duplicates
    namespace: what the ids are, `ensembl` or `symbol`
    """

    ids: tuple[str, ...]
    namespace: Namespace

    def __post_init__(self) -> None:
        if (twice := stands_twice(self.ids)) is not None:
            raise InputError(f"gene vocabulary: {twice!r} stands twice. Gene ids must be unique")

    @property
    def n_genes(self) -> int:
        return len(self.ids)

    @property
    def table_size(self) -> int:
        """Rows of an embedding table: one per gene and one for padding."""
        return self.n_genes + 1

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Of every id, and of those without their version that stand for one gene."""
        times = Counter(map(without_version, self.ids))
        bare = {b: k + 1 for k, gene in enumerate(self.ids) if times[b := without_version(gene)] == 1}
        return bare | {gene: k + 1 for k, gene in enumerate(self.ids)}

    def lookup(self, ids: Iterable[str]) -> np.ndarray:
        """Vocabulary indices of gene ids, int64, whatever the version of an Ensembl id. 0 where the vocabulary lacks
        the gene."""
        index = self.index_of
        return np.fromiter((index.get(g, 0) or index.get(without_version(g), PADDING) for g in ids), dtype=np.int64)

    def places(self, genes: Sequence[str]) -> np.ndarray:
        """Where genes stand among these, int64. Raises: InputError for one that is unknown."""
        index = self.lookup(genes)
        if (index == PADDING).any():
            raise InputError(f"gene {genes[int(np.argmin(index))]!r} is not among the model's {self.n_genes}")
        return index - 1

    def match(self, ids: Sequence[str], what: str, min_share: float) -> GeneMatch:
        """The genes of a file among these.

        what: how messages call the file
        min_share: of these genes that the file must have. Fewer, and no gene at all, are refused
        Raises: InputError for that, with a guess at the cause, and where two of the file's ids are one gene.
        """
        index = self.lookup(ids)
        found = GeneMatch(index, len(set(index.tolist()) - {PADDING}), self.n_genes)
        if not found.n_matched or found.n_matched < min_share * self.n_genes:
            named = f"They are named like {ids[0]!r}, the model's like {self.ids[0]!r}"
            raise InputError(
                f"{what}: {found}, and at least {100 * min_share:.3g} % are needed (min_gene_share={min_share:g}). "
                f"{named}{why_few(ids, self.ids)}"
            )
        times = Counter(index[index != PADDING].tolist())
        if twice := next((k for k, n in times.items() if n > 1), 0):
            both = [g for g, k in zip(ids, index) if k == twice]
            raise InputError(f"{what}: {both[0]!r} and {both[1]!r} are one gene. Keep one of them, or add them up")
        return found

    @cached_property
    def hash(self) -> str:
        """SHA-256 over namespace and ids in order: two runs with equal hashes agree on every index."""
        text = "\n".join([self.namespace, *self.ids])
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict:
        return {"namespace": self.namespace, "ids": list(self.ids), "hash": self.hash}

    @classmethod
    def from_json(cls, obj: Any, where: str = "gene vocabulary") -> GeneVocab:
        """Raises: InputError for anything else, and where the stored hash is not that of the stored genes."""
        stored = typed(_StoredGenes, obj, where)
        try:
            vocab = cls(stored.ids, stored.namespace)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if stored.hash != vocab.hash:
            raise InputError(f"{where}: hash {stored.hash!r} does not match its {vocab.n_genes} genes ({vocab.hash})")
        return vocab


@dataclass(frozen=True)
class GeneMatch:
    """Which genes of a vocabulary a file has: index_n of each of the file's genes, PADDING where there is none."""

    index_n: np.ndarray
    n_matched: int
    n_genes: int

    def __str__(self) -> str:
        return f"{self.n_matched:,} of {self.n_genes:,} genes matched ({100 * self.n_matched / self.n_genes:.0f} %)"

    def to_json(self) -> dict[str, int]:
        """What is kept of it beside results."""
        return {"genes_matched": self.n_matched, "genes_of_model": self.n_genes, "genes_of_file": len(self.index_n)}


@dataclass(frozen=True)
class ConditionVocab(JsonFile):
    """The labels of every condition: id k of condition `name` is `labels[name][k]`.

    labels: condition name -> its labels. {} for an unconditional model
    """

    labels: dict[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.labels)

    def n_labels(self, name: str) -> int:
        return len(self.labels[name])

    @cached_property
    def index_of(self) -> dict[str, dict[str, int]]:
        return {name: {label: k for k, label in enumerate(labels)} for name, labels in self.labels.items()}

    def encode(self, name: str, values: Sequence[str]) -> np.ndarray:
        """Ids of labels of one condition, int64.

        Raises: InputError for a condition or a label that the vocabulary lacks, with the nearest that it has.
        """
        if name not in self.labels:
            raise InputError(f"condition {name!r} is unknown. The model knows {', '.join(self.labels) or 'none'}")
        index = self.index_of[name]
        known = {value: known_label(value, index) for value in set(values)}
        for value in values:
            if known[value] not in index:
                if len(index) <= FEW_LABELS:
                    told = f"It has {', '.join(map(repr, index))}"
                else:
                    near = difflib.get_close_matches(str(value), self.labels[name], n=3, cutoff=0.3)
                    told = f"Nearest of its {len(index)}: {', '.join(map(repr, near or self.labels[name][:5]))}"
                raise InputError(f"condition {name!r} has no label {value!r}. {told}")
        return np.fromiter((index[known[v]] for v in values), dtype=np.int64, count=len(values))

    def require(self, name: str, key: str) -> None:
        """Raises: InputError for a condition that a shard set, whose vocabulary this is, lacks. key: that names it"""
        if name not in self.labels:
            raise InputError(f"{key}: condition {name!r} is unknown. The set has {', '.join(self.labels) or 'none'}")

    def decode(self, name: str, ids: Iterable[int]) -> list[str]:
        return [self.labels[name][k] for k in ids]

    def to_json(self) -> dict:
        return {name: list(labels) for name, labels in self.labels.items()}

    @classmethod
    def from_json(cls, obj: Any, where: str = "condition vocabulary") -> ConditionVocab:
        """Raises: InputError for anything else, and for a label that stands twice."""
        vocab = cls(typed(dict[str, tuple[str, ...]], obj, where))
        for name, labels in vocab.labels.items():
            if len(set(labels)) < len(labels):
                raise InputError(f"{where}: {name}: a label stands twice")
        return vocab
