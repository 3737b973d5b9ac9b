"""The checkpoint format, which knows neither world size nor ZeRO stage, and how it is read.

    checkpoints/step-00001500/part-0-of-2.safetensors   K/{weight,ema,exp_avg,exp_avg_sq}/NAME
    checkpoints/step-00001500/buffers.safetensors       NAME
    checkpoints/step-00001500/state.json                what follows, and a SHA-256 of it
        what run_state.py keeps, such as step. loader and meter: their places. n_updates: steps that were not skipped
        format    of this folder
        shapes    parameter name -> shape
        parts     file -> its bytes, ends and SHA-256 of its header and of each rank's stretch, ranges: parameter name
                  -> where the flattened parameter begins in stretch 0, 1, .., and where it ends in the last
        files     file -> SHA-256 of the buffers, the config and the vocabularies
    checkpoints/latest, checkpoints/best                the name of a step's folder

A part holds what the ranks of one node held, flat, in float32 (weights are the masters). All parts hold every number
once. Any engine reads the ranges that it holds itself out of the parts that have them.

Reading order: Held, Checkpoint, Weights, load, read_ema, resume. Writing is in saver.py, the folder of all in steps.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import reprlib
import sys
import time
from collections.abc import Iterator, Mapping
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
from scldm.train.parts import KINDS
from scldm.train.steps import BESIDE, BROKEN, STATE, candidates, point, pointed, rename, unfinished

FORMAT = 5
BUFFERS = "buffers.safetensors"
SEEN_S = 20.0  # in which what another host wrote is to be seen on this one. Network file systems cache what was
FILE_NAME = re.compile(r"\w[\w.-]*")
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


class Bounds(dict[str, list[int]]):
    """Parameter name -> where its numbers begin in each stretch of a part, and where they end.

    At a thousand ranks these are 200,000 numbers. They are read without the care of `typed`, which takes ten times as
    long.
    """

    @classmethod
    def from_json(cls, value: Any, where: str) -> Bounds:
        if not isinstance(value, dict):
            raise InputError(f"{where} is a {type(value).__name__}, must be a mapping")
        for name, bounds in value.items():
            if not (type(bounds) is list and {type(bound) for bound in bounds} == {int}):
                raise InputError(f"{where}.{name} is {reprlib.repr(bounds)}, must be whole numbers")
        return cls(value)


@dataclass(frozen=True)
class Part:
    """ends, sha256: of the header, and of each stretch"""

    bytes: Count
    ends: tuple[Count, ...]
    sha256: tuple[str, ...]
    ranges: Bounds


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
        self.files: dict[str, File | Part] = {**self.held.parts, **self.held.files}

    def _check_held(self) -> None:
        """Raises: Damaged for what can't be, before anything is read or made room for."""
        held, where = self.held, self.folder / STATE
        if wrong := [name for name in (*held.parts, *held.files) if not FILE_NAME.fullmatch(name)]:
            raise Damaged(f"{where}: {wrong[0]!r} is no name of a file in the checkpoint")
        numbers = {name: math.prod(shape) for name, shape in held.shapes.items()}
        for part, entry in held.parts.items():
            n, ends = len(entry.ends), (0, *entry.ends)
            if n < 2 or len(entry.sha256) != n or list(ends) != sorted(ends) or ends[-1] != entry.bytes:
                raise Damaged(f"{where}: the ends of {part} and its hashes do not fit its {entry.bytes} bytes")
            for name, bounds in entry.ranges.items():
                if (
                    len(bounds) != n
                    or not (0 <= bounds[0] and bounds[-1] <= numbers.get(name, -1))
                    or bounds != sorted(bounds)
                ):
                    raise Damaged(f"{where}: {part} has numbers {reprlib.repr(bounds)} of {name}, which has no such")
        if (size := 4 * len(KINDS) * sum(numbers.values())) > (n_bytes := sum(p.bytes for p in held.parts.values())):
            raise Damaged(f"{where}: parameters of {size} bytes, its parts have {n_bytes}")

    @property
    def n_ranks(self) -> int:
        """That wrote it."""
        return sum(len(part.ends) - 1 for part in self.held.parts.values())

    def check(self, share: slice = slice(None)) -> None:
        """Read all of its files, or a share of their stretches, and compare. Raises: Damaged, with the file.

        Every number must be in one part: what `load` would miss is damage, for which a run goes back to an earlier one.
        """
        if added := [name for name in BESIDE if name not in self.files and (self.folder / name).exists()]:
            # its weights may be sound: a run that goes on puts damaged checkpoints aside, and not this one
            raise InputError(f"{self.folder / added[0]} is not noted in {STATE}: it was added later. Remove it")
        stretches = [(name, 0, of.bytes, of.sha256) for name, of in self.held.files.items()]
        for name, part in self.held.parts.items():
            starts = (0, *part.ends)
            stretches += [(name, *of) for of in zip(starts, part.ends, part.sha256, strict=False)]
        for name, start, stop, sha256 in stretches[share]:
            path, n_bytes = self.folder / name, self.files[name].bytes
            if not path.is_file():
                raise Missing(f"{path} is missing")
            if (size := path.stat().st_size) != n_bytes:
                kind = Short if size < n_bytes else Damaged
                raise kind(f"{path} is damaged: it has {size} bytes of {n_bytes}")
            if sha256_of(path, start=start, most=stop - start)[1] != sha256:
                raise Damaged(f"{path} is damaged: its SHA-256 is not the one noted in {STATE}")
        for name, shape in self.held.shapes.items():
            reached = 0
            for start, stop in sorted((start, stop) for *_, start, stop in self._where.get(name, ())):
                reached = stop if start == reached else -1
            if reached != math.prod(shape):
                raise Damaged(f"{self.folder}: its parts do not hold every number of {name} once")

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Numbers start to stop of a flattened parameter, float32 (stop - start,)."""
        stop = math.prod(self.shapes[name]) if stop is None else stop
        out, n_read = torch.empty(stop - start), 0
        for part, k, first, last in self._where.get(name, ()):
            low, high = max(start, first), min(stop, last)
            if low < high:
                try:
                    found = self._opened(part).get_slice(f"{k}/{kind}/{name}")[low - first : high - first]
                    out[low - start : high - start] = found
                except (SafetensorError, RuntimeError) as error:
                    raise Damaged(f"{self.folder / part}: {k}/{kind}/{name}: {error}") from None
                n_read += high - low
        if n_read != stop - start:
            raise Damaged(f"{self.folder} holds {n_read} of {stop - start} numbers of {kind}/{name}")
        return out

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter's weight, EMA or moment in its shape."""
        return self.read(kind, name).view(self.shapes[name])

    def buffers(self) -> dict[str, Tensor]:
        file = self._opened(BUFFERS)
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping

    @cached_property
    def _where(self) -> dict[str, list[tuple[str, int, int, int]]]:
        """Parameter name -> the parts and their stretches that have something of it, and which numbers."""
        where: dict[str, list[tuple[str, int, int, int]]] = {}
        for part, entry in self.held.parts.items():
            for name, bounds in entry.ranges.items():
                found = enumerate(itertools.pairwise(bounds))
                where.setdefault(name, []).extend((part, k, *ends) for k, ends in found if ends[0] < ends[1])
        return where

    def _opened(self, part: str) -> Any:
        self._open = getattr(self, "_open", {})
        if part not in self._open:
            try:
                self._open[part] = safe_open(self.folder / part, framework="pt")
            except (SafetensorError, OSError) as error:
                raise Damaged(f"{self.folder / part} is damaged: {error}") from None
        return self._open[part]


