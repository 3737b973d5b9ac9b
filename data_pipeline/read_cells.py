"""Generated cells in: what write_cells.py wrote as zarr or as a SOMA experiment. Any program reads its h5ad."""

from __future__ import annotations

from pathlib import Path

import anndata as ad

from scldm.errors import InputError

MEASUREMENT, LAYER = "RNA", "data"  # what tiledbsoma.io reads and writes unless told otherwise


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

        from data_pipeline.convert.source_soma import context

        with tiledbsoma.Experiment.open(path, context=context()) as experiment:
            return tiledbsoma.io.to_anndata(experiment, MEASUREMENT, X_layer_name=LAYER)
    except Exception as error:  # each library has its own for what is none of its folders
        told = (str(error).splitlines() or [repr(error)])[0]
        raise InputError(f"{path}: can't be read: {told}") from None
