"""Generated cells in: what write_cells.py wrote as a SOMA experiment. Its other formats are in scldm/cells_file.py."""

from __future__ import annotations

from pathlib import Path

import anndata as ad

from scldm.errors import InputError

MEASUREMENT, LAYER = "RNA", "data"  # what tiledbsoma.io reads and writes unless told otherwise


def read_soma(path: str) -> ad.AnnData:
    """All cells of a .soma folder, in memory.

    Raises: InputError for what is none.
    """
    if not Path(path).is_dir():
        raise InputError(f"{path}: no such folder")
    try:
        import tiledbsoma
        import tiledbsoma.io

        from data_pipeline.convert.source_soma import context

        with tiledbsoma.Experiment.open(path, context=context()) as experiment:
            return tiledbsoma.io.to_anndata(experiment, MEASUREMENT, X_layer_name=LAYER)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # tiledbsoma has several for what is none of its folders
        told = (str(error).splitlines() or [repr(error)])[0]
        raise InputError(f"{path}: can't be read: {told}") from None
