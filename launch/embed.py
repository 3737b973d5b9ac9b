"""`scldm embed`: latent coordinates of a user's own cells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.own_cells import OwnCellsConfig, model_and_cells, write_whole

PURPOSE = 'Embed the cells of an h5ad file: writes a copy of it with posterior means in obsm["X_scldm"].'
EXAMPLE = """
scldm embed model=model h5ad=cells.h5ad out=embedded.h5ad
scldm embed model=model h5ad=cells.h5ad out=embedded.h5ad --layer counts --pool mean
"""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(OwnCellsConfig):
    """Which cells to embed.

    out: h5ad file to write: the same cells with obsm["X_scldm"]
    pool: flat writes all tokens one after another, (n, L * Z). mean writes their average, (n, Z)
    precision: float32, bfloat16, whose coordinates are off by 0.003 of their deviation, or auto: bfloat16 on a GPU that
        has it
    """

    pool: Literal["flat", "mean"] = "flat"


CONFIG = EmbedConfig


def main(config: EmbedConfig) -> Path:
    """Write the file. Returns its path."""
    with model_and_cells(config) as (model, adata):
        n, width = model.embed(adata, layer=config.layer or None, pool=config.pool, key_added="X_scldm").shape
        write_whole(adata, Path(config.out))
    print(f'{n:,} cells, obsm["X_scldm"] of width {width}: {config.out}')
    return Path(config.out)
