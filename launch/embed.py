"""`scldm embed`: latent coordinates of a user's own cells."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import anndata as ad
import torch

import scldm
from launch.cli import run_verb
from launch.generate import write_whole
from scldm.errors import InputError
from scldm.pretrained import BATCH_CELLS, Precision

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
    drop_empty: leave out cells without a count in any gene that the model knows; else they are refused
    device: torch device; empty is a GPU where there is one
    batch: cells that go through the networks at once; another number differs in the last bits
    precision: float32, or bfloat16: for GPUs; coordinates are off by 0.003 of their deviation
    """

    model: str
    h5ad: str
    out: str
    layer: str = ""
    pool: Literal["flat", "mean"] = "flat"
    drop_empty: bool = False
    device: str = ""
    batch: int = BATCH_CELLS
    precision: Precision = "float32"


CONFIG = EmbedConfig


def main(config: EmbedConfig) -> Path:
    """Write the file; returns its path."""
    model, adata = model_and_cells(config)
    adata.obsm["X_scldm"] = model.embed(adata, layer=config.layer or None, pool=config.pool)
    adata.uns["scldm_embed"] = {**model.made_by, "pool": config.pool}
    write_whole(adata, Path(config.out))
    n, width = adata.obsm["X_scldm"].shape
    print(f'{n:,} cells, obsm["X_scldm"] of width {width}: {config.out}')
    return Path(config.out)


class ModelAndCells(Protocol):
    """The keys of verbs that take a model to the cells of a file."""

    @property
    def model(self) -> str: ...
    @property
    def h5ad(self) -> str: ...
    @property
    def layer(self) -> str: ...
    @property
    def drop_empty(self) -> bool: ...
    @property
    def device(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def precision(self) -> Precision: ...


def model_and_cells(config: ModelAndCells) -> tuple[scldm.Pretrained, ad.AnnData]:
    """The model on the device that is named, or the best that there is, and the cells of a file.

    Raises: InputError for what is not there or not readable.
    """
    if not Path(config.h5ad).is_file():
        raise InputError(f"h5ad={config.h5ad}: no such file")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = scldm.load(config.model, device, batch=config.batch, precision=config.precision)
    try:
        adata = ad.read_h5ad(config.h5ad)
    except (OSError, KeyError) as error:
        raise InputError(f"h5ad={config.h5ad}: not a readable h5ad file: {error}") from None
    if config.drop_empty and not (counted_n := model.counted(adata, config.layer or None)).all():
        n = adata.n_obs
        adata = adata[counted_n].copy()
        print(
            f"{n - adata.n_obs:,} of {n:,} cells are left out: no count in any gene that the model knows",
            file=sys.stderr,
        )
    return model, adata


if __name__ == "__main__":
    sys.exit(run_verb("embed", sys.argv[1:]))
