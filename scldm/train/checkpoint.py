"""The checkpoint format, which knows neither world size nor ZeRO stage, and how it is read.

    checkpoints/step-00001500/part-0-of-2.safetensors   {weight,ema,exp_avg,exp_avg_sq}/NAME, buffer/NAME
    checkpoints/step-00001500/state.json                what follows, and a SHA-256 of it
        what run_state.py keeps, such as step. loader and meter: their places. n_updates: steps that were not skipped
        format    of this folder
        shapes    parameter name -> shape
        parts     file -> SHA-256, bytes, ranges: parameter name -> [start, stop] of the flattened parameter in it
        files     file -> SHA-256 of the config and the vocabularies that lie beside it
    checkpoints/latest, checkpoints/best                the name of a step's folder

A part holds what one rank held, flat, in float32 (weights are the masters). All parts hold every number once. Any
engine reads the ranges that it holds itself out of the parts that have them.

Reading order: Held, Checkpoint, load, read_ema, resume. Writing is in saver.py, the folder of all in steps.py.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import reprlib
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scldm.errors import InputError, json_of
from scldm.files import remove as remove_path
from scldm.files import sha256_of
from scldm.given_json import Count, hash_of, known_of
from scldm.parallel.dist import World
from scldm.parallel.surface import Engine
from scldm.train.ema import EMA
from scldm.train.steps import BESIDE, BROKEN, STATE, candidates, point, pointed, rename, unfinished

FORMAT = 4
SEEN_S = 20.0  # in which what another host wrote is to be seen on this one. Network file systems cache what was
FILE_NAME = re.compile(r"\w[\w.-]*")
KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
Which = Literal["best", "latest"]


class Damaged(InputError):
    """A checkpoint of which something is missing or not as it was written."""


class Missing(Damaged):
    """A checkpoint of which this host does not see something: another may, or this one in a while."""


class Short(Missing):
    """A checkpoint of which this host does not see all bytes: where that stays so, they are lost."""


@dataclass(frozen=True)
class File:
    sha256: str
    bytes: Count


class Ranges(dict[str, list[int]]):
    """Parameter name -> start and stop of its numbers in a part. At a thousand ranks there are 150,000: they are read
    without the care of `typed`, which takes ten times as long."""

    @classmethod
    def from_json(cls, value: Any, where: str) -> Ranges:
        if not isinstance(value, dict):
            raise InputError(f"{where} is a {type(value).__name__}, must be a mapping")
        for name, ends in value.items():
            if not (type(ends) is list and [type(end) for end in ends] == [int, int]):
                raise InputError(f"{where}.{name} is {reprlib.repr(ends)}, must be two whole numbers")
        return cls(value)


@dataclass(frozen=True)
class Part(File):
    ranges: Ranges


@dataclass(frozen=True)
class Held:
    """What state.json says of the tensors. The rest of it is the loop's."""

    step: Count
    n_updates: Count
    shapes: dict[str, tuple[Count, ...]]
    parts: dict[str, Part]
    files: dict[str, File]


