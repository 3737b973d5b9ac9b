"""Is a trained autoencoder better than mean profiles? RUN/gate.json says so before a second stage is trained on it.

`scldm train vae` writes it at its end, `scldm encode` copies it beside the latents, and these two, `scldm status` and
`scldm train ldm` say what it found. Its keys:

step, hash    the checkpoint that was judged, the best one: its step, and the hash of its EMA weights
passed        true if it is better than mean profiles beyond chance. null where that could not be judged
line          the finding in one line
cells         how many of the splits were read and judged. drawn_of: of how many, where they were drawn
nll           of the model and of mean profiles: nats a cell, with standard error
less          by mean profile: nll of the model less that of the profile
label_recall, effective_dimension, sight    of the latents, as launch/evaluation/sight.py has them

Reading order: read_gate, line_of, warn, told_by_the_caller, judge_run, the cells, the finding, what to change.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scldm.errors import InputError
from scldm.files import outlived, write_json
from scldm.given_json import read_checked
from scldm.train.run_state import comparable
from scldm.train.steps import pointed
from scldm.train.tracking import Tracker, read_metrics

if TYPE_CHECKING:  # what an evaluation imports takes seconds, and a node that trains may lack it
    import torch

    from data_pipeline.format.schema import Manifest
    from data_pipeline.stream.loader import StreamConfig
    from launch.training import RunConfig
    from scldm.evaluate.cells import Cells

GATE = "gate.json"
MOST_CELLS = 2_000  # of a split that are read
FEWEST_CELLS = 10  # of a combination, on average, for a mean profile of its own
MEANS = {"mean_profile": "the mean profile", "mean_of_combination": "mean profiles per combination"}
RISE = 1e-3  # of the likelihood: a validation that ends so far above its best has overfitted
FEW_PASSES = 10  # over the training cells
KL_NATS = 1.0  # a cell: latents below it hardly differ between cells


def read_gate(folder: Path) -> dict[str, Any] | None:
    """What a run folder, or a set of latents, says. None where the autoencoder was not judged."""
    return read_checked(_Gate, folder / GATE)


@dataclass(frozen=True)
class _Gate:
    line: str
    step: int | None
    hash: str | None
    passed: bool | None


def gate_of(folder: Path, weights: str) -> dict[str, Any] | None:
    """The same, if it was found of the weights with this hash."""
    gate = read_gate(folder)
    return gate if gate and gate["hash"] == weights else None


def line_of(run: Path) -> str:
    """The finding as `scldm status` shows it, and whether it is of an earlier checkpoint. Empty where there is none."""
    gate, best_of = read_gate(run), pointed(run / "checkpoints" / "best")
    if gate is None:
        return ""
    best = int(best_of.name.removeprefix("step-")) if best_of else gate["step"]
    stale = (
        "" if best == gate["step"] else f" (found at step {gate['step']}, the best checkpoint is of step {best} now)"
    )
    return gate["line"] + stale


def warn(gate: Mapping[str, Any] | None, given: str) -> None:
    """Print that the autoencoder is no better than mean profiles, if it is not.

    given: the key and value that named it
    """
    if gate is not None and gate["passed"] is False and not _told.get():
        print(f"\nscldm: WARNING: {given}: the autoencoder is {gate['line']}\n", file=sys.stderr, flush=True)


_told: ContextVar[bool] = ContextVar("told", default=False)


@contextmanager
def told_by_the_caller() -> Iterator[None]:
    """Within, `warn` prints nothing: whoever runs both stages says it once."""
    before = _told.set(True)
    try:
        yield
    finally:
        _told.reset(before)


# --- after training ------------------------------------------------------------------------------------------------


def judge_run(config: RunConfig, tracker: Tracker, device: torch.device) -> None:
    """Judge the best checkpoint of a finished run, unless that was done: gate.json, metrics `gate/...`, a line.

    Whatever goes wrong is printed and noted, and the run is finished all the same.
    """
    run, began = Path(config.run_dir), time.perf_counter()
    of: dict[str, Any] = {"step": None, "hash": None}
    try:
        from launch.evaluation.of_autoencoder import autoencoder
        from scldm.networks import BATCH_CELLS

        model, origin = autoencoder(run, str(device), BATCH_CELLS)
        of = {"step": origin["step"], "hash": origin["hash"]}
        known = gate_of(run, of["hash"])
        if known is not None and "error" not in known:
            print(f"autoencoder: {known['line']}", flush=True)
            return
        gate = {**of, **found(config, model)}
    except (InputError, ModuleNotFoundError) as error:  # such as cells that it can't be given whole
        gate = not_judged(of, " ".join(str(error).split()))
    except Exception as error:
        traceback.print_exc()
        gate = not_judged(of, " ".join(f"{type(error).__name__}: {error}".split()))
    gate["seconds"] = round(time.perf_counter() - began, 1)
    with outlived(run / GATE):
        write_json(run / GATE, gate)
    tracker.log_artifact(run / GATE)
    if "error" in gate:
        print(f"\nscldm: WARNING: the autoencoder was {gate['line']}\n", file=sys.stderr, flush=True)
        return
    seen = [row.get("cells_seen", 0) for row in read_metrics(run) if row["step"] <= gate["step"]]
    tracker.log(gate["step"], metrics(gate), split="gate", cells_seen=max(seen, default=0))
    tracker.log_on_parent(metrics(gate), "gate")
    show(gate)


def not_judged(of: Mapping[str, Any], why: str) -> dict[str, Any]:
    return {**of, "passed": None, "line": f"not judged beside mean profiles: {why}", "error": why}


def cells_of(data: StreamConfig, conditions: tuple[str, ...], seed: int) -> list[Cells]:
    """A seeded draw of the training and validation cells that the run was trained and validated on. Test cells are not
    read: they are for what is chosen in the end."""
    from launch.evaluation.cells import cells_of_shards
    from scldm.evaluate.sample import Sample

    sample = Sample(MOST_CELLS, None, seed)
    place, splits = (data.cache_folder, data.cache_gb), ("train", "validation")
    return cells_of_shards(data.shards, conditions, sample, *place, splits, data.select)


def judged_conditions(manifest: Manifest) -> tuple[str, ...]:
    """Those of the set. None where its combinations are so many that each mean profile would be of a few cells."""
    train = manifest.split_number("train")
    n_combinations = sum(n[train] > 0 for n in manifest.statistics.combinations.n)
    return manifest.conditions.names if n_combinations * FEWEST_CELLS <= MOST_CELLS else ()


def found(config: RunConfig, model: Any) -> dict[str, Any]:
    """The finding, without the checkpoint that it is of. JSON-ready.

    Raises: InputError where the cells can't be read, or the model can't be given whole cells.
    """
    from data_pipeline.format.schema import read_manifest
    from launch.evaluation.of_autoencoder import scored

    conditions = judged_conditions(read_manifest(config.data.shards))
    train, validation = cells_of(config.data, conditions, config.train.seed)
    of = scored(model, train, validation, config.train.seed)
    drawn_of = {"train": train.drawn_of, "validation": validation.drawn_of}
    cells = {"train": len(train), "validation": of["cells"]["scored"], "drawn_of": drawn_of}
    scores, likelihood = of["scores"], model.vae.config.likelihood
    gate = {
        "conditions": list(conditions),
        "cells": cells,
        "nll": {name: score["re"] for name, score in scores.items()},
        "less": scores["model"]["re_less"],
        **{key: of["latents"][key] for key in ("label_recall", "effective_dimension", "sight")},
    }
    return {**gate, **finding(config, scores, gate, likelihood)}


def finding(config: RunConfig, scores: Mapping[str, Any], gate: dict[str, Any], likelihood: str) -> dict[str, Any]:
    """passed and line."""
    from launch.evaluation.of_autoencoder import blindness, least_of_means, verdict
    from scldm.evaluate.intervals import WIDTH

    nats = gate["nll"]["model"]["mean"]
    recall = ", ".join(
        f"{value:.2f}".removeprefix("0") + (f" ({name})" if len(gate["label_recall"]) > 1 else "")
        for name, value in gate["label_recall"].items()
    )
    latents = [f"recall {recall}"] * bool(recall) + [f"effective dimension {gate['effective_dimension']:.1f}"]
    blind = blindness(gate["sight"])
    if likelihood == "gaussian":
        return {"passed": None, "line": " ".join([f"{'; '.join(latents)}.", verdict(scores, likelihood), *blind])}
    name, less = least_of_means(scores)
    margin = WIDTH * (less["se"] or 0.0)
    plus_minus = f" ± {margin:.1f}" if margin else ""
    if less["mean"] < -margin:
        says = f"{nats:.1f} nats a held-out cell, {-less['mean']:.1f}{plus_minus} better than {MEANS[name]}"
        return {"passed": True, "line": ". ".join(["; ".join([says, *latents]), *blind])}
    theirs = f"{gate['nll'][name]['mean']:.1f}, a difference of {less['mean']:+.1f}{plus_minus}"
    says = f"no better than {MEANS[name]}: {nats:.1f} nats a held-out cell against {theirs}"
    change = "; ".join(to_change(config, gate))
    return {"passed": False, "line": ". ".join(["; ".join([says, *latents]), *blind, f"What to change: {change}"])}


def to_change(config: RunConfig, gate: Mapping[str, Any]) -> list[str]:
    """What the run's own numbers speak for. Another run needs another run_dir, as these keys are part of the result."""
    from data_pipeline.format.schema import read_manifest
    from data_pipeline.stream.loader import LoaderConfig

    assert isinstance(config.data, LoaderConfig)
    rows = [row for row in read_metrics(config.run_dir, "validation") if row.get("nll") is not None]
    best, last = min(comparable(rows), key=lambda row: row["nll"]), rows[-1]
    n_train = gate["cells"]["drawn_of"]["train"] or gate["cells"]["train"]
    n_genes = read_manifest(config.data.shards).genes.n_genes
    passes, given, kl_weight = last["cells_seen"] / n_train, config.data.given, config.model.kl_weight
    out = []
    if passes < FEW_PASSES:
        out.append(f"raise train.steps={config.train.steps}: each training cell was seen {passes:.1f} times")
    elif best is last:
        out.append(f"raise train.steps={config.train.steps}: validation was at its best at the last step")
    elif last["nll"] - best["nll"] > RISE * best["nll"]:
        out.append(
            f"train on more than these {n_train:,} cells, or with a smaller model.width={config.model.width} or "
            f"model.n_layers={config.model.n_layers}: validation rose by {last['nll'] - best['nll']:.1f} nats after "
            f"step {best['step']}"
        )
    n_given = given.of(n_genes).n_genes
    if n_given and 2 * n_given < n_genes:
        key = f"n_genes={given.n_genes}" if given.n_genes else f"share={given.share:g}"
        out.append(f"raise data.given.{key}: {n_given:,} of {n_genes:,} genes are given")
    if kl_weight and best.get("kl") is not None and best["kl"] < KL_NATS:
        out.append(f"lower model.kl_weight={kl_weight:g}: latents carry {best['kl']:.2f} nats a cell")
    return out or ["these numbers do not say. Try optim.lr first, then a larger model"]


def metrics(gate: Mapping[str, Any]) -> dict[str, float]:
    """What is tracked, as gate/NAME."""
    out = {"nll" if name == "model" else f"nll_{name}": of["mean"] for name, of in gate["nll"].items()}
    out |= {f"less_{name}": of["mean"] for name, of in gate["less"].items()}
    out |= {f"label_recall/{name}": value for name, value in gate["label_recall"].items()}
    out |= {f"moved/{name}": of["moved"] for name, of in gate["sight"].items() if of["moved"] is not None}
    out |= {} if gate["passed"] is None else {"passed": float(gate["passed"])}
    return {**out, "effective_dimension": gate["effective_dimension"]}


def show(gate: Mapping[str, Any]) -> None:
    """Of which cells the finding is, and the finding."""

    def number(split: str) -> str:
        all_of = gate["cells"]["drawn_of"][split]
        return f"{gate['cells'][split]:,} {split} cells" + (f" (drawn of {all_of:,})" if all_of else "")

    print(f"\nautoencoder at step {gate['step']:,} on {number('validation')}, mean profiles of {number('train')}")
    print(f"autoencoder: {gate['line']}", flush=True)
