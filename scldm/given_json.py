"""JSON that somebody else may have written: read as the dataclass it stands for, or refused by its dotted key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from scldm.errors import InputError, path_must_be, read_json

Kind = TypeVar("Kind")
LARGEST = 2**63  # numbers go into int64
Count = Annotated[int, range(LARGEST)]
PathText = Annotated[str, path_must_be]
SEAL = "sha256"


# --- types ---------------------------------------------------------------------------------------------------------


def typed(kind: type[Kind], value: Any, where: str) -> Kind:
    """`value` as a `kind`: a dataclass (every key known, every field that has no default given), or a type of a field.

    Nothing is converted, but lists to tuples and whole numbers to floats. Numbers are finite. `Annotated[int, range]`
    bounds a number, `PathText` a path. A field of a class with a `from_json` is left to that.

    where: the file
    Raises: InputError with the file and the dotted key.
    """
    if dataclasses.is_dataclass(kind):  # also for a from_json that has called this
        return _typed_fields(kind, value, where, "")
    return _typed(kind, value, where, "")


def known_of(kind: type[Kind], value: Any, where: str) -> Kind:
    """The same of a document that may say more than the dataclass has fields for."""
    if not isinstance(value, dict):
        return typed(kind, value, where)
    return typed(
        kind,
        {field.name: value[field.name] for field in dataclasses.fields(typing.cast(Any, kind)) if field.name in value},
        where,
    )


def read_known(kind: type[Kind], path: Path) -> Kind:
    """The same of a file."""
    return known_of(kind, read_json(path), str(path))


def read_entries(kind: type, path: Path) -> list[dict[str, Any]]:
    """All that a file of entries says, once the dataclass's fields of each are checked. Empty without a file."""
    entries = typed(list[dict[str, Any]], read_json(path), str(path)) if path.is_file() else []
    for k, entry in enumerate(entries):
        known_of(kind, entry, f"{path}: [{k}]")
    return entries


def read_checked(kind: type, path: Path) -> dict[str, Any] | None:
    """All that a file says, once the dataclass's fields of it are checked. None where there is no file."""
    if not path.is_file():
        return None
    value = read_json(path)
    known_of(kind, value, str(path))
    return value


def _typed(kind: Any, value: Any, where: str, key: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)

    def wrong(right: str) -> InputError:
        return InputError(f"{where}: {key or 'it'} is {reprlib.repr(value)}, must be {right}")

    if origin is Annotated:
        found = _typed(inner[0], value, where, key)
        if callable(inner[1]):
            right = str(inner[1](found))
        else:
            right = "" if found in inner[1] else f"from {inner[1].start} to {inner[1].stop - 1}"
        if right:
            raise wrong(right)
        return found
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (kind,) = (one for one in inner if one is not type(None))
        return _typed(kind, value, where, key)
    if hasattr(kind, "from_json"):
        return kind.from_json(value, f"{where}: {key}" if key else where)
    if dataclasses.is_dataclass(kind):
        return _typed_fields(kind, value, where, key)
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise wrong("a list")
        of = [inner[0]] * len(value) if origin is list or inner[1:] == (...,) else list(inner)
        if len(value) != len(of):
            raise wrong(f"a list of {len(of)}")
        return origin(_typed(one, item, where, f"{key}[{k}]") for k, (one, item) in enumerate(zip(of, value)))
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong("a mapping")
        if not all(map(_is_text, value)):
            raise wrong("a mapping whose keys are text of Unicode characters")
        return {name: _typed(inner[1], item, where, _dotted(key, name)) for name, item in value.items()}
    if right := _must_be(kind, value):
        raise wrong(right)
    return float(value) if kind is float else value


def _must_be(kind: Any, value: Any) -> str:
    """What a value of a type without parts must be. Empty where `value` is just that."""
    if kind is Any:
        return "" if _is_text(json.dumps(value, ensure_ascii=False, default=str)) else "text of Unicode characters"
    if typing.get_origin(kind) is Literal:
        among = typing.get_args(kind)
        known = any(value == one and type(value) is type(one) for one in among)
        return "" if known else f"one of {', '.join(map(str, among))}"
    if kind is float:
        finite = abs(value) < LARGEST if type(value) is int else type(value) is float and math.isfinite(value)
        return "" if finite else "a finite number"
    if kind not in (bool, int, str):
        raise TypeError(f"typed: {kind} is no type of JSON")
    if type(value) is not kind:
        return {bool: "true or false", int: "a whole number", str: "text"}[kind]
    if isinstance(value, int) and not -LARGEST <= value < LARGEST:
        return "a number of 64 bits"
    return "" if not isinstance(value, str) or _is_text(value) else "text of Unicode characters"


def _typed_fields(kind: Any, value: Any, where: str, key: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {key or 'it'} is a {type(value).__name__}, must be a mapping")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(value.keys() - fields.keys()):
        raise InputError(f"{where}: key {_dotted(key, unknown[0])!r} is unknown")
    given, hints = {}, typing.get_type_hints(kind, include_extras=True)
    for name, field in fields.items():
        if name in value:
            given[name] = _typed(hints[name], value[name], where, _dotted(key, name))
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: key {_dotted(key, name)!r} is missing")
    try:
        return kind(**given)
    except InputError as error:  # of its __post_init__, which knows of no file
        raise InputError(f"{where}: {error}") from None


def _dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True


class JsonFile:
    """What is kept as a JSON file of its own: a class with `to_json` and `from_json`."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(typing.cast(Any, self).to_json()))

    @classmethod
    def load(cls, path: Path) -> Self:
        return typing.cast(Any, cls).from_json(read_json(path), str(path))


# --- a hash of its own ---------------------------------------------------------------------------------------------


def hash_of(document: Any) -> str:
    """SHA-256 of a document as sorted JSON."""
    return hashlib.sha256(sorted_json(document)).hexdigest()


def sorted_json(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True).encode()


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the SHA-256 of all that it says."""
    assert SEAL not in document, f"{SEAL} is the key of the hash"
    return {**document, SEAL: hash_of(document)}


def unsealed(document: Any, where: str) -> dict[str, Any]:
    """The document without its hash. Raises: InputError where it has none, or does not say what was sealed."""
    if not isinstance(document, dict):
        raise InputError(f"{where}: must be a mapping")
    if SEAL not in document:
        raise InputError(f"{where}: it has no {SEAL} of its own, as what was made by another version. Make it again")
    rest = {key: value for key, value in document.items() if key != SEAL}
    if document[SEAL] != hash_of(rest):
        raise InputError(f"{where}: its SHA-256 is not that of what it says: damaged or changed")
    return rest


def read_sealed(kind: type[Kind], path: Path) -> Kind:
    """What a file with a hash of its own says, as `typed`."""
    return typed(kind, unsealed(read_json(path), str(path)), str(path))