class Checkpoint:
    """One step's folder, opened for reading. Tensors are on the CPU.

    note: what state.json holds, where it was read already

    Raises: Damaged, or InputError for a format that this version does not know.
    """

    def __init__(self, folder: Path, note: bytes | None = None) -> None:
        if note is None and (note := read_note(folder)) is None:
            raise Missing(f"{folder} is not a whole checkpoint: {STATE} is missing")
        try:
            stored = json_of(note, folder / STATE)
        except InputError as error:
            raise Damaged(str(error)) from None
        state = stored.get("state") if isinstance(stored, dict) else None
        if not isinstance(state, dict) or stored.get("sha256") != hash_of(state):
            raise Damaged(f"{folder / STATE} is damaged: it is not what its SHA-256 says")
        version = state.get("format")
        if version != FORMAT:
            raise InputError(f"{folder} has checkpoint format {version}. This version of scldm reads {FORMAT}")
        self.folder, self.state = folder, state
        try:
            self.held = known_of(Held, self.state, str(folder / STATE))
        except InputError as error:
            raise Damaged(str(error)) from None
        self._check_held()
        self.step, self.shapes = self.held.step, {name: list(shape) for name, shape in self.held.shapes.items()}
        self.files: dict[str, File] = {**self.held.parts, **self.held.files}

    def _check_held(self) -> None:
        """Raises: Damaged for what can't be, before anything is read or made room for."""
        held, where = self.held, self.folder / STATE
        if wrong := [name for name in (*held.parts, *held.files) if not FILE_NAME.fullmatch(name)]:
            raise Damaged(f"{where}: {wrong[0]!r} is no name of a file in the checkpoint")
        numbers = {name: math.prod(shape) for name, shape in held.shapes.items()}
        for part, entry in held.parts.items():
            for name, (start, stop) in entry.ranges.items():
                if not 0 <= start <= stop <= numbers.get(name, -1):
                    raise Damaged(f"{where}: {part} has numbers {start} to {stop} of {name}, which has no such")
        if (size := 4 * len(KINDS) * sum(numbers.values())) > (n_bytes := sum(p.bytes for p in held.parts.values())):
            raise Damaged(f"{where}: parameters of {size} bytes, its parts have {n_bytes}")

    def check(self, names: Iterable[str] | None = None) -> None:
        """Read these of its files, or all, and compare. Raises: Damaged, with the file."""
        if added := [name for name in BESIDE if name not in self.files and (self.folder / name).exists()]:
            # its weights may be sound: a run that goes on puts damaged checkpoints aside, and not this one
            raise InputError(f"{self.folder / added[0]} is not noted in {STATE}: it was added later. Remove it")
        for name in self.files if names is None else names:
            path, expected = self.folder / name, self.files[name]
            if not path.is_file():
                raise Missing(f"{path} is missing")
            if (size := path.stat().st_size) != expected.bytes:
                kind = Short if size < expected.bytes else Damaged
                raise kind(f"{path} is damaged: it has {size} bytes of {expected.bytes}")
            if sha256_of(path)[1] != expected.sha256:
                raise Damaged(f"{path} is damaged: its SHA-256 is not the one noted in {STATE}")

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Numbers start to stop of a flattened parameter, float32 (stop - start,)."""
        stop = math.prod(self.shapes[name]) if stop is None else stop
        out, n_read = torch.empty(stop - start), 0
        for part, first, last in self._where.get(name, ()):
            low, high = max(start, first), min(stop, last)
            if low < high:
                try:
                    found = self._opened(part).get_slice(f"{kind}/{name}")[low - first : high - first]
                    out[low - start : high - start] = found
                except (SafetensorError, RuntimeError) as error:
                    raise Damaged(f"{self.folder / part}: {kind}/{name}: {error}") from None
                n_read += high - low
        if n_read != stop - start:
            raise Damaged(f"{self.folder} holds {n_read} of {stop - start} numbers of {kind}/{name}")
        return out

    def holds(self, name: str) -> None:
        """Raises: Damaged where some numbers of a parameter are in no part, or in two."""
        ends = sorted((start, stop) for _, start, stop in self._where.get(name, ()))
        expected = 0
        for start, stop in ends:
            if start != expected:
                break
            expected = stop
        if expected != math.prod(self.shapes[name]):
            raise Damaged(f"{self.folder}: its parts do not hold every number of {name} once")

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter's weight, EMA or moment in its shape."""
        return self.read(kind, name).view(self.shapes[name])

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        for part in self.held.parts:
            file = self._opened(part)
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                kind, _, name = key.partition("/")
                if kind == "buffer":
                    yield name, file.get_tensor(key)

    def ema(self) -> dict[str, Tensor]:
        """EMA of the weights, and buffers: what is validated, exported and sampled."""
        return {**{name: self.whole("ema", name) for name in self.shapes}, **dict(self.buffers())}

    @cached_property
    def _where(self) -> dict[str, list[tuple[str, int, int]]]:
        """Parameter name -> the parts that have something of it, and which numbers."""
        where: dict[str, list[tuple[str, int, int]]] = {}
        for part, entry in self.held.parts.items():
            for name, (start, stop) in entry.ranges.items():
                where.setdefault(name, []).append((part, start, stop))
        return where

    def _opened(self, part: str) -> Any:
        self._open = getattr(self, "_open", {})
        if part not in self._open:
            try:
                self._open[part] = safe_open(self.folder / part, framework="pt")
            except (SafetensorError, OSError) as error:
                raise Damaged(f"{self.folder / part} is damaged: {error}") from None
        return self._open[part]


# --- reading -------------------------------------------------------------------------------------------------------


