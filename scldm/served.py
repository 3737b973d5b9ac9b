"""A trained model as MLflow's pyfunc serves it: a table of conditions in, a table of counts out.

`scldm export register=NAME` names this module as the model's loader. It needs neither mlflow nor the training stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from scldm.pretrained import Pretrained, load


class Served:
    """What `mlflow.pyfunc.load_model` gives back, behind its own checks of the table."""

    def __init__(self, model: Pretrained) -> None:
        self.model = model

    def predict(self, conditions: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """One generated cell for each row, in their order: integer counts, a column for each gene.

        conditions: a column for each condition that is to be given
        params: seed of all draws. A cell's depend on it and on the row's number
        """
        seed = int((params or {}).get("seed", 0))
        cells: Any = self.model.generate(conditions.reset_index(drop=True), seed=seed)
        return pd.DataFrame(cells.X.toarray(), index=conditions.index, columns=cells.var_names)


def _load_pyfunc(folder: str) -> Served:
    """MLflow calls this with the model folder."""
    return Served(load(folder))
