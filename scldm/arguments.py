"""What a user of the Python API gives, checked: words, numbers, seeds, lists of names, mappings, labels, folders."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

import numpy as np

from scldm.checked import SEEDS
from scldm.errors import InputError
from scldm.files import check_path


def one_of(name: str, value: Any, choices: Any) -> None:
    """choices: a Literal type. Raises: InputError for any other value, with the nearest choice."""
    known = get_args(choices)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), map(str, known), n=1, cutoff=0.5)
    guess = f". Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}{guess}")


def whole_of(name: str, value: Any, at_least: int = 1, at_most: int | None = None) -> int:
    """A whole number, as of numpy too. Raises: InputError for any other value."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < at_least:
        raise InputError(f"{name}={value!r} must be a whole number, at least {at_least}")
    if at_most is not None and int(value) > at_most:
        raise InputError(f"{name}={value!r} must be at most {at_most:,}")
    return int(value)


def number_of(name: str, value: Any, low: float, high: float) -> float:
    """Raises: InputError for what is no number from low to high."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
        raise InputError(f"{name}={value!r} must be a number from {low:g} to {high:g}")
    return float(value)


def numbers_of(name: str, value: Any, low: float, high: float) -> tuple[float, ...]:
    """A list of numbers. Raises: InputError for any other value, an empty one, and numbers not from low to high."""
    if isinstance(value, Real | str) or not isinstance(value, Iterable):
        right = value if isinstance(value, Real) else f"{high:g}"
        raise InputError(f"{name}={value!r} must be a list of numbers from {low:g} to {high:g}, as {name}=[{right}]")
    numbers = tuple(number_of(name, of, low, high) for of in value)
    if not numbers:
        raise InputError(f"{name}={value!r} must hold a number from {low:g} to {high:g}, at least one")
    return numbers


def seed_of(value: Any, below: int = SEEDS) -> int:
    """Raises: InputError for what is no whole number that draws can be keyed by. `below` is a power of two."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < below:
        raise InputError(f"seed={value!r} must be a whole number, at least 0 and below 2^{below.bit_length() - 1}")
    return int(value)


def names_of(name: str, value: Iterable[str] | None, what: str, example: str) -> tuple[str, ...]:
    """A list of texts, empty for None. Raises: InputError for a plain text, and for what is no text within."""
    if value is None:
        return ()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        right = f"[{value!r}]" if isinstance(value, str) else example
        raise InputError(f"{name}={value!r} must be a list of {what}, as {name}={right}")
    names = tuple(value)
    for k, one in enumerate(names):
        if not isinstance(one, str):
            raise InputError(f"{name}: {one!r} is of type {type(one).__name__}. {what} are text, as {name}={example}")
        if one in names[:k]:
            raise InputError(f"{name}: {one!r} stands twice")
    return names


def mapping_of(name: str, value: Any, example: str) -> dict[str, Any]:
    """Raises: InputError for what is no mapping from names."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name}={value!r} must map names to values, as {name}={example}")
    return dict(value)


def text_of(name: str, value: Any, example: str) -> str:
    """Raises: InputError for what is no text, or an empty one."""
    if not isinstance(value, str) or not value:
        raise InputError(f"{name}={value!r} must be one text, as {name}={example!r}")
    return value


def label_of(name: str, value: Any) -> Any:
    """A label as it was given: a text, a number, True or False. Raises: InputError for any other value."""
    if not isinstance(value, str | Real | np.bool_):
        raise InputError(f"{name}={value!r} must be one label, as a text or a number")
    return value


def folder_of(name: str, value: Any) -> Path:
    """The path of a folder. Raises: InputError for what is no path, and for a file."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise InputError(f"{name}={value!r} must be the path of a folder")
    check_path(name, os.fspath(value))
    if Path(value).is_file():
        raise InputError(f"{name}={value} is a file. Name a folder")
    return Path(value)
