"""A trained model as MLflow's pyfunc serves it: a table of conditions in, a table of counts out.

`scldm export register=NAME` names this module as the model's loader. It needs neither mlflow nor the training stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from scldm.arguments import mapping_of, seed_of
from scldm.errors import InputError
from scldm.pretrained import Pretrained, load


class Served:
    """What `mlflow.pyfunc.load_model` gives back, behind its own checks of the table."""

    def __init__(self, model: Pretrained) -> None:
        self.model = model

    def predict(self, conditions: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """One generated cell for each row, in their order: integer counts, a column for each gene.

        conditions: a column for each condition that is to be given, and one of library_size if sizes are
        params: seed of all draws. A cell's depend on it and on the row's number

        Raises: InputError for what is no such table or seed, and as `generate`.
        """
        if not isinstance(conditions, pd.DataFrame):
            raise InputError(
                f"conditions of type {type(conditions).__name__} must be a DataFrame, one row for each cell"
            )
        seed = seed_of(mapping_of("params", {} if params is None else params, '{"seed": 1}').get("seed", 0))
        cells: Any = self.model.generate(conditions.reset_index(drop=True), seed=seed)
        return pd.DataFrame(cells.X.toarray(), index=conditions.index, columns=cells.var_names)


def _load_pyfunc(folder: str) -> Served:
    """MLflow calls this with the model folder."""
    return Served(load(folder))
