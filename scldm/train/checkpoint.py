"""Checkpoints that know neither world size nor ZeRO stage: tensors by parameter name in safetensors, the rest in JSON.

    checkpoints/step-00001500/part-0-of-2.safetensors   {weight,ema,exp_avg,exp_avg_sq,buffer}/NAME
    checkpoints/step-00001500/state.json                step, loader state, best metric, SHA-256 of every part
    checkpoints/latest, checkpoints/best                the name of a step's folder

Every rank writes its share of the tensors into a folder aside; the first rank renames it when all parts are on disk,
and moves the pointers after that. Reading order: save, load, load_averaged, retain.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scldm.errors import InputError, read_json
from scldm.parallel.dist import World
from scldm.parallel.engine import MOMENTS, Engine
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
    save_file(own_share(engine, ema, world), part)
    _sync(part)
    world.barrier()
    if world.is_first:
        hashes = {p.name: _sha256(p) for p in sorted(aside.glob("part-*"))}
        text = json.dumps({**state, "ema_updates": ema.n_updates, "parts": hashes}, indent=1)
        _write_synced(aside / STATE, text)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        if is_best:
            point(folder / "best", target)
        point(folder / "latest", target)
    world.barrier()
    return target


def own_share(engine: Engine, ema: EMA, world: World) -> dict[str, Tensor]:
    """The tensors that this rank writes: those of every world.size-th parameter, whole."""
    share: dict[str, Tensor] = {}
    parameters = dict(engine.module.named_parameters())
    for k, (name, moments) in enumerate(engine.optimizer_state()):  # collective: no rank may skip a parameter
        if k % world.size != world.rank:
            continue
        share[f"weight/{name}"] = parameters[name].detach().cpu().contiguous()
        share[f"ema/{name}"] = ema.weights[name].cpu().contiguous()
        for moment, value in moments.items():
            share[f"{moment}/{name}"] = value.reshape(parameters[name].shape).contiguous()
    if world.is_first:
        share |= {f"buffer/{name}": buffer.cpu().contiguous() for name, buffer in engine.module.named_buffers()}
    return share


def load(target: Path, engine: Engine, ema: EMA) -> dict[str, Any]:
    """Put a checkpoint's tensors into engine and EMA, whatever wrote it; returns its state.

    Raises: InputError for a checkpoint that is not whole, or not of this network.
    """
    state = read_state(target)
    tensors = read_tensors(target, state)
    names = [name for name, _ in engine.module.named_parameters()]
    for name, parameter in engine.module.named_parameters():
        found = tensors.get(f"weight/{name}")
        if found is None or found.shape != parameter.shape:
            raise InputError(
                f"{target}: parameter {name} is {'missing' if found is None else tuple(found.shape)}, "
                f"the network has {tuple(parameter.shape)}: it is a checkpoint of another model"
            )
    engine.load(
        {name: tensors[f"weight/{name}"] for name in names},
        {name: {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS} for name in names},
        state["step"],
    )
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(tensors[f"buffer/{name}"])
    ema.load({name: tensors[f"ema/{name}"] for name in names}, state["ema_updates"])
    return state


def load_averaged(module: nn.Module, run_dir: Path, which: Literal["best", "latest"]) -> int:
    """Put the averaged weights of one of a run's checkpoints into a network of the run's config; returns the step.

    which: `best` by the validation metric, or `latest`

    Raises: InputError where the run has no such checkpoint, or it is of another network.
    """
    target = pointed(run_dir / "checkpoints" / which)
    if target is None:
        raise InputError(f"{run_dir} has no {which} checkpoint yet; train it first")
    state = read_state(target)
    tensors = read_tensors(target, state)
    found = {key.split("/", 1)[1]: v for key, v in tensors.items() if key.startswith(("ema/", "buffer/"))}
    expected = module.state_dict()
    wrong = sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in expected or name not in found or expected[name].shape != found[name].shape
    )
    if wrong:
        raise InputError(f"{target}: {wrong[0]} is not as the network has it: it is a checkpoint of another model")
    module.load_state_dict(found)
    return state["step"]


def read_state(target: Path) -> dict[str, Any]:
    if not (target / STATE).is_file():
        raise InputError(f"{target} is not a whole checkpoint: {STATE} is missing")
    return read_json(target / STATE)


def read_tensors(target: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors, on the CPU, after checking the parts' hashes."""
    tensors: dict[str, Tensor] = {}
    for part, sha256 in state["parts"].items():
        path = target / part
        if not path.is_file() or _sha256(path) != sha256:
            raise InputError(f"{path} is {'damaged' if path.is_file() else 'missing'}: the checkpoint can't be used")
        tensors |= load_file(path)
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