def load(checkpoint: Checkpoint, engine: Engine, ema: EMA) -> None:
    """Put a checkpoint's tensors into engine and EMA, whatever wrote it: this rank's part of them. Collective.

    Raises: InputError for a checkpoint of another network.
    """
    for name, shape in engine.shapes.items():
        found = checkpoint.shapes.get(name)
        if found != list(shape):
            raise InputError(
                f"{checkpoint.folder}: parameter {name} is {'missing' if found is None else tuple(found)}, "
                f"the network has {tuple(shape)}: it is a checkpoint of another model"
            )
    with torch.no_grad():
        for piece, ema_weight in zip(engine.pieces, ema.weights, strict=True):
            for kind, value in {"weight": piece.weight, "ema": ema_weight, **piece.moments}.items():
                value.copy_(checkpoint.read(kind, piece.name, piece.start, piece.stop))
        stored = dict(checkpoint.buffers())
        for name, buffer in engine.module.named_buffers():
            if name not in stored or stored[name].shape != buffer.shape:
                why = f"has {tuple(stored[name].shape)}" if name in stored else "is missing"
                raise InputError(f"{checkpoint.folder}: buffer {name} {why}: it is a checkpoint of another model")
            buffer.copy_(stored[name])
    engine.publish()
    engine.set_steps(checkpoint.held.n_updates)
    ema.n_updates = checkpoint.held.n_updates


def read_ema(run_dir: Path, which: Which) -> tuple[dict[str, Tensor], int, Path]:
    """EMA of the weights, and buffers, of one of a run's checkpoints, its step and its folder.

    which: `best` by the validation metric, or `latest`

    Raises: InputError where the run has no such checkpoint, or it is damaged.
    """
    target = pointed(run_dir / "checkpoints" / which)
    if target is None:
        raise InputError(f"{run_dir} has no {which} checkpoint yet. Train it first")
    checkpoint = Checkpoint(target)
    checkpoint.check()
    return checkpoint.ema(), checkpoint.step, target


def resume(folder: Path, engine: Engine, ema: EMA, world: World) -> dict[str, Any] | None:
    """Load the last whole checkpoint below `folder`. Returns its state, None where there is none yet. Collective.

    The first rank reads state.json for all, which may be 15 MB at a thousand ranks. They share the reading of all other
    bytes. A damaged checkpoint is passed over, by name, for the one before it, and is renamed to `.broken`, so that
    nothing counts it. It is not renamed where some rank just does not see it.

    Raises: InputError where none is whole: to begin again over what was trained is for the user to decide.
    """
    if world.is_first:
        for left in unfinished(folder):
            remove_path(left)
    names = world.of_first([target.name for target in candidates(folder)] if world.is_first else None)
    for name in names:
        note = world.of_first(_note_seen(folder / name) if world.is_first else None)
        checkpoint, *trouble = _checked_share(folder / name, note, world)
        problems = [found for found in world.gather(trouble) if found[0]]
        if checkpoint is not None and not problems:
            load(checkpoint, engine, ema)
            if world.is_first:
                wrote = f"written by {len(checkpoint.state['parts'])} ranks, read by {world.size}"
                print(f"scldm: goes on from {folder / name}, {wrote}", file=sys.stderr, flush=True)
                if name != names[0]:
                    point(folder / "latest", checkpoint.folder)
            return checkpoint.state
        if world.is_first:
            told = next((told for told, harmed in problems if harmed), problems[0][0])
            print(f"scldm: {name} is passed over: {told}", file=sys.stderr, flush=True)
            if any(harmed for _, harmed in problems):
                rename(folder / name, (folder / name).with_suffix(BROKEN))
    if names:
        raise InputError(
            f"no whole checkpoint is left in {folder}: {', '.join(names)} can't be used (the damaged ones are now "
            f"*{BROKEN}). Copy one back, or choose another run_dir"
        )
    return None


def read_note(folder: Path) -> bytes | None:
    """What state.json holds. None where it is not to be seen, as of a checkpoint that is not whole."""
    try:
        return (folder / STATE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _note_seen(folder: Path) -> bytes | None:
    """`read_note`, once that is to be seen here."""
    return next((note for _ in _while_unseen(folder) if (note := read_note(folder)) is not None), None)


def _checked_share(target: Path, note: bytes | None, world: World) -> tuple[Checkpoint | None, str, bool]:
    """A checkpoint, or what is wrong with this rank's share of its files, and whether it is damage."""
    if note is None:
        return None, f"{target} is not a whole checkpoint: {STATE} is missing", False
    missing: Missing | None = None
    try:
        checkpoint = Checkpoint(target, note)
        for _ in _while_unseen(target):
            try:
                checkpoint.check(list(checkpoint.files)[world.rank :: world.size])
            except Missing as error:
                missing = error
            else:
                return checkpoint, "", False
    except Damaged as error:
        return None, str(error), True
    return None, str(missing), isinstance(missing, Short)


def _while_unseen(folder: Path) -> Iterator[None]:
    """Tries to see what another host wrote to a folder, for SEEN_S."""
    end = time.monotonic() + SEEN_S
    while True:
        yield
        if time.monotonic() > end:
            return
        time.sleep(min(1.0, SEEN_S / 10))
        with contextlib.suppress(OSError):
            os.listdir(folder)  # has a network file system ask its server again
