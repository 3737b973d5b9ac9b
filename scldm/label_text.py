"""Values of a column as labels: the one place that says which text a number, a category or a missing value is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import numpy as np

from scldm.errors import InputError

if TYPE_CHECKING:  # it takes a third of a second to import, and a vocabulary of labels needs nothing of it
    import pandas as pd

# a text that is a number as people write one. `1_0`, `1e3` and `infinity` are numbers to Python, and names to people
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?")


def texts(values: pd.Series) -> pd.Series:
    """Every value as the text of its label, object. A number is the same label however it is stored: 1.0 and 1 are
    `1`, 0.1 is `0.1` in any precision, whatever else the column holds. What a missing value becomes says nothing."""
    import pandas as pd

    if isinstance(values.dtype, pd.CategoricalDtype):
        categories = texts(pd.Series(values.cat.categories))
        known = np.append(categories.to_numpy(object), "nan")
        return pd.Series(known[values.cat.codes], index=values.index, name=values.name, dtype=object)
    if pd.api.types.is_float_dtype(values.dtype):
        numbers = values.to_numpy(str(values.dtype).lower(), na_value=np.nan)  # pandas' Float32 is float32
        codes, known = pd.factorize(numbers)
        named = np.array([*map(_text, known), "nan"], object)
        return pd.Series(named[codes], index=values.index, name=values.name, dtype=object)
    return values.astype(object).map(_text).astype(object)


def _text(value: object) -> str:
    if isinstance(value, bytes):  # text of fixed length in older files
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise InputError(f"the label {value!r} is no text in UTF-8") from None
    if isinstance(value, (float, np.floating)) and np.isfinite(value) and value == np.floor(value):
        return str(int(value))
    return str(value)


def known_label(label: object, known: Collection[str]) -> str:
    """A label that somebody typed, or took from a table of text, as the known labels have it: `10.0` is their `10`."""
    text = _text(label)
    if text in known:
        return text
    if not NUMBER.fullmatch(text):
        return text
    number = _text(float(text))
    return number if number in known else text


def as_labels(column: pd.Series, where: str, missing: str) -> pd.Series:
    """A column of obs as strings, by `texts`. No value, an empty text and `nan` are missing.

    missing: the label of missing values. Empty refuses them
    Raises: InputError for a missing value where no label for it is named, and for an infinite one.
    """
    import pandas as pd

    if pd.api.types.is_float_dtype(column.dtype) and np.isinf(column.to_numpy(np.float64, na_value=np.nan)).any():
        raise InputError(f"{where}: column {column.name!r} has an infinite value: no label")
    labels = texts(column)
    absent = _absent(column, labels)
    if absent.any():
        if not missing:
            at = int(np.flatnonzero(absent)[0])
            raise InputError(
                f"{where}: column {column.name!r} has no value in {int(absent.sum())} cells, first at position {at}. "
                "missing=LABEL gives them one"
            )
        labels[absent] = missing
    return labels


def labels_of(
    obs: pd.DataFrame,
    column: str,
    where: str,
    key: str = "",
    there: Iterable[object] | None = None,
    missing: str = "",
) -> np.ndarray:
    """A column that every cell must have a label in, (cells,) str.

    key: of the configuration, that named the column
    there: the columns to name, where obs has not all of them
    missing: the label that training gave missing values. Empty refuses them
    Raises: InputError where the column is not there, or has no value in some cells.
    """
    import pandas as pd

    if column not in obs:
        raise obs_lacks(column, where, key, obs.columns if there is None else there)
    if list(obs.columns).count(column) > 1:
        raise InputError(f"{where}: obs column {_named(column, key)} stands twice")
    values = pd.Series(obs[column])
    if n := 0 if missing else int(_absent(values, texts(values)).sum()):
        raise InputError(
            f"{where}: obs column {_named(column, key)} has no value in {n:,} cells. Leave them out or label them"
        )
    return as_labels(values, where, missing).to_numpy(str)


def obs_lacks(column: str, where: str, key: str, there: Iterable[object]) -> InputError:
    """The error that says so. The arguments are those of `labels_of`."""
    return InputError(
        f"{where}: obs has no column {_named(column, key)}. It has {', '.join(map(str, there)) or 'none'}"
    )


def _named(column: str, key: str) -> str:
    return f"{key}={column!r}" if key else repr(column)


def _absent(column: pd.Series, labels: pd.Series) -> np.ndarray:
    """Which cells have no value, an empty text or `nan`."""
    return np.asarray(column.isna() | labels.isin(["", "nan"]), bool)
