"""Which cells a user of the Python API asks for, in any of the ways to say so, as a table of one row per cell."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from numbers import Real

import anndata as ad
import numpy as np
import pandas as pd

from scldm.arguments import mapping_of, whole_of
from scldm.count_matrix import table_in_memory
from scldm.errors import InputError
from scldm.vocab import stands_twice

MOST_CELLS = 100_000_000  # that a call can be asked for: no memory holds more
Asked = pd.DataFrame | Mapping[str, str | float] | ad.AnnData | None


def table_of(conditions: Asked, n: int | None, names: Sequence[str]) -> pd.DataFrame:
    """names: the model's conditions

    Raises: InputError where it is not said, or said twice, how many cells, and for what says no conditions.
    """
    n = None if n is None else whole_of("n", n)
    if n is not None and n > MOST_CELLS:
        raise InputError(f"n={n:,} cells do not fit into memory. `scldm generate` writes any number to a file")
    if isinstance(conditions, pd.DataFrame | ad.AnnData):
        if n is not None:
            raise InputError(f"n={n} can't be given with a table of cells: it has {len(conditions)} rows, one for each")
        if isinstance(conditions, pd.DataFrame):
            if wrong := [name for name in conditions.columns if not isinstance(name, str)]:
                raise InputError(f"conditions: column {wrong[0]!r} is no text, so it names no condition")
            if (twice := stands_twice(list(conditions.columns))) is not None:
                raise InputError(f"conditions: column {twice!r} stands twice")
            return conditions
        obs = table_in_memory(conditions.obs)
        found = [name for name in names if name in obs]
        if names and not found:
            raise InputError(
                f"conditions: obs has none of the model's conditions {', '.join(names)}. It has "
                f"{', '.join(map(str, obs.columns)) or 'none'}"
            )
        if lacking := [name for name in names if name not in obs]:
            print(f"obs has no column {', '.join(lacking)}: cells are made without that condition", file=sys.stderr)
        return pd.DataFrame(obs[found]).reset_index(drop=True)
    asked = {} if conditions is None else mapping_of("conditions", conditions, '{"cell_type": "CD19+ B"}')
    if n is None:
        raise InputError(f"conditions={asked} does not say how many cells. Give n, as n=500")
    for name, label in asked.items():
        if not isinstance(label, str | Real | np.bool_):  # a column of yes and no has the labels True and False
            raise InputError(
                f"conditions: {name}={label!r} must be one label. Else give a DataFrame with a row for each cell"
            )
    return pd.DataFrame(asked, index=pd.RangeIndex(n))
