"""The plan of a conversion: every choice, made before a count is read, and kept so that any process can go on with it.

A plan lies in the work folder as plan.json and arrays of one value per chosen cell, in source order. It appears by one
rename, so that of several tasks that start together the first one's plan is everybody's.

Reading order: settings and their differences, Plan, make_plan.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.convert.config import ShardsWriteConfig
from data_pipeline.convert.genes import JoinedGenes, choose, in_list, join_genes
from data_pipeline.convert.open import csc_groups, open_sources
from data_pipeline.convert.shuffle import set_positions
from data_pipeline.convert.source import SourceSpec
from data_pipeline.convert.splits import columns_of, draw_splits
from data_pipeline.format.schema import VERSION, condition_dtype
from scldm.errors import InputError
from scldm.files import flat, made_aside, sha256_of
from scldm.given_json import read_sealed, sealed
from scldm.vocab import ConditionVocab, GeneVocab

UNIT_CELLS = 1 << 15  # cells that one process reads and scatters before it notes that they are done


# --- settings ------------------------------------------------------------------------------------------------------

VOLATILE = ("out", "memory", "workers", "task", "finish", "work")  # what the bytes of a set don't depend on


def settings_of(config: ShardsWriteConfig) -> dict[str, Any]:
    """All that the set's bytes depend on, but for the sources: as JSON holds it, for the manifest and to compare."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in VOLATILE}
    files = {
        "source.gene_table": config.source.gene_table,
        "filter.gene_list": config.filter.gene_list,
        "split.held_out": config.split.held_out,
    }
    digests = {}
    for key, path in files.items():
        if path:
            if not Path(path).is_file():
                raise InputError(f"{key}: {path}: no such file")
            _, digests[key] = sha256_of(Path(path))
    return json.loads(json.dumps({**settings, "sha256": digests}))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Where two settings differ, as `key: was ..., is ...`."""
    was, is_ = dict(flat(before)), dict(flat(now))
    differ = sorted(key for key in {*was, *is_} if was.get(key) != is_.get(key))
    return [f"{key}: was {was.get(key)!r}, is {is_.get(key)!r}" for key in differ]


def tool_versions() -> dict[str, str]:
    versions = {"format": str(VERSION)}
    for name in ("scldm", "numpy", "zstandard", "lz4", "h5py", "anndata", "tiledbsoma", "cellxgene-census"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


# --- plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """What plan.json says, with a hash of its own.

    units: (source, first cell, end) of every share of reading, cells counted in source order
    csc_groups: for each source, the column groups of a CSC matrix, or ()
    """

    settings: dict[str, Any]
    tools: dict[str, str]
    sources: tuple[SourceSpec, ...]
    units: tuple[tuple[int, int, int], ...]
    csc_groups: tuple[tuple[tuple[int, int], ...], ...]
    genes: GeneVocab
    conditions: ConditionVocab
    splits: tuple[str, ...]
    split_rule: dict[str, Any]
    report: dict[str, Any]


@dataclass(frozen=True)
class _GeneIds:
    """What gene_ids.N.json says."""

    ids: list[str]


@dataclass(frozen=True, kw_only=True)
class Plan(_Chosen):
    """A plan, read from its folder. The arrays are memory-mapped."""

    folder: Path

    @property
    def n_cells(self) -> int:
        return self.units[-1][2]

    def array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    @cached_property
    def row(self) -> np.ndarray:
        """Row or joinid of each cell, int64."""
        return self.array("row")

    @cached_property
    def split(self) -> np.ndarray:
        return self.array("split")

    @cached_property
    def position(self) -> np.ndarray:
        """Each cell's position in set order, as if none were dropped."""
        return self.array("position")

    @cached_property
    def cell_at(self) -> np.ndarray:
        """The cell at each position: `position` the other way round."""
        return self.array("cell_at")

    @cached_property
    def source(self) -> np.ndarray:
        out = np.empty(self.n_cells, np.uint16)
        for number, low, high in self.units:
            out[low:high] = number
        return out

    @cached_property
    def condition_ids(self) -> tuple[np.ndarray, ...]:
        return tuple(self.array(f"condition.{k}") for k in range(len(self.conditions.names)))

    def column_of(self, source: int) -> np.ndarray:
        """Source column -> column of `genes`, before genes are chosen by their counts."""
        return self.array(f"column_of.{source}")

    def gene_ids(self, source: int) -> list[str]:
        """Of its columns. Raises: InputError for a file that is damaged."""
        return read_sealed(_GeneIds, self.folder / f"gene_ids.{source}.json").ids

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Raises: InputError for a file that is damaged."""
        return cls(folder=folder, **vars(read_sealed(_Chosen, folder / "plan.json")))


def make_plan(config: ShardsWriteConfig, folder: Path) -> Plan:
    """The plan of a config, found in the folder or made there.

    Raises: InputError where the folder has another command's plan, or the sources aren't what they were. Also for
        what is wrong with sources, filters, conditions or splits.
    """
    settings = settings_of(config)
    if not folder.is_dir():
        with made_aside(folder, replaces=False) as draft:  # another task may be faster
            _draft_plan(config, settings, draft)
    plan = Plan.load(folder)
    differ = differences({**plan.settings, "tools": plan.tools}, {**settings, "tools": tool_versions()})
    if differ:
        raise InputError(
            f"{folder.parent}: holds unfinished work of another command: {'; '.join(differ)}. "
            f"Give another out, or remove {config.out}"
        )
    changed = [s.uri for s in plan.sources if s.has_changed]
    if changed:
        raise InputError(f"{changed[0]}: has changed since this command was begun. Remove {config.out} to start over")
    return plan


def _draft_plan(config: ShardsWriteConfig, settings: dict[str, Any], folder: Path) -> None:
    columns = tuple(dict.fromkeys([*config.conditions, *columns_of(config.split)]))
    sources = open_sources(config.source, columns, config.missing)
    if len(sources) > 1 << 16:
        raise InputError(f"{len(sources)} sources. A shard set names at most 65,536")
    namespace = None if config.source.namespace == "auto" else config.source.namespace
    joined = join_genes(
        [s.genes for s in sources],
        config.source.join,
        namespace,
        config.source.gene_table,
        config.source.min_gene_share,
    )
    joined = _choose_genes(config, joined, [s.keep_gene for s in sources])

    counts = [len(s.rows) for s in sources]
    source = np.repeat(np.arange(len(sources), dtype=np.uint16), counts)
    row = np.concatenate([s.rows for s in sources])
    obs = {c: np.concatenate([s.obs[c].to_numpy(object) for s in sources]) for c in columns}
    arrays: dict[str, np.ndarray] = {"row": row}
    labels: dict[str, tuple[str, ...]] = {}
    for k, name in enumerate(config.conditions):
        ids, known = pd.factorize(obs[name], sort=True)  # np.unique would take every text at the longest one's width
        if len(known) > config.max_labels:
            raise InputError(
                f"conditions: obs column {name!r} has {len(known):,} labels for {len(row):,} cells, such as "
                f"{str(known[0])!r}. A condition may have {config.max_labels:,} (max_labels)"
            )
        labels[name] = tuple(known.tolist())
        arrays[f"condition.{k}"] = ids.astype(condition_dtype(len(known)))
    split, names, rule = draw_splits(config.split, config.seed, pd.DataFrame(obs), source, row)
    arrays["split"] = split
    arrays["position"] = set_positions(split, config.seed, source, row)
    arrays["cell_at"] = np.empty(len(row), np.int64)
    arrays["cell_at"][arrays["position"]] = np.arange(len(row))
    arrays |= {f"column_of.{k}": c for k, c in enumerate(joined.column_of)}

    units, start = [], 0
    for number, n in enumerate(counts):
        units += [(number, start + a, start + min(a + UNIT_CELLS, n)) for a in range(0, n, UNIT_CELLS)]
        start += n
    specs = tuple(s.spec for s in sources)
    report: dict[str, Any] = {"genes": joined.report}
    for key in ("cells_not_selected", "genes_not_selected"):
        report[key] = {s.genes.uri: s.report[key] for s in sources if s.report[key]}
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    for number, s in enumerate(sources):
        (folder / f"gene_ids.{number}.json").write_text(json.dumps(sealed({"ids": s.genes.ids})))
    obj = {
        "settings": settings,
        "tools": tool_versions(),
        "sources": [s.to_json() for s in specs],
        "units": units,
        "csc_groups": [csc_groups(s, config.process_bytes // 8) for s in specs],
        "genes": joined.vocab.to_json(),
        "conditions": labels,
        "splits": names,
        "split_rule": rule,
        "report": {k: v for k, v in report.items() if v},
    }
    (folder / "plan.json").write_text(json.dumps(sealed(obj)))  # in their order: conditions have one


def _choose_genes(config: ShardsWriteConfig, joined: JoinedGenes, keep_gene: list[np.ndarray]) -> JoinedGenes:
    """The genes that var_filter (of any source) and gene_list leave."""
    if config.source.var_filter:
        keep = np.zeros(joined.vocab.n_genes, bool)
        for kept, column_of in zip(keep_gene, joined.column_of):
            chosen = column_of[: len(kept)][kept]
            keep[chosen[chosen >= 0]] = True
        joined = choose(joined, keep, "source.var_filter")
    if config.filter.gene_list:
        keep, unknown = in_list(joined.vocab, Path(config.filter.gene_list))
        joined = choose(joined, keep, "filter.gene_list")
        if unknown:
            joined.report["filter.gene_list, not in the sources"] = len(unknown)
            some = f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}"
            print(f"filter.gene_list={config.filter.gene_list}: {len(unknown):,} of its ids are in no source: {some}")
    return joined
