"""Every number of every verb's config has a range, and a number outside of it is refused with its full key."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from launch.config import compose, flatten
from launch.planning.config import PlanLDMConfig
from launch.verbs import VERBS
from scldm.checked import RANGE, Checked, Range, checked
from scldm.errors import InputError
from scldm.flow.sampler import SamplerConfig

SCHEMAS: dict[str, type] = {
    verb: importlib.import_module(module).CONFIG for verb, (module, _) in VERBS.items() if verb != "plan"
}
SCHEMAS |= {"plan vae": importlib.import_module("launch.plan").CONFIG, "plan ldm": PlanLDMConfig}


@dataclass(frozen=True)
class Number:
    """key: dotted; name, kind, range: of its field in `owner`"""

    key: str
    name: str
    kind: Any
    range: Range | None
    owner: type

    def text(self, number: float) -> str:
        """As a key=value whose only number it is."""
        value = f".{str(number).removeprefix('-')}" if math.isinf(number) or math.isnan(number) else str(number)
        value = f"-{value}" if number < 0 and math.isinf(number) else value
        if typing.get_origin(self.kind) is dict:
            return f"{self.key}.x={value}"
        return f"{self.key}={', '.join([value] * self.n_values)}"

    @property
    def n_values(self) -> int:
        values = [of for of in typing.get_args(self.kind) if of is not Ellipsis]
        return len(values) if typing.get_origin(self.kind) is tuple else 1

    @property
    def whole(self) -> bool:
        return self.kind is int or int in typing.get_args(self.kind)

    def given(self, number: float) -> Any:
        """The value of the field in Python."""
        origin = typing.get_origin(self.kind)
        return {"x": number} if origin is dict else (number,) * self.n_values if origin is tuple else number


def has_number(kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return False
    return kind in (int, float) or any(map(has_number, typing.get_args(kind)))


def numbers(schema: type, prefix: str = "") -> Iterator[Number]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from numbers(typing.cast(type, kind), f"{prefix}{field.name}.")
        elif has_number(kind):
            yield Number(prefix + field.name, field.name, kind, field.metadata.get(RANGE), schema)


def required(schema: type) -> list[str]:
    return [f"{key}=x" for key, _, default, _ in flatten(schema) if default == "required"]


def needed(schema: type) -> dict[str, Any]:
    """The fields of a config that must be given."""
    hints = typing.get_type_hints(schema)
    without = [f.name for f in dataclasses.fields(schema) if f.default is f.default_factory is dataclasses.MISSING]
    return {
        name: hints[name](**needed(hints[name])) if dataclasses.is_dataclass(hints[name]) else "x" for name in without
    }


def outside(number: Number) -> list[float]:
    """Just below the range, just above it, and what no range has."""
    assert number.range is not None
    low, high = number.range.at_least, number.range.at_most
    step = 1 if number.whole else 0.001
    found = [low - step] if low is not None else []
    found += [number.range.above] if number.range.above is not None else []
    found += [high + step] if high is not None else []
    found += [number.range.below] if number.range.below is not None else []
    return [int(of) for of in found] if number.whole else [*map(float, found), math.nan, math.inf, -math.inf]


def test_every_number_of_every_verb_declares_its_range() -> None:
    found = [(verb, number) for verb, schema in SCHEMAS.items() for number in numbers(schema)]
    assert len(found) > 200
    without = [f"{verb}: {number.key}" for verb, number in found if number.range is None]
    assert without == []
    unbounded = [n.key for _, n in found if n.whole and n.range and n.range.at_least is None and n.range.above is None]
    assert unbounded == []  # whole numbers are of something; `-inf` can't be given for them


def test_a_number_without_a_range_is_found() -> None:
    @dataclass(frozen=True)
    class Careless:
        n: int = 3
        sizes: tuple[int, ...] = ()
        name: str = ""

    Careless.__annotations__ = {"n": int, "sizes": tuple[int, ...], "name": str}
    assert [number.key for number in numbers(Careless) if number.range is None] == ["n", "sizes"]


@pytest.mark.heavy
@pytest.mark.parametrize("verb", SCHEMAS)
def test_a_number_outside_its_range_is_refused_with_its_full_key(verb: str) -> None:
    schema = SCHEMAS[verb]
    for number in numbers(schema):
        assert number.range is not None, number.key
        wrong = outside(number)[0]  # the first alone: to compose a training run takes 0.15 s
        with pytest.raises(InputError) as refused:
            compose(schema, [*required(schema), number.text(wrong)])
        key, _, said = str(refused.value).partition("=")
        assert re.sub(r"\[\d\]$|\.x$", "", key) == number.key, (str(refused.value), wrong)
        assert said == f"{wrong} must be {number.range}", number.text(wrong)


@pytest.mark.parametrize("verb", SCHEMAS)
def test_python_is_refused_the_same_with_the_fields_own_name(verb: str) -> None:
    for number in numbers(SCHEMAS[verb]):
        others = needed(number.owner)
        for wrong in outside(number):
            with pytest.raises(InputError, match=rf"^{number.name}(\[0\]|\.x)?=") as refused:
                number.owner(**{**others, number.name: number.given(wrong)})
            finite = "" if math.isfinite(wrong) or str(number.range) == "finite" else "a finite number, "
            assert str(refused.value).endswith(f"={wrong} must be {finite}{number.range}")


def test_what_is_not_finite_is_called_so() -> None:
    for value in (math.inf, math.nan):
        with pytest.raises(InputError, match=f"guidance_scale={value} must be a finite number, at least 0"):
            SamplerConfig(guidance_scale=value)


def test_a_range_says_what_is_right() -> None:
    assert str(Range(at_least=1)) == "at least 1"
    assert str(Range(at_least=0, below=1)) == "at least 0 and below 1"
    assert str(Range(at_least=1, at_most=3)) == "from 1 to 3"
    assert str(Range()) == "finite"
    assert 0 in Range(at_least=0)
    assert 0 not in Range(above=0)
    assert 1 not in Range(below=1)
    assert math.nan not in Range()


def test_a_config_that_has_more_to_check_checks_its_ranges_too() -> None:
    @dataclass(frozen=True)
    class More(Checked):
        n: int = checked(1, at_least=1)

        def __post_init__(self) -> None:
            super().__post_init__()
            assert self.n != 5

    with pytest.raises(InputError, match="n=0 must be at least 1"):
        More(0)
