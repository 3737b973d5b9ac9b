"""`scldm embed`: latent coordinates of a user's own cells."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.cli import run_verb
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
    precision: float32, or for GPUs bfloat16. Its coordinates are off by 0.003 of their deviation
    """

    pool: Literal["flat", "mean"] = "flat"


CONFIG = EmbedConfig


def main(config: EmbedConfig) -> Path:
    """Write the file. Returns its path."""
    model, adata = model_and_cells(config)
    match = model.matched(adata, config.layer or None)
    adata.obsm["X_scldm"] = model.embed(adata, layer=config.layer or None, pool=config.pool)
    told: dict[str, Any] = match.to_json()
    if "scldm" in adata.uns:  # of cells that a model made, or took somewhere
        told["before"] = json.dumps(
            adata.uns["scldm"], default=lambda value: value.item() if hasattr(value, "item") else str(value)
        )
    adata.uns["scldm"] = model.record("embed", pool=config.pool, **told)
    write_whole(adata, Path(config.out))
    n, width = adata.obsm["X_scldm"].shape
    print(f'{n:,} cells, obsm["X_scldm"] of width {width}: {config.out}')
    return Path(config.out)


if __name__ == "__main__":
    sys.exit(run_verb("embed", sys.argv[1:]))
