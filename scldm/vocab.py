"""Vocabularies: which gene is index 17, which label of a condition is id 3. JSON on disk; stdlib and numpy only.

Reading order: GeneVocab, ConditionVocab.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scldm.errors import InputError, read_json
from scldm.given_json import typed

Namespace = Literal["ensembl", "symbol"]
PADDING = 0


@dataclass(frozen=True)
class _StoredGenes:
    ids: tuple[str, ...]
    namespace: Namespace
    hash: str


@dataclass(frozen=True)
class GeneVocab:
    """The genes of a run. Index 0 is padding; gene `ids[k]` has index k + 1.

    ids: the source's gene ids, without duplicates
    namespace: what the ids are, `ensembl` or `symbol`
    """

    ids: tuple[str, ...]
    namespace: Namespace

    def __post_init__(self) -> None:
        if len(set(self.ids)) < len(self.ids):
            seen: set[str] = set()
            twice = next(g for g in self.ids if g in seen or seen.add(g))
            raise InputError(f"gene vocabulary: {twice!r} stands twice; gene ids must be unique")

    @property
    def n_genes(self) -> int:
        return len(self.ids)

    @property
    def table_size(self) -> int:
        """Rows of an embedding table: one per gene and one for padding."""
        return self.n_genes + 1

    @cached_property
    def index_of(self) -> dict[str, int]:
        return {gene: k + 1 for k, gene in enumerate(self.ids)}

    def lookup(self, ids: Iterable[str]) -> np.ndarray:
        """Vocabulary indices of gene ids, int64; 0 where the vocabulary lacks the gene."""
        return np.fromiter((self.index_of.get(g, PADDING) for g in ids), dtype=np.int64)

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

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: Path) -> GeneVocab:
        return cls.from_json(read_json(path), str(path))


@dataclass(frozen=True)
class ConditionVocab:
    """The labels of every condition: id k of condition `name` is `labels[name][k]`.

    labels: condition name -> its labels; {} for an unconditional model
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
            raise InputError(f"condition {name!r} is unknown; the model knows {', '.join(self.labels) or 'none'}")
        index = self.index_of[name]
        for value in values:
            if value not in index:
                near = difflib.get_close_matches(str(value), self.labels[name], n=3, cutoff=0.3)
                told = ", ".join(map(repr, near or self.labels[name][:5]))
                raise InputError(f"condition {name!r} has no label {value!r}; nearest of its {len(index)}: {told}")
        return np.fromiter((index[v] for v in values), dtype=np.int64, count=len(values))

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

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: Path) -> ConditionVocab:
        return cls.from_json(read_json(path), str(path))
