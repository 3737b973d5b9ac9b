"""This project as a user runs it on one process: its presets through its verbs; and the parts of what it made.

The presets say how many steps to train, and stop the autoencoder early, as the other networks are. Where the CPU time
does not suffice for their steps they are fewer, by the time that a step takes.
Reading order: TITLE and NOTE, train, shards_of, the stages' words, scaled steps; draws.
"""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

import scldm
from benchmarks.quality.cells import SPLIT_COLUMN, Task
from benchmarks.quality.known import Known
from benchmarks.quality.methods.naive import control_rows, not_seen, not_shifted, seen_numbers, training_numbers
from benchmarks.quality.work import FIRST_STAGE, Clock, Made, Place, labels_frame, say
from launch.cli import config_of
from launch.evaluation.of_autoencoder import scored
from launch.evaluation.reconstructed_cells import known_genes
from launch.evaluation.reconstructed_cells import latents as embeddings
from scldm.errors import InputError
from scldm.evaluate.cells import Cells
from scldm.flow.sampler import SamplerConfig
from scldm.train.checkpoint import Checkpoint
from scldm.train.steps import pointed

TITLE = "this project's presets, a third of the genes given, drawn for each cell"
NOTE = (
    "this project: its presets give a third of the genes, unless vae= says otherwise. It trains the steps of its "
    "presets, or fewer where the CPU time does not suffice. Autoencoders stop early where their validation loss does "
    "not fall."
)
PROBE_STEPS = 20
LEAST_STEPS = 20
N_VALIDATIONS = 6  # at least, however few steps


def train(task: Task, seed: int, folder: Path, place: Place) -> dict[str, Any]:
    """Shards, both stages and the model folder. The second stage gets the CPU time that the first has left."""
    clock, config = Clock(), place.config
    shards_of(task, place, folder / "shards")
    common = ["hardware/cpu", "hardware.engine=plain", "tracking.enabled=false", f"train.seed={seed}"]
    words = ["vae/tiny", *common, f"data.shards={folder}/shards", "gate=false", *config.vae]
    vae_steps = scaled("train_vae", words, folder / "probe", FIRST_STAGE * config.seconds, clock)
    verb("train_vae", [*words, f"run_dir={folder}/vae", *vae_steps])
    verb("encode", [f"vae={folder}/vae", f"shards={folder}/shards", f"out={folder}/latents"])
    words = ["ldm/tiny", *common, f"data.shards={folder}/latents", *config.ldm]
    ldm_steps = scaled("train_ldm", words, folder / "probe", config.seconds, clock)
    verb("train_ldm", [*words, f"run_dir={folder}/ldm", *ldm_steps])
    verb("export", [f"vae={folder}/vae", f"ldm={folder}/ldm", f"out={folder}/model"])
    shutil.rmtree(folder / "latents")
    return {
        **{f"vae_{key}": value for key, value in course(folder / "vae").items()},
        **{f"ldm_{key}": value for key, value in course(folder / "ldm").items()},
        "ended": "steps cut to the CPU time" if vae_steps or ldm_steps else "as presets and words say",
    }


def shards_of(task: Task, place: Place, out: Path) -> None:
    """The task's cells as a shard set, with their splits."""
    verb("shards_write", [
        f"source.paths={place.cells}", f"out={out}", "block_cells=64", "shard_cells=1024",
        f"conditions={json.dumps(list(task.conditions))}", f"split.by={SPLIT_COLUMN}",
        "split.validation_values=[validation]", "split.test_values=[test]",
    ])  # fmt: skip


def verb(module: str, words: list[str]) -> Any:
    """Run a verb in this process, so that its start is not paid again; it is printed as a user would type it."""
    say(shlex.join(["scldm", module.replace("_", " "), *words]))
    found = importlib.import_module(f"launch.{module}")
    return found.main(config_of(found, words))


