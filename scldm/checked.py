"""Numbers of a config. Each field declares its range, and a config with a number outside of it can't be made.

    @dataclass(frozen=True)
    class TrainConfig(Checked):
        steps: int = checked(100_000, at_least=1)

Reading order: Range, checked, Checked, check_ranges, check_divides.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any, TypeVar

from scldm.errors import InputError

Value = TypeVar("Value")
RANGE = "range"  # the key of a field's metadata
SEEDS = 1 << 63  # a seed lies below: torch and numpy take it, and it fits a signed integer


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes: finite ones within these bounds. None is no bound."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, number: Any) -> bool:
        return (
            math.isfinite(number)
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least} to {self.at_most}"
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{name} {bound}" for name, bound in bounds.items() if bound is not None) or "finite"


def checked(
    default: Value | None = None, *, factory: Callable[[], Value] | None = None, **bounds: float | None
) -> Value:
    """A dataclass field whose number, or each of whose numbers, lies in a range. Without bounds it is finite.

    factory: makes the default, where it is a mapping
    bounds: of the Range
    """
    metadata = {RANGE: Range(**bounds)}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return typing.cast(Value, dataclasses.field(default=default, metadata=metadata))


class Checked:
    """A dataclass of this kind refuses a number outside of its range when it is made."""

    def __post_init__(self) -> None:
        check_ranges(self)


def check_ranges(config: Any, schema: type | None = None, prefix: str = "") -> None:
    """Raises: InputError with the dotted key of the first number outside of its field's range.

    config: a dataclass, or the mapping that one is to be made of
    schema: that dataclass
    prefix: of the keys, as `train.`
    """
    for name, nested, range_, kinds in _fields(schema or type(config)):
        value = config[name] if isinstance(config, Mapping) else getattr(config, name)
        if nested is not None:
            check_ranges(value, nested if isinstance(value, Mapping) else None, f"{prefix}{name}.")
        elif range_ is not None and not (value is None and type(None) in kinds):
            for key, number in _numbers(prefix + name, value):
                whole = float not in kinds
                if isinstance(number, bool) or not isinstance(number, Integral if whole else Real):
                    raise InputError(f"{key}={number!r} must be a {'whole ' * whole}number")
                if number not in range_:
                    finite = "" if math.isfinite(number) or str(range_) == "finite" else "a finite number, "
                    raise InputError(f"{key}={number} must be {finite}{range_}")


@cache
def _fields(schema: type) -> tuple[tuple[str, type | None, Range | None, set[Any]], ...]:
    """(name, its dataclass, its range, the kinds of numbers that it takes, or None) of each field."""
    kinds = typing.get_type_hints(schema)
    nested = {name: kind for name, kind in kinds.items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    return tuple(
        (of.name, nested.get(of.name), of.metadata.get(RANGE), _of_numbers(kinds[of.name]))
        for of in dataclasses.fields(schema)
    )


def _of_numbers(kind: Any) -> set[Any]:
    """int, float and None as they stand within a type, as of `int | None` and `tuple[int, ...]`."""
    inner = typing.get_args(kind)
    return set[Any]().union(*map(_of_numbers, inner)) if inner else {kind} & {int, float, type(None)}


def _numbers(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each number of a field: of one, or of a list or mapping of them. What is no number too."""
    if isinstance(value, Mapping):
        yield from ((f"{key}.{name}", number) for name, number in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from ((f"{key}[{place}]", number) for place, number in enumerate(value))
    else:
        yield key, value


def check_divides(config: Any, name: str, whole: str, prefix: str) -> None:
    """Raises: InputError where one number does not divide another of the same config.

    prefix: of their keys, as `model.`
    """
    if getattr(config, whole) % getattr(config, name):
        raise InputError(
            f"{prefix}{name}={getattr(config, name)} does not divide {prefix}{whole}={getattr(config, whole)}"
        )