class Weights(Mapping[str, Tensor]):
    """Weights of a checkpoint, each read when it is asked for, and its buffers.

    kind: `ema`, which is validated, exported and sampled, or `weight`
    empty: the same on the meta device
    """

    def __init__(self, checkpoint: Checkpoint, kind: str) -> None:
        self.checkpoint, self.kind, self.buffers = checkpoint, kind, checkpoint.buffers()
        self.empty = {name: torch.empty(shape, device="meta") for name, shape in checkpoint.shapes.items()}
        self.empty |= {name: torch.empty_like(buffer, device="meta") for name, buffer in self.buffers.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name] if name in self.buffers else self.checkpoint.whole(self.kind, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.empty)

    def __len__(self) -> int:
        return len(self.empty)


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
        stored = checkpoint.buffers()
        for name, buffer in engine.module.named_buffers():
            if name not in stored or stored[name].shape != buffer.shape:
                why = f"has {tuple(stored[name].shape)}" if name in stored else "is missing"
                raise InputError(f"{checkpoint.folder}: buffer {name} {why}: it is a checkpoint of another model")
            buffer.copy_(stored[name])
    engine.publish()
    engine.set_steps(checkpoint.held.n_updates)
    ema.n_updates = checkpoint.held.n_updates


def read_ema(run_dir: Path, which: Which) -> Weights:
    """EMA of the weights, and buffers, of one of a run's checkpoints, all of whose bytes were compared.

    which: `best` by the validation metric, or `latest`

    Raises: InputError where the run has no such checkpoint, or it is damaged.
    """
    target = pointed(run_dir / "checkpoints" / which)
    if target is None:
        raise InputError(f"{run_dir} has no {which} checkpoint yet. Train it first")
    checkpoint = Checkpoint(target)
    checkpoint.check()
    return Weights(checkpoint, "ema")


def resume(folder: Path, engine: Engine, ema: EMA, world: World) -> dict[str, Any] | None:
    """Load the last whole checkpoint below `folder`. Returns its state, None where there is none yet. Collective.

    The first rank reads state.json for all: at a thousand ranks it has 3.6 MB. They share the reading of all other
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
                wrote = f"written by {checkpoint.n_ranks} ranks, read by {world.size}"
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
                checkpoint.check(slice(world.rank, None, world.size))
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
