"""What a user of the Python API gives, checked: one of several words, a seed, a list of names, a mapping.

Reading order: one_of, seed_of, names_of, mapping_of.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, get_args

from scldm.checked import SEEDS
from scldm.errors import InputError


def one_of(name: str, value: Any, choices: Any) -> None:
    """choices: a Literal type. Raises: InputError for any other value, with the nearest choice."""
    known = get_args(choices)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), map(str, known), n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}{guess}")


def seed_of(value: Any) -> int:
    """Raises: InputError for what is no whole number that draws can be keyed by."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < SEEDS:
        raise InputError(f"seed={value!r} must be a whole number, at least 0 and below 2^63")
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
            raise InputError(f"{name}: {one!r} is of type {type(one).__name__}; {what} are text, as {name}={example}")
        if one in names[:k]:
            raise InputError(f"{name}: {one!r} stands twice")
    return names


def mapping_of(name: str, value: Any, example: str) -> dict[str, Any]:
    """Raises: InputError for what is no mapping from names."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name}={value!r} must map names to values, as {name}={example}")
    return dict(value)
