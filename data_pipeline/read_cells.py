"""What write_cells wrote as zarr or SOMA, as AnnData; h5ad is read where it is needed, by its parts."""

from __future__ import annotations

from pathlib import Path

import anndata as ad

from data_pipeline.write_cells import LAYER, MEASUREMENT
from scldm.errors import InputError


def read_cells(path: str) -> ad.AnnData:
    """All cells of a .zarr or .soma folder, in memory.

    Raises: InputError for what is none.
    """
    if not Path(path).is_dir():
        raise InputError(f"{path}: no such folder")
    try:
        if path.rstrip("/").endswith(".zarr"):
            return ad.read_zarr(path)
        import tiledbsoma
        import tiledbsoma.io

        from data_pipeline.source_soma import context

        with tiledbsoma.Experiment.open(path, context=context()) as experiment:
            return tiledbsoma.io.to_anndata(experiment, MEASUREMENT, X_layer_name=LAYER)
    except Exception as error:  # each library has its own for what is none of its folders
        told = (str(error).splitlines() or [repr(error)])[0]
        raise InputError(f"{path}: can't be read: {told}") from None
