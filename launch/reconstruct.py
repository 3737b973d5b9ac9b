"""`scldm reconstruct`: what the autoencoder expects of a user's own cells, and how likely it finds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.own_cells import OwnCellsConfig, model_and_cells, write_whole

PURPOSE = """Encode and decode the cells of an h5ad file. It writes expected counts of the chosen genes. Every cell's
log-likelihood is in obs["log_likelihood"], in nats over the file's genes that the model knows."""
EXAMPLE = """
scldm reconstruct model=model h5ad=cells.h5ad out=expected.h5ad
scldm reconstruct model=model h5ad=cells.h5ad out=expected.h5ad genes=CD3E,MS4A1 --layer counts
"""


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(OwnCellsConfig):
    """Which cells to reconstruct.

    out: h5ad file to write: the same cells, expected counts in X
    genes: genes to write, any that the model knows. None writes those of the file
    """

    genes: tuple[str, ...] = ()


CONFIG = ReconstructConfig


def main(config: ReconstructConfig) -> Path:
    """Write the file. Returns its path."""
    with model_and_cells(config) as (model, adata):
        expected = model.reconstruct(adata, layer=config.layer or None, genes=config.genes or None)
        write_whole(expected, Path(config.out))
    mean = expected.obs["log_likelihood"].mean()
    print(f"{expected.n_obs:,} cells x {expected.n_vars:,} genes, {mean:.1f} nats a cell: {config.out}")
    return Path(config.out)
