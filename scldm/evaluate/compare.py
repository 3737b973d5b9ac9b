"""Everything that is known about one set of generated cells, as a dict that JSON can hold; report.py draws it.

Reading order: config, cells, who is compared with whom, compare, the 2-D map.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass

import numpy as np
import scipy.sparse as sp

from scldm.errors import InputError
from scldm.evaluate import markers, rivals
from scldm.evaluate.metrics import N_COMPONENTS, TARGET_SUM, Profile, fit_pca, gene_moments, log_normalise, subsample
from scldm.evaluate.sample import SPLITS
from scldm.progress import Progress

MAP_CELLS = 5_000  # a side; more are only ink
NO_TYPE = ""  # of all cells where no condition tells them apart; no label is empty


@dataclass(frozen=True)
class EvaluateConfig:
    """How generated cells are judged.

    seed: of every random draw: floor, rivals, subsamples, UMAP
    n_draws: how often the floor and each rival are drawn; tables give their mean and standard deviation
    min_cells: types with at least this many test cells are scored one by one; all cells at once need as many
    max_cells: MMD2, W2 and 1-NN accuracy compare at most so many cells a side
    max_real_cells: of each split at most so many cells are taken, a seeded draw that has the types in the shares at
        which they are compared: 100,000 cells of 3,000 expressed genes take 2.4 GB
    """

    seed: int = 0
    n_draws: int = 10
    min_cells: int = 20
    max_cells: int = 2_000
    max_real_cells: int = 100_000

    def __post_init__(self) -> None:
        for key, least in (("n_draws", 2), ("min_cells", 3), ("max_cells", 100), ("max_real_cells", 1_000)):
            if getattr(self, key) < least:
                raise InputError(f"evaluate.{key}={getattr(self, key)} must be at least {least}")


# --- cells ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """Cells of one source.

    counts: raw counts, CSR (cells, genes)
    types: label of the condition per cell, (cells,) str; all NO_TYPE where there is no condition
    genes: gene ids of the columns
    name: how messages call them
    drawn_of: cells of the split that they were drawn from; 0 where they are all of it

    Raises: InputError where the counts are not counts or a gene stands twice.
    """

    counts: sp.csr_matrix
    types: np.ndarray
    genes: tuple[str, ...]
    name: str
    drawn_of: int = 0

    def __post_init__(self) -> None:
        assert self.counts.shape == (len(self.types), len(self.genes)), self.name
        values = self.counts.data
        wrong = values[(values < 0) | (values != np.floor(values)) | ~np.isfinite(values)]
        if len(wrong):
            raise InputError(
                f"{self.name}: the matrix holds {wrong[0]:g}, which is not a count; "
                "give raw counts (integers from 0), not normalised ones"
            )
        if len(set(self.genes)) < len(self.genes):
            seen: set[str] = set()
            twice = next(g for g in self.genes if g in seen or seen.add(g))
            raise InputError(f"{self.name}: gene {twice!r} stands twice; gene ids must be unique")

    def select(self, rows: np.ndarray) -> Cells:
        return Cells(self.counts[rows], self.types[rows], self.genes, self.name)

    def numbers(self) -> dict[str, int]:
        """Cells per type, most first."""
        labels, n = np.unique(self.types, return_counts=True)
        return {str(labels[k]): int(n[k]) for k in np.argsort(-n, kind="stable")}


def common_genes(real: Cells, generated: Cells) -> tuple[str, ...]:
    """The genes of both, in the real cells' order.

    Raises: InputError where there are none.
    """
    theirs = set(generated.genes)
    common = tuple(g for g in real.genes if g in theirs)
    if not common:
        raise InputError(
            f"{generated.name} and {real.name} have no gene in common: {', '.join(generated.genes[:3])} ... against "
            f"{', '.join(real.genes[:3])} ...; both must name genes alike (Ensembl ids, or symbols)"
        )
    return common


def with_genes(cells: Cells, genes: tuple[str, ...]) -> Cells:
    """The cells with these genes as columns."""
    if cells.genes == genes:
        return cells
    column = {g: k for k, g in enumerate(cells.genes)}
    return Cells(cells.counts[:, [column[g] for g in genes]], cells.types, genes, cells.name)


# --- who is compared with whom -------------------------------------------------------------------------------------


def matched_numbers(train: Cells, test: Cells, generated: Cells) -> dict[str, int]:
    """Cells per type at which everything is compared: the test split's, or fewer where fewer were generated or trained
    on. Distances of finite samples depend on their size, and pooled ones on the mix of types.

    Raises: InputError for a set without cells, and for a type of the test split that was not generated or not trained
    on.
    """
    for cells in (test, generated, train):
        if not len(cells.types):
            raise InputError(f"{cells.name} holds no cells")
    n_test, n_generated, n_train = (cells.numbers() for cells in (test, generated, train))
    missing = [t for t in n_test if t not in n_generated]
    if missing:
        raise InputError(
            f"{generated.name} has no cells of {_names(missing)}, which the test split holds; generate some of every "
            f"type, or leave the type out of the real cells (generated: {_names(list(n_generated))})"
        )
    missing = [t for t in n_test if t not in n_train]
    if missing:
        raise InputError(f"{train.name} has no cells of {_names(missing)}: floor and rivals are drawn from them")
    return {t: min(n, n_generated[t], n_train[t]) for t, n in n_test.items()}


def scored_types(numbers: dict[str, int], min_cells: int) -> tuple[list[str], str]:
    """The types that are scored one by one; where there are none, also the sentence that says why.

    Raises: InputError for fewer cells of all types together than one type needs.
    """
    if (n := sum(numbers.values())) < min_cells:
        raise InputError(
            f"only {n} cells to compare (test, generated and training cells all count), and "
            f"evaluate.min_cells={min_cells} are needed; give more cells, or set it lower"
        )
    if NO_TYPE in numbers:
        return [], (
            "No condition was given, so that all cells count as one type: scores are pooled only, and there are no "
            "marker genes."
        )
    scored = [t for t, n in numbers.items() if n >= min_cells]
    if scored:
        return scored, ""
    most = max(numbers, key=lambda t: numbers[t])
    return [], (
        f"No type has {min_cells} cells to compare (the most are {numbers[most]} of {most!r}), so that scores are "
        "pooled only; evaluate.min_cells lowers that number."
    )


def _names(labels: list[str], shown: int = 5) -> str:
    more = f" and {len(labels) - shown} more" if len(labels) > shown else ""
    return ", ".join(map(repr, labels[:shown])) + more


# --- compare -------------------------------------------------------------------------------------------------------


def compare(train: Cells, validation: Cells, test: Cells, generated: Cells, config: EvaluateConfig) -> dict:
    """Scores with floor and rivals, marker genes, and what the figures need; JSON-ready, every list in a stated order.

    Without a type of enough cells, `pooled_only` says so and the scores per type are absent; without types, all that
    speaks of types is.

    Raises: InputError for cells that can't be compared.
    """
    if len(validation.types) <= N_COMPONENTS:
        raise InputError(
            f"{validation.name}: {len(validation.types)} validation cells, and at least {N_COMPONENTS + 1} are needed: "
            f"{N_COMPONENTS} principal components are fitted on them, because cells that were trained on or are judged "
            "would bend the scale; put more cells into that split"
        )
    n_genes = {"real": len(train.genes), "generated": len(generated.genes)}
    drawn_of = {split: of.drawn_of for split, of in zip(SPLITS, (train, validation, test)) if of.drawn_of}
    genes = common_genes(train, generated)
    train, validation, test, generated = (with_genes(cells, genes) for cells in (train, validation, test, generated))
    numbers = matched_numbers(train, test, generated)
    scored, pooled_only = scored_types(numbers, config.min_cells)
    typed = NO_TYPE not in numbers
    found = {c: cells.numbers() for c, cells in (("train", train), ("test", test), ("generated", generated))}
    pca = fit_pca(log_normalise(validation.counts), N_COMPONENTS, config.seed)

    def rng(*key: int) -> np.random.Generator:
        return np.random.default_rng([config.seed, *key])

    test = test.select(rivals.rows_per_type(test.types, numbers, rng(0)))
    generated = generated.select(rivals.rows_per_type(generated.types, numbers, rng(1)))
    profiles = {
        "real": Profile.of(test.counts, test.types, pca),
        "generated": Profile.of(generated.counts, generated.types, pca),
    }

    def scores_of(profile: Profile) -> rivals.Scores:
        return rivals.score_sets(profiles["real"], profile, scored, config.max_cells, config.seed)

    contestants = {"floor": rivals.floor_cells, **{key: draw for key, (_, _, draw) in rivals.RIVALS.items()}}
    if not typed:
        del contestants["c"]  # there are no types to shuffle
    draws: dict[str, list[rivals.Scores]] = {}
    with Progress("evaluate", 1 + len(contestants) * config.n_draws, "comparisons") as bar:
        mine = scores_of(profiles["generated"])
        bar.advance()
        for k, (name, draw) in enumerate(contestants.items()):
            draws[name] = []
            for j in range(config.n_draws):
                counts, types = draw(train.counts, train.types, numbers, rng(2, k, j))
                draws[name].append(scores_of(Profile.of(counts, types, pca)))
                bar.advance(note=name)

    def tabulate(pick: Callable[[rivals.Scores], dict[str, float]], as_floor: Collection[str] = ()) -> dict:
        others = {name: [pick(s) for s in scores] for name, scores in draws.items()}
        return rivals.table(pick(mine), others.pop("floor"), others, as_floor)

    out = {
        "config": asdict(config),
        "protocol": {
            "target_sum": TARGET_SUM,
            "n_components": N_COMPONENTS,
            "explained_variance": float(pca.explained_variance_ratio_.sum()),
            "n_genes": {"common": len(genes), **n_genes},
        },
        "cells": {
            "train": len(train.types),
            "validation": len(validation.types),
            "test": sum(found["test"].values()),
            "generated": sum(found["generated"].values()),
            "compared": len(test.types),
            "drawn_of": drawn_of,
            "without_counts": {name: int((p.total == 0).sum()) for name, p in profiles.items()},
        },
        "scored_types": scored,
        "pooled_only": pooled_only,
        "pooled": tabulate(lambda s: s.pooled, as_floor=("c",)),
        "genes": {"ids": list(genes), **{name: _moments(p) for name, p in profiles.items()}},
        "map": _map(profiles, typed, config.seed),
    }
    if scored:
        out["per_type"] = tabulate(lambda s: s.per_type)
        out["by_type"] = {t: tabulate(lambda s, t=t: s.by_type[t]) for t in scored}
    if typed:
        by_type = {t: {**{c: n[t] for c, n in found.items()}, "compared": numbers[t]} for t in numbers}
        out["cells"] |= {"by_type": by_type, "generated_only": [t for t in found["generated"] if t not in numbers]}
        sources = {name: (p.log, p.types) for name, p in profiles.items()}
        found_markers = markers.check((log_normalise(train.counts), train.types), sources, list(genes))
        found_markers.sort(key=lambda m: list(numbers).index(m.type))  # stable: a type's own order stays
        out["markers"] = [asdict(m) for m in found_markers]
        out["expression"] = _expression(profiles, list(genes), found_markers)
    return out


def _expression(profiles: dict[str, Profile], genes: list[str], found: list[markers.Marker]) -> dict:
    """Mean log expression and fraction of cells > 0 of every marker in every type that has markers: source -> (types,
    genes)."""
    types = list(dict.fromkeys(m.type for m in found))
    columns = [genes.index(g) for g in dict.fromkeys(m.gene for m in found)]
    out: dict = {"types": types, "genes": [genes[c] for c in columns]}
    for name, profile in profiles.items():
        values = [profile.log[np.flatnonzero(profile.types == t)][:, columns] for t in types]
        out[name] = {
            "mean": [np.asarray(v.mean(0)).ravel().round(4).tolist() for v in values],
            "fraction": [np.asarray((v > 0).mean(0)).ravel().round(4).tolist() for v in values],
        }
    return out


def _moments(profile: Profile) -> dict[str, list[float]]:
    """Mean, variance and fraction expressing of every gene over all cells."""
    names = ("mean", "variance", "fraction")
    return {name: v.round(4).tolist() for name, v in zip(names, gene_moments(profile.log), strict=True)}


# --- the 2-D map ---------------------------------------------------------------------------------------------------


def _map(profiles: dict[str, Profile], typed: bool, seed: int) -> list[dict]:
    """UMAP of real test and generated cells together on their principal components, with type (if there are types) and
    total counts; one dict of equally long lists a source."""
    rows = {name: subsample(len(p), MAP_CELLS, seed) for name, p in profiles.items()}
    xy = umap_coordinates(np.concatenate([p.components[rows[name]] for name, p in profiles.items()]), seed)
    out, start = [], 0
    for name, p in profiles.items():
        here = xy[start : start + len(rows[name])]
        start += len(here)
        out.append(
            {
                "source": name,
                **({"type": p.types[rows[name]].tolist()} if typed else {}),
                "total": p.total[rows[name]].astype(int).tolist(),
                "x": here[:, 0].round(3).tolist(),
                "y": here[:, 1].round(3).tolist(),
            }
        )
    return out


def umap_coordinates(components: np.ndarray, seed: int) -> np.ndarray:
    """2-D UMAP coordinates, (cells, 2): 15 neighbours, minimum distance 0.3, Euclidean; the same for the same seed."""
    import umap  # compiles for seconds

    neighbours = min(15, len(components) - 1)
    return umap.UMAP(n_neighbors=neighbours, min_dist=0.3, random_state=seed, n_jobs=1).fit_transform(components)
