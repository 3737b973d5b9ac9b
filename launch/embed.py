"""`scldm embed`: latent coordinates of a user's own cells."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anndata as ad
import torch

import scldm
from launch.cli import run_verb
from launch.generate import write_whole
from scldm.errors import InputError

PURPOSE = 'Embed the cells of an h5ad file: writes a copy of it with posterior means in obsm["X_scldm"].'
EXAMPLE = """
scldm embed model=model h5ad=cells.h5ad out=embedded.h5ad
scldm embed model=model h5ad=cells.h5ad out=embedded.h5ad --layer counts --pool mean
"""


@dataclass(frozen=True)
class EmbedConfig:
    """Which cells to embed.

    model: model folder that `scldm export` wrote
    h5ad: file with raw counts
    out: h5ad file to write: the same cells with obsm["X_scldm"]
    layer: layer that holds the counts; empty is X
    pool: flat writes all tokens one after another, (n, L * Z); mean their average, (n, Z)
    device: torch device; empty is a GPU where there is one
    """

    model: str
    h5ad: str
    out: str
    layer: str = ""
    pool: Literal["flat", "mean"] = "flat"
    device: str = ""


CONFIG = EmbedConfig


def main(config: EmbedConfig) -> Path:
    """Write the file; returns its path."""
    model, adata = model_and_cells(config.model, config.h5ad, config.device)
    adata.obsm["X_scldm"] = model.embed(adata, layer=config.layer or None, pool=config.pool)
    write_whole(adata, Path(config.out))
    n, width = adata.obsm["X_scldm"].shape
    print(f'{n:,} cells, obsm["X_scldm"] of width {width}: {config.out}')
    return Path(config.out)


def model_and_cells(model: str, h5ad: str, device: str) -> tuple[scldm.Pretrained, ad.AnnData]:
    """The model in a folder on the device that is named, or the best that there is, and the cells of a file.

    Raises: InputError for what is not there or not readable.
    """
    if not Path(h5ad).is_file():
        raise InputError(f"h5ad={h5ad}: no such file")
    loaded = scldm.load(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        return loaded, ad.read_h5ad(h5ad)
    except (OSError, KeyError) as error:
        raise InputError(f"h5ad={h5ad}: not a readable h5ad file: {error}") from None


if __name__ == "__main__":
    sys.exit(run_verb("embed", sys.argv[1:]))
