"""`scldm generate`: new cells for given conditions, as an h5ad file."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import scldm
from launch.cli import run_verb
from scldm.errors import InputError
from scldm.flow.generate import SamplerConfig

PURPOSE = "Generate cells for given conditions: integer counts in CSR, the conditions as categorical obs."
EXAMPLE = """
scldm generate model=model conditions=wanted.csv out=generated.h5ad
scldm generate model=model like=cells.h5ad by=cell_type out=generated.h5ad seed=1
scldm generate model=model n=1000 out=generated.h5ad
"""


@dataclass(frozen=True)
class GenerateConfig:
    """Which cells to make. Exactly one of conditions, like and n says how many of what.

    model: model folder that `scldm export` wrote
    out: h5ad file to write
    conditions: CSV with a column per condition and, if there is one, a column n_cells (else one cell per row)
    like: h5ad file whose cells' labels are taken, one new cell for each
    by: columns of `like` that are conditions of the model; also library_size, if it has one
    n: number of cells without any condition
    genes: genes to write, in this order; none writes all
    seed: of all draws
    device: torch device; empty is a GPU where there is one
    """

    model: str
    out: str
    conditions: str = ""
    like: str = ""
    by: tuple[str, ...] = ()
    n: int = 0
    genes: tuple[str, ...] = ()
    seed: int = 0
    device: str = ""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


CONFIG = GenerateConfig


def main(config: GenerateConfig) -> Path:
    """Write the file; returns its path."""
    out = Path(config.out)
    if out.suffix != ".h5ad":
        raise InputError(f"out={config.out} must end in .h5ad")
    wanted = wanted_cells(config)
    model = scldm.load(config.model, config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.check_conditions(wanted, config.seed)
    adata = model.generate(wanted, seed=config.seed, sampler=config.sampler, genes=config.genes or None)
    write_whole(adata, out)
    print(f"{adata.n_obs:,} cells x {adata.n_vars:,} genes: {out}")
    return out


def wanted_cells(config: GenerateConfig) -> pd.DataFrame:
    """One row per cell to make, one column per condition that is given."""
    ways = [name for name in ("conditions", "like", "n") if getattr(config, name)]
    if len(ways) != 1:
        raise InputError(f"give exactly one of conditions, like and n; given: {', '.join(ways) or 'none'}")
    if config.n:
        if config.n < 0:
            raise InputError(f"n={config.n} must be positive")
        return pd.DataFrame(index=range(config.n))
    path = Path(config.conditions or config.like)
    if not path.is_file():
        raise InputError(f"{ways[0]}={path}: no such file")
    if config.conditions:
        table = read_table(path)
        if "n_cells" not in table:
            return numeric_library_size(table)
        if not table["n_cells"].astype(str).str.fullmatch(r"\d+").all():
            raise InputError(f"{path}: column n_cells must hold whole numbers, 0 or more")
        rows = np.repeat(np.arange(len(table)), table["n_cells"].astype(int))
        return numeric_library_size(table.drop(columns="n_cells").iloc[rows].reset_index(drop=True))
    if not config.by:
        raise InputError("like needs by: the columns of its obs that are conditions of the model, as by=cell_type")
    obs = read_obs(path)
    missing = [name for name in config.by if name not in obs]
    if missing:
        raise InputError(f"{path}: obs has no column {missing[0]!r}; it has {', '.join(map(str, obs.columns))}")
    return numeric_library_size(pd.DataFrame({name: obs[name].astype(str).to_numpy() for name in config.by}))


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file as text: a label may be called `NA`. Raises: InputError for a file that is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            return pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except (ValueError, OSError, pd.errors.ParserWarning) as error:  # ParserError and EmptyDataError are ValueErrors
        raise InputError(f"conditions={path}: not a readable CSV file: {' '.join(str(error).split())}") from None


def numeric_library_size(table: pd.DataFrame) -> pd.DataFrame:
    """Labels stay text; a column library_size holds numbers."""
    if "library_size" in table:
        table = table.assign(library_size=pd.to_numeric(table["library_size"], errors="coerce"))
    return table


def read_obs(path: Path) -> pd.DataFrame:
    """The obs of an h5ad file, without its counts. Raises: InputError for a file that is none."""
    import anndata as ad

    try:
        return pd.DataFrame(ad.read_h5ad(path, backed="r").obs)
    except (OSError, KeyError) as error:
        raise InputError(f"{path}: not a readable h5ad file: {error}") from None


def write_whole(adata, path: Path) -> None:
    """Write an h5ad file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    adata.write_h5ad(aside, compression="gzip")
    os.replace(aside, path)


if __name__ == "__main__":
    sys.exit(run_verb("generate", sys.argv[1:]))
