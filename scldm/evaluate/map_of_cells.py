"""Real and generated cells on one two-dimensional map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scldm.evaluate.space import Profile, subsample

MAP_CELLS = 5_000  # a side. More are only ink


def cell_map(profiles: Mapping[str, Profile], labels: Mapping[str, Mapping[str, np.ndarray]], seed: int) -> list[dict]:
    """UMAP of real test and generated cells together on their principal components. One dict of equally long lists a
    source: x, y, total counts, `labels` (condition -> label), and `combination` where there are conditions.

    labels: source -> condition -> label of each cell
    """
    rows = {name: subsample(len(p), MAP_CELLS, seed) for name, p in profiles.items()}
    xy = umap_coordinates(np.concatenate([p.components[rows[name]] for name, p in profiles.items()]), seed)
    out, start = [], 0
    for name, p in profiles.items():
        here = xy[start : start + len(rows[name])]
        start += len(here)
        of = {condition: column[rows[name]].tolist() for condition, column in labels[name].items()}
        out.append(
            {
                "source": name,
                **({"labels": of, "combination": p.types[rows[name]].tolist()} if of else {}),
                "total": p.total[rows[name]].astype(int).tolist(),
                "x": here[:, 0].round(3).tolist(),
                "y": here[:, 1].round(3).tolist(),
            }
        )
    return out


def umap_coordinates(components: np.ndarray, seed: int) -> np.ndarray:
    """2-D UMAP coordinates, (cells, 2): 15 neighbours, minimum distance 0.3, Euclidean. The same for the same seed."""
    return _umap(len(components), seed).fit_transform(components)


def _umap(n_cells: int, seed: int) -> Any:
    import umap  # compiles for seconds

    return umap.UMAP(n_neighbors=min(15, n_cells - 1), min_dist=0.3, random_state=seed, n_jobs=1)


@dataclass(frozen=True)
class FixedMap:
    """A map that is fitted once on some cells, on which others are placed later.

    name: UMAP, or PC where the package umap-learn is missing: the first two principal components
    place: from components, (n, K), to coordinates, (n, 2). The same for the same cells
    """

    name: str
    place: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(cls, components: np.ndarray, seed: int) -> FixedMap:
        try:
            umap = _umap(len(components), seed)
        except ModuleNotFoundError:
            return cls("PC", lambda of_cells: of_cells[:, :2])
        fitted = umap.fit(components)
        return cls("UMAP", lambda of_cells: np.asarray(fitted.transform(of_cells)))
