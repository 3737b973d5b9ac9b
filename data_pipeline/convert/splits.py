"""Which split a cell belongs to, drawn from its identity: neither the order of reading nor the workers matter."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.convert.config import SplitConfig
from data_pipeline.format.schema import SPLIT_NAME
from scldm.errors import InputError
from scldm.label_text import known_label

BASE = ("train", "validation", "test")
UNDRAWN = 255  # of a cell, until its split is drawn
MOST_SPLITS = 252  # besides these three


def columns_of(config: SplitConfig) -> tuple[str, ...]:
    """The obs columns that it takes to draw."""
    held_out = [c for c in read_held_out(config.held_out).columns if c != "split"] if config.held_out else []
    return tuple(dict.fromkeys([*config.stratify, *([config.by] if config.by else []), *held_out]))


# --- random numbers ------------------------------------------------------------------------------------------------


def keys(seed: int, purpose: str, source: np.ndarray, row: np.ndarray) -> np.ndarray:
    """One random uint64 for each cell: a function of seed, purpose, source and row alone (splitmix64's finaliser)."""
    start = int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = _mix(np.uint64(start) + source.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        return _mix(x ^ _mix(row.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- the draw ------------------------------------------------------------------------------------------------------


def draw_splits(
    config: SplitConfig, seed: int, obs: pd.DataFrame, source: np.ndarray, row: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...], dict[str, Any]]:
    """The split of each cell (uint8), the splits' names, and what the manifest says about the draw.

    obs: the columns of columns_of(config), as strings, a row per cell
    Raises: InputError for a value or a combination that no cell has.
    """
    split = np.full(len(source), UNDRAWN, np.uint8)
    names: list[str] = list(BASE)
    rule: dict[str, Any] = {"validation": config.validation, "test": config.test}
    explicit: set[str] = set()
    if config.held_out:
        table = read_held_out(config.held_out)
        names += sorted(set(table["split"]) - set(BASE))
        explicit |= set(table["split"])
        _hold_out(split, table, obs, names, config.held_out)
        rule["held_out"] = table.to_dict("list")
    taken: set[str] = set()
    for name, values in (("validation", config.validation_values), ("test", config.test_values)):
        if values:
            explicit.add(name)
            labels = _by_values(split, config.by, values, obs, names.index(name))
            if both := taken & labels:  # written in two ways, as 10 and 10.0
                raise InputError(
                    f"split.by={config.by}: {min(both)!r} stands in both validation_values and test_values"
                )
            taken |= labels
            rule[f"{name}_values"] = {config.by: list(values)}
    left = np.flatnonzero(split == UNDRAWN)
    shares = {name: getattr(config, name) for name in ("validation", "test") if name not in explicit}
    if config.by:
        rule["whole_values_of"] = config.by
        split[left] = _whole_values(shares, seed, config.by, obs[config.by].to_numpy()[left], names)
    else:
        rule["stratify"] = list(config.stratify)
        strata = np.zeros(len(left), np.int64)
        for column in config.stratify:
            codes = pd.factorize(obs[column].to_numpy()[left], sort=True)[0]
            strata = pd.factorize(strata * (codes.max(initial=0) + 1) + codes)[0]
        split[left] = _fractions(shares, strata, keys(seed, "split", source[left], row[left]), names)
    assert (split < len(names)).all()
    if not (split == 0).any():
        raise InputError("the split leaves no cell for training")
    return split, tuple(names), rule


def read_held_out(path: str) -> pd.DataFrame:
    """The CSV of held-out combinations, all strings, with a column `split`."""
    if not Path(path).is_file():
        raise InputError(f"split.held_out: {path}: no such file")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"split.held_out: {path}: can't be read as CSV in UTF-8: {error}") from None
    header = rows[0]
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise InputError(
                f"split.held_out: {path}: row {number + 1} has {len(row)} fields, the header {len(header)}"
            )
    if twice := [c for c in header if header.count(c) > 1]:
        raise InputError(f"split.held_out: {path}: column {twice[0]!r} stands twice")
    table = pd.DataFrame(rows[1:], columns=pd.Index(header), dtype=str)
    if table.empty or not len([c for c in table.columns if c != "split"]):
        raise InputError(f"split.held_out: {path}: needs a header of obs columns and a row for each combination")
    if "split" not in table:
        table["split"] = "test"
    wrong = [s for s in table["split"] if not SPLIT_NAME.fullmatch(s) or s == "train"]
    if wrong:
        raise InputError(
            f"split.held_out: {path}: {wrong[0]!r} is no name for a held-out split (up to 100 letters, digits, _)"
        )
    if (n := len(set(table["split"]) - set(BASE))) > MOST_SPLITS:
        raise InputError(f"split.held_out: {path}: {n} splits. There can be {MOST_SPLITS}")
    return table


def _hold_out(split: np.ndarray, table: pd.DataFrame, obs: pd.DataFrame, names: list[str], path: str) -> None:
    columns = [c for c in table.columns if c != "split"]
    wanted = pd.DataFrame({c: [known_label(v, known) for v in table[c]] for c in columns for known in [set(obs[c])]})
    combinations = pd.MultiIndex.from_frame(wanted)
    if combinations.has_duplicates:
        raise InputError(f"split.held_out: {path}: {combinations[combinations.duplicated()][0]} stands twice")
    which = combinations.get_indexer(pd.MultiIndex.from_frame(pd.DataFrame(obs[columns])))
    unmet = np.setdiff1d(np.arange(len(table)), which)
    if len(unmet):
        text = ", ".join(f"{c}={table[c].iloc[unmet[0]]!r}" for c in columns)
        raise InputError(f"split.held_out: {path}: line {unmet[0] + 2}: no cell has {text}")
    numbers = np.array([names.index(s) for s in table["split"]], np.uint8)
    split[which >= 0] = numbers[which[which >= 0]]


def _by_values(split: np.ndarray, column: str, values: tuple[str, ...], obs: pd.DataFrame, number: int) -> set[str]:
    """Gives cells of these values the split's number. Returns the labels that the values are."""
    present = obs[column].to_numpy()
    known = sorted(set(present))
    found = {value: known_label(value, known) for value in values}
    for value, label in found.items():
        if label not in known:
            raise InputError(
                f"split.by={column}: no cell has {value!r}. There are {len(known)} values, such as {known[:5]}"
            )
    split[np.isin(present, list(found.values())) & (split == UNDRAWN)] = number
    return set(found.values())


def _fractions(shares: dict[str, float], strata: np.ndarray, key: np.ndarray, names: list[str]) -> np.ndarray:
    """Within each stratum, the cells with the smallest keys are training, the next validation, the last test.

    Numbers are rounded over all strata so far, in the order of their smallest keys. So the shares hold for small strata
    together, and for each as well as whole cells can.
    """
    out = np.zeros(len(key), np.uint8)
    if not len(key):
        return out
    order = np.lexsort((key, strata))
    sizes = np.bincount(strata)
    first = np.cumsum(sizes) - sizes
    rank = np.arange(len(order)) - np.repeat(first, sizes)
    turn = np.argsort(key[order[first]])
    # a split takes its part of what is held out so far, which never falls from one stratum to the next
    share_left = sum(shares.values())
    left = np.floor(np.cumsum(sizes[turn]) * share_left + 0.5)
    taken = {}
    for name, share in shares.items():
        if share > 0:
            part = np.floor(left * min(share / share_left, 1.0) + 0.5)
            taken[name] = np.empty(len(sizes), np.int64)
            taken[name][turn] = np.diff(part, prepend=0)
            left, share_left = left - part, share_left - share
    high = sizes
    for name, n in reversed(taken.items()):
        low = high - n
        out[order[(rank >= np.repeat(low, sizes)) & (rank < np.repeat(high, sizes))]] = names.index(name)
        high = low
    return out


def _whole_values(shares: dict[str, float], seed: int, column: str, values: np.ndarray, names: list[str]) -> np.ndarray:
    """Values in the order of their hash. A share of f takes round(f n) of n values, and at least one."""
    codes, unique = pd.factorize(values, sort=True)
    hashes = [hashlib.sha256(f"{seed} split {value}".encode()).digest() for value in unique]
    order = sorted(range(len(unique)), key=lambda k: hashes[k])
    taken = {name: max(1, round(share * len(unique))) for name, share in shares.items() if share > 0}
    if taken and sum(taken.values()) >= len(unique):
        raise InputError(
            f"split.by={column}: its {len(unique)} values are too few to draw {' and '.join(taken)} from. "
            f"split.{next(iter(taken))}=0 draws none"
        )
    of_value = np.zeros(len(unique), np.uint8)
    for name, n in taken.items():
        of_value[order[:n]], order = names.index(name), order[n:]
    return of_value[codes]
