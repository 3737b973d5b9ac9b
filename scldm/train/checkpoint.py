"""Checkpoints that know neither world size nor ZeRO stage: tensors by parameter name in safetensors, the rest in JSON.

    checkpoints/step-00001500/part-0-of-2.safetensors   {weight,ema,exp_avg,exp_avg_sq}/NAME, buffer/NAME
    checkpoints/step-00001500/state.json                step, loader state, best metric, shapes, SHA-256 of every part
    checkpoints/latest, checkpoints/best                the name of a step's folder

A part holds a range of every parameter, flattened; its own metadata say which (`ranges`: NAME -> [start, stop]).
Every rank writes what it holds into a folder aside; the first rank renames it when all parts are on disk,
and moves the pointers after that. Reading order: save, load, load_averaged, averaged, retain.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scldm.errors import InputError, read_json
from scldm.parallel.dist import World
from scldm.parallel.engine import Engine
from scldm.train.ema import EMA

STATE = "state.json"


def save(folder: Path, engine: Engine, ema: EMA, state: dict[str, Any], world: World, is_best: bool = False) -> Path:
    """Write the checkpoint of `state["step"]` below `folder` and point `latest` at it; collective.

    is_best: point `best` at it too; before `latest`, since a run that resumes from here takes its metric for the best
    """
    target = folder / f"step-{state['step']:08d}"
    aside = target.with_suffix(".partial")
    if world.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    world.barrier()
    part = aside / f"part-{world.rank}-of-{world.size}.safetensors"
    ranges = {piece.name: (piece.start, piece.stop) for piece in engine.pieces}
    save_file(own_share(engine, ema, world), part, {"ranges": json.dumps(ranges)})
    _sync(part)
    world.barrier()
    if world.is_first:
        hashes = {p.name: _sha256(p) for p in sorted(aside.glob("part-*"))}
        shapes = {name: list(shape) for name, shape in engine.shapes.items()}
        rest = {"ema_updates": ema.n_updates, "shapes": shapes, "parts": hashes}
        text = json.dumps({**state, **rest}, indent=1)
        _write_synced(aside / STATE, text)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        if is_best:
            point(folder / "best", target)
        point(folder / "latest", target)
    world.barrier()
    return target


def own_share(engine: Engine, ema: EMA, world: World) -> dict[str, Tensor]:
    """The tensors that this rank writes: what it holds of every parameter."""
    share: dict[str, Tensor] = {}
    for piece, average in zip(engine.pieces, ema.averages, strict=True):
        for kind, value in {"weight": piece.weight, "ema": average, **piece.moments}.items():
            share[f"{kind}/{piece.name}"] = value.cpu().clone()  # of its own memory, as safetensors wants it
    if world.is_first:
        share |= {f"buffer/{name}": buffer.cpu().contiguous() for name, buffer in engine.module.named_buffers()}
    return share


def load(target: Path, engine: Engine, ema: EMA) -> dict[str, Any]:
    """Put a checkpoint's tensors into engine and EMA, whatever wrote it; returns its state. Collective.

    Raises: InputError for a checkpoint that is not whole, or not of this network.
    """
    state = read_state(target)
    for name, shape in engine.shapes.items():
        found = state["shapes"].get(name)
        if found != list(shape):
            raise InputError(
                f"{target}: parameter {name} is {'missing' if found is None else tuple(found)}, "
                f"the network has {tuple(shape)}: it is a checkpoint of another model"
            )
    tensors = read_tensors(target, state)
    with torch.no_grad():
        for piece, average in zip(engine.pieces, ema.averages, strict=True):
            for kind, value in {"weight": piece.weight, "ema": average, **piece.moments}.items():
                value.copy_(tensors[f"{kind}/{piece.name}"].view(-1)[piece.start : piece.stop])
        for name, buffer in engine.module.named_buffers():
            buffer.copy_(tensors[f"buffer/{name}"])
    engine.publish()
    engine.set_steps(state["step"])
    ema.n_updates = state["ema_updates"]
    return state


def load_averaged(module: nn.Module, run_dir: Path, which: Literal["best", "latest"]) -> int:
    """Put the averaged weights of one of a run's checkpoints into a network of the run's config; returns the step.

    which: `best` by the validation metric, or `latest`

    Raises: InputError where the run has no such checkpoint, or it is of another network.
    """
    found, step, target = averaged(run_dir, which)
    expected = module.state_dict()
    wrong = sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in expected or name not in found or expected[name].shape != found[name].shape
    )
    if wrong:
        raise InputError(f"{target}: {wrong[0]} is not as the network has it: it is a checkpoint of another model")
    module.load_state_dict(found)
    return step


def averaged(run_dir: Path, which: Literal["best", "latest"]) -> tuple[dict[str, Tensor], int, Path]:
    """Averaged weights and buffers of a checkpoint by name, its step and its folder."""
    target = pointed(run_dir / "checkpoints" / which)
    if target is None:
        raise InputError(f"{run_dir} has no {which} checkpoint yet; train it first")
    state = read_state(target)
    tensors = read_tensors(target, state)
    found = {key.split("/", 1)[1]: v for key, v in tensors.items() if key.startswith(("ema/", "buffer/"))}
    return found, state["step"], target


def read_state(target: Path) -> dict[str, Any]:
    if not (target / STATE).is_file():
        raise InputError(f"{target} is not a whole checkpoint: {STATE} is missing")
    return read_json(target / STATE)


def read_tensors(target: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors, whole, on the CPU, after checking the parts' hashes."""
    tensors: dict[str, Tensor] = {}
    for part, sha256 in state["parts"].items():
        path = target / part
        if not path.is_file() or _sha256(path) != sha256:
            raise InputError(f"{path} is {'damaged' if path.is_file() else 'missing'}: the checkpoint can't be used")
        with safe_open(path, framework="pt") as file:
            ranges = json.loads(file.metadata()["ranges"])
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                kind, name = key.split("/", 1)
                if kind == "buffer":
                    tensors[key] = file.get_tensor(key)
                else:
                    whole = tensors.setdefault(key, torch.empty(state["shapes"][name]))
                    whole.view(-1)[slice(*ranges[name])] = file.get_tensor(key)
    return tensors


def point(pointer: Path, target: Path) -> None:
    """Let `latest` or `best` name another checkpoint, at once or not at all."""
    aside = pointer.with_suffix(".partial")
    _write_synced(aside, target.name)
    os.replace(aside, pointer)


def pointed(pointer: Path) -> Path | None:
    """The checkpoint that `latest` or `best` names; None where there is none yet."""
    return pointer.parent / pointer.read_text().strip() if pointer.is_file() else None


def retain(folder: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints and those that `latest` and `best` name."""
    named = {pointed(folder / "latest"), pointed(folder / "best")}
    for old in sorted(folder.glob("step-*[0-9]"))[:-keep]:
        if old not in named:
            shutil.rmtree(old)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
