"""Harm that files meet: bytes that change, go or come, and JSON values that are others. Drawn by a seed.

Reading order: harmed_bytes, harmed_json, check_every_harm and its like.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scldm.errors import InputError
from scldm.given_json import hash_of

OTHERS: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 2**20, 2**31, 2**63, 10**30, 1.5, -0.5, float("nan"), float("inf"), 1e308),
    *("", "x", "train", "../x", "\ud800", "a\0b", "n" * 2_000, [], [0], [[]], {}, {"x": 1}, [None] * 3),
]


def harmed_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with some stretch of them flipped, zeroed, overwritten, gone, doubled, or cut off."""
    n, kind = len(data), int(rng.integers(6))
    start = int(rng.integers(n))
    stop = min(n, start + int(2 ** rng.uniform(0, 12)))
    if kind == 0:
        out = bytearray(data)
        out[start] ^= 1 << int(rng.integers(8))
        return bytes(out)
    middle = [bytes(stop - start), rng.bytes(stop - start), b"", data[start:stop] * 2]
    return data[:start] if kind == 5 else data[:start] + middle[kind - 1] + data[stop:]


def harmed_json(document: Any, rng: np.random.Generator) -> Any:
    """The document with one value, somewhere in it, another, gone, doubled, or with another key."""
    out = copy.deepcopy(document)
    places = list(_places(out))
    at, key = places[int(rng.integers(len(places)))]
    kind = int(rng.integers(6))
    if kind == 0:
        del at[key]
    elif kind == 1 and isinstance(at, dict):
        at[f"{key}_"] = at.pop(key)
    elif kind == 1:
        at.insert(int(rng.integers(len(at) + 1)), copy.deepcopy(at[key]))
    elif kind == 2 and isinstance(at[key], int | float):
        at[key] = at[key] + int(rng.choice([-1, 1, 256]))
    else:
        at[key] = copy.deepcopy(OTHERS[int(rng.integers(len(OTHERS)))])
    return out


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """(container, key) of the values within; of long lists the first ones, as often as others."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 4))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key], depth + 1)


def check_every_harm(path: Path, read: Callable[[], Any], n: int, seed: int = 0) -> int:
    """Harm a file n times: `read` refuses each by an InputError with the file's folder, or returns what it did before.

    Returns how often it refused.
    """
    whole, before, rng, n_refused = path.read_bytes(), read(), np.random.default_rng(seed), 0
    for k in range(n):
        harmed = harmed_bytes(whole, rng)
        if path.suffix == ".json" and k % 2:
            harmed = json.dumps(harmed_json(json.loads(whole), rng)).encode()
        path.write_bytes(harmed)
        found, refusal = outcome(path, read, f"harm {k} of {path.name}, seed {seed}")
        path.write_bytes(whole)
        assert refusal or found == before, f"harm {k} of {path.name}, seed {seed}, is read as if it were sound"
        n_refused += bool(refusal)
    assert read() == before
    return n_refused


def check_nothing_else_is_raised(path: Path, read: Callable[[], Any], within: str, n: int, seed: int = 0) -> int:
    """Harm a JSON file n times, and have its hash agree, as somebody who means ill would: `read` takes it or refuses.

    within: key of the document that the hash is of; empty for all but the hash
    Returns how often it refused.
    """
    whole, rng, n_refused = path.read_bytes(), np.random.default_rng(seed), 0
    document = json.loads(whole)
    inside = document[within] if within else {key: value for key, value in document.items() if key != "sha256"}
    for k in range(n):
        harmed = harmed_json(inside, rng)
        sealed = {"sha256": hash_of(harmed), within: harmed} if within else {**harmed, "sha256": hash_of(harmed)}
        path.write_text(json.dumps(sealed))
        n_refused += bool(outcome(path, read, f"harm {k} of {path.name}, seed {seed}")[1])
        path.write_bytes(whole)
    return n_refused


def check_taken_or_refused(path: Path, read: Callable[[], Any], n: int, seed: int = 0) -> int:
    """Harm a JSON file without a hash n times, in a value or as a whole: `read` takes it or refuses. Returns how often
    it refused."""
    whole, rng, n_refused = path.read_bytes(), np.random.default_rng(seed), 0
    for k in range(n):
        harmed = harmed_json({"": json.loads(whole)}, rng).get("", [{}])
        data = harmed_bytes(whole, rng) if k % 4 == 3 else json.dumps(harmed).encode()
        path.write_bytes(data)
        n_refused += bool(outcome(path, read, f"harm {k} of {path.name}, seed {seed}, {data[:200]!r}")[1])
        path.write_bytes(whole)
    return n_refused


def outcome(path: Path, read: Callable[[], Any], which: str) -> tuple[Any, str]:
    """What is read, or why it is refused: in one line, which names the place."""
    try:
        return read(), ""
    except InputError as error:
        refusal = str(error)
    except Exception as error:
        raise AssertionError(f"{which}: {type(error).__name__}: {error}") from error
    if (str(path.parent) not in refusal and str(path.parent.parent) not in refusal) or "\n" in refusal:
        raise AssertionError(f"{which}: refused without its file, or in many lines: {refusal}")
    return None, refusal
