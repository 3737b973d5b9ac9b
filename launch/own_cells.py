"""What the verbs share that take a model to the cells of a user's file: embed, reconstruct, transform."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anndata as ad

import scldm
from launch.together import WRITES
from scldm.cells_file import cells_in_file, check_storable, write_cells
from scldm.cells_opened import check_out
from scldm.checked import Checked, checked
from scldm.files import made_aside
from scldm.networks import AskedPrecision, device_of
from scldm.vocab import MIN_GENE_SHARE


@dataclass(frozen=True, kw_only=True)
class OwnCellsConfig(Checked):
    """Which cells, and the model that they meet.

    model: model folder that `scldm export` wrote
    h5ad: h5ad or zarr file with raw counts
    out: h5ad file to write
    layer: where the counts are, as X, raw or a layer's name. Empty looks in X, layers/counts and raw
    drop_empty: leave out cells without a count in any gene that the model knows. Else they are refused
    device: torch device. Empty is a GPU where there is one
    batch: cells that go through the networks at once. Another number differs in the last bits. null takes 64 on a CPU,
        and on a GPU what a quarter of its memory holds, at most 1,024
    precision: float32, bfloat16, whose expected counts are off by 0.6 %, or auto: bfloat16 on a GPU that has it
    min_gene_share: of the model's genes that the file must have. With fewer it is refused
    """

    model: str
    h5ad: str
    out: str
    layer: str = ""
    drop_empty: bool = False
    device: str = ""
    batch: int | None = checked(None, at_least=1)
    precision: AskedPrecision = "auto"
    min_gene_share: float = checked(MIN_GENE_SHARE, at_least=0, at_most=1)


@contextmanager
def model_and_cells(config: OwnCellsConfig) -> Iterator[tuple[scldm.Pretrained, ad.AnnData]]:
    """The model on the device that is named, or the best that there is, and the cells of a file, which is open within.
    Their matrices are read some rows at a time. Where cells are left out, the others are in memory.

    Raises: InputError for what is not there or not readable.
    """
    check_out(config.out, WRITES["embed"], h5ad=config.h5ad)
    with cells_in_file(config.h5ad) as adata:
        check_storable(adata, f"h5ad={config.h5ad}")
        how = {"batch": config.batch, "precision": config.precision, "min_gene_share": config.min_gene_share}
        model = scldm.load(config.model, device_of(config.device), **how)
        if config.drop_empty and not (counted_n := model.counted(adata, config.layer or None)).all():
            n = adata.n_obs
            adata = adata[counted_n].copy()
            print(
                f"{n - adata.n_obs:,} of {n:,} cells are left out: no count in any gene that the model knows",
                file=sys.stderr,
            )
        yield model, adata


def write_whole(adata: ad.AnnData, path: Path) -> None:
    """Write an h5ad file whole or not at all."""
    with made_aside(path) as part:
        write_cells(adata, part)