def scaled(module: str, words: list[str], probe: Path, seconds: float, clock: Clock) -> list[str]:
    """Words that cut the steps so that training ends when the clock shows so many CPU-seconds; none where the words
    set them, or the preset's end before.

    A run of one step, and one of 20 more, give the time of a step and that of a validation with its save.
    """
    if any(word.startswith("train.steps=") for word in words):
        return []

    def cost(steps: int) -> float:
        shutil.rmtree(probe, ignore_errors=True)
        began = Clock()
        rare = [f"train.{name}_every=1000000" for name in ("validate", "save")]
        verb(module, [*words, f"run_dir={probe}", f"train.steps={steps}", *rare])
        shutil.rmtree(probe)
        return began.cpu_s

    cost(1)  # what is compiled, is compiled here
    once = cost(1)
    step_s = max((cost(1 + PROBE_STEPS) - once) / PROBE_STEPS, 1e-4)
    preset = preset_of(module, words, probe).train
    every = preset.validate_every
    left = seconds - clock.cpu_s
    steps = max(LEAST_STEPS, int(left / (step_s + once / every)))
    if steps >= preset.steps:
        say(f"{module}: {1e3 * step_s:.1f} ms a step, {left:.0f} CPU-s left: the preset's {preset.steps} steps")
        return []
    if steps < N_VALIDATIONS * every:
        every = max(1, steps // N_VALIDATIONS)
        steps = max(LEAST_STEPS, int((left - N_VALIDATIONS * once) / step_s))
    say(f"{module}: {1e3 * step_s:.1f} ms a step, {left:.0f} CPU-s left: {steps} steps")
    return [f"train.steps={steps}", f"train.validate_every={every}", f"train.save_every={every}"]


def preset_of(module: str, words: list[str], run_dir: Path) -> Any:
    return config_of(importlib.import_module(f"launch.{module}"), [*words, f"run_dir={run_dir}"])


def course(run: Path) -> dict[str, Any]:
    """Steps of a run, and the best validation metric with its step."""

    def checkpoint(which: str) -> Checkpoint:
        found = pointed(run / "checkpoints" / which)
        assert found is not None, run
        return Checkpoint(found)

    best = checkpoint("best")
    return {"steps": checkpoint("latest").step, "best_step": best.step, "validation_loss": best.state["best"]}


# --- draws ---------------------------------------------------------------------------------------------------------


def generated(task: Task, seed: int, folder: Path, place: Place) -> Made:
    """Cells of every combination, as `scldm generate` writes them."""
    table, out = place.out / f"wanted-{seed}.csv", place.out / f"ours-{seed}" / "as_generated.h5ad"
    rows = [{**task.labels_of[key], "n_cells": n} for key, n in task.numbers.items()]
    pd.DataFrame(rows).to_csv(table, index=False)
    words = [f"model={folder}/model", f"conditions={table}", f"out={out}", f"seed={seed}", "device=cpu"]
    verb("generate", [*words, *place.config.generate])
    made = ad.read_h5ad(out)
    labels = pd.DataFrame({name: made.obs[name].astype(str).to_numpy(object) for name in task.conditions})
    out.unlink()
    return _as_task(task, made.X, list(made.var_names), labels)


def known(task: Task, seed: int, folder: Path, place: Place) -> Known:
    """As `scldm evaluate vae=` scores an autoencoder, and the latents that `scldm embed` gives."""
    model = scldm.load(folder / "model")
    train, test = (cells.to_cells(name) for cells, name in ((task.train, "train"), (task.test, "test")))
    latents = [embeddings(model, of.counts, ids_G) for of, ids_G in (known_genes(model, of) for of in (train, test))]
    return Known((latents[0], latents[1]), scored(model, train, test, seed)["scores"]["model"])


def transformed(task: Task, seed: int, folder: Path, place: Place) -> Made:
    """Control cells of the same kind, as `scldm transform` takes them to the treatment, by the sampler `shift`."""
    assert task.control is not None
    model, rng, name = scldm.load(folder / "model"), np.random.default_rng([seed, 12]), task.control[0]
    parts, keys = [], []
    for key in task.unseen:
        rows = control_rows(task, key, task.numbers[key], rng)
        cells = task.train.to_anndata()[rows].copy()
        cells.obs_names_make_unique()
        to = {name: task.labels_of[key][name]}
        moved = model.transform(cells, to, seed=seed, sampler=SamplerConfig(guidance="shift"))
        assert list(moved.var_names) == list(task.genes)
        parts.append(moved.X)
        keys += [key] * len(rows)
    counts = sp.csr_matrix(sp.vstack(parts))
    return Made(counts, labels_frame(task, np.array(keys, object)), not_shifted(task))


def reconstructed(task: Task, seed: int, folder: Path, place: Place) -> Made:
    """Test cells, encoded, decoded and drawn."""
    return _part(task, "reconstructed", folder, lambda make, model: make(model, task.test.to_cells("test"), seed))


def from_training_latents(task: Task, seed: int, folder: Path, place: Place) -> Made:
    """Cells decoded from the latents of training cells."""
    return _of_training(task, "decoded_from_training", folder, seed, training_numbers(task))


def gaussian_latents(task: Task, seed: int, folder: Path, place: Place) -> Made:
    """Cells decoded from a Gaussian per combination, fitted to the training cells' latents."""
    return _of_training(task, "gaussian_latents", folder, seed, seen_numbers(task))


def _of_training(task: Task, name: str, folder: Path, seed: int, numbers: dict[str, int]) -> Made:
    rng = np.random.default_rng([seed, 10])
    made = _part(task, name, folder, lambda make, model: make(model, task.train.to_cells("train"), numbers, rng))
    return replace(made, impossible=not_seen(task))


def _part(task: Task, name: str, folder: Path, call: Callable[[Any, scldm.Pretrained], Cells]) -> Made:
    """What a function of `launch.evaluation.reconstructed_cells` makes, as the task's cells."""
    make = getattr(importlib.import_module("launch.evaluation.reconstructed_cells"), name)
    made = call(make, scldm.load(folder / "model"))
    return _as_task(task, made.counts, made.genes, labels_frame(task, made.types))


def _as_task(task: Task, counts: Any, genes: Sequence[str], labels: pd.DataFrame) -> Made:
    """Cells with the genes in the task's order. Raises: InputError where the model lacks some."""
    place = {gene: k for k, gene in enumerate(genes)}
    if missing := [gene for gene in task.genes if gene not in place]:
        raise InputError(f"the model lacks {len(missing)} genes, such as {missing[0]!r}")
    return Made(sp.csr_matrix(sp.csr_matrix(counts)[:, [place[gene] for gene in task.genes]]), labels)
