"""The foundation run of docs/foundation.md at 1/1,000 of its size, on one CPU core: from SOMA to the report, each stage
by its verb, with what was foretold of it beside what it took.

Foretold by `scldm plan` are both trainings and encoding, from the measured peak of the core. Conversion and evaluation
go by the rates of committed benchmarks, generation by the plan's FLOPs.
Reading order: FoundationConfig, main, stages, foretold.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Report, Row, run_benchmark
from benchmarks.shards import BenchShardsConfig, bytes_in, keep_to_one_atlas, run_and_watch, write_soma
from benchmarks.ways import peak_flops
from launch import plan as plan_verb
from launch.planning.config import PlanVAEConfig
from launch.planning.plan import Plan, plan_of, validated
from launch.quickstart import write_wanted
from scldm.files import remove, write_json
from scldm.flow.sampler import SamplerConfig

PURPOSE = """Go from SOMA to the report at 1/1,000 of docs/foundation.md, and put what was foretold of each stage beside
what it took. Run again, it goes on with the first unfinished stage, from its beginning."""
EXAMPLE = """
python -m benchmarks.foundation out=runs/foundation save=benchmarks/foundation-cpu.json
"""
BYTES_OF_A_COUNT = 1.05  # 1,827 of a cell with 1,740 expressed genes out of 36,130 (docs/sustained-run.md)
CONDITIONS = "conditions=cell_type"


@dataclass(frozen=True)
class FoundationConfig:
    """What to run.

    out: folder of everything that it makes
    cells: of the synthetic atlas, laid out as the Census
    genes: of its vocabulary
    expressed: genes that a cell expresses
    spread: how much genes differ between its 12 cell types, as the standard deviation of the log of their levels
    vae: presets and keys of `scldm train vae`
    ldm: presets and keys of `scldm train ldm`
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    out: str
    cells: int = 60_000
    genes: int = 36_130
    expressed: int = 1_740
    spread: float = 0.7
    vae: tuple[str, ...] = (
        *("vae/70m", "hardware/cpu", "model.width=64", "model.n_latents=8", "model.n_layers=1", "model.n_heads=4"),
        *("optim.lr=2e-3", "data.lanes=64", "data.given.n_genes=2048", "data.given.gene_set_group=32"),
        *("hardware.micro_batch=32", "train.global_batch=128", "train.steps=1600", "train.ema_decay=0.99"),
        *("train.validate_every=400", "train.validation_cells=512", "train.save_every=400", "train.log_every=20"),
    )
    ldm: tuple[str, ...] = (
        *("ldm/base", "hardware/cpu", "model.width=128", "model.n_layers=4", "model.n_heads=4", "optim.lr=1e-3"),
        *("data.lanes=64", "hardware.micro_batch=128", "train.global_batch=128", "train.steps=1600"),
        *("train.ema_decay=0.99", "train.validate_every=400", "train.save_every=400", "train.log_every=20"),
    )
    json: bool = False
    save: str = ""


CONFIG = FoundationConfig


@dataclass(frozen=True)
class Stage:
    """A verb with its words, and the folder or file that it writes."""

    name: str
    words: tuple[str, ...]
    out: Path


def main(config: FoundationConfig) -> Report:
    """Print the table; returns it. Raises: InputError where a stage fails."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    atlas = BenchShardsConfig(config.cells, config.genes, config.expressed, config.spread)
    of_atlas = {key: getattr(atlas, key) for key in ("cells", "genes", "expressed", "spread")}
    keep_to_one_atlas(out, **of_atlas, vae=" ".join(config.vae), ldm=" ".join(config.ldm))
    if not (out / "atlas-soma").exists():
        write_soma(out / "atlas-soma", atlas)
    note = out / "stages.json"
    known: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {"foretold": foretold(config)}
    for stage in stages(config, out):
        if stage.name in known:
            continue
        if stage.name == "generate":
            write_wanted(out, ["cell_type"])
        print(f"[{stage.name}] scldm {' '.join(stage.words)}", file=sys.stderr, flush=True)
        if stage.name != "start":
            remove(stage.out)  # of one that was cut off, whose time nobody knows
        cost = run_and_watch([sys.executable, "-P", "-m", "launch.cli", *stage.words])
        known[stage.name] = {"s": cost.cpu, "wall": cost.wall, "memory": cost.peak / 1e9, "written": size(stage.out)}
        write_json(note, known)
    report = Report("foundation", {"cells": config.cells, "genes": config.genes, "ranks": 1}, save=config.save)
    for name, numbers in known.items():
        if name == "foretold":
            continue
        for key, (told, unit) in MEASURES.items():
            report.add(Row(f"{name}: {told}", numbers[key], unit))
            if key in known["foretold"].get(name, {}):
                report.add(Row(f"{name}: {told}, foretold", known["foretold"][name][key], unit))
    report.print(config.json)
    return report


# what is measured of a stage. CPU time is compared, as others may use the cores
MEASURES = {
    "s": ("CPU time", "s"),
    "wall": ("wall time", "s"),
    "memory": ("peak memory", "GB"),
    "written": ("written", "GB"),
}


def size(path: Path) -> float:
    """Of a file or a folder, in 1e9 bytes."""
    return (bytes_in(path) if path.is_dir() else path.stat().st_size) / 1e9


def stages(config: FoundationConfig, out: Path) -> list[Stage]:
    def stage(name: str, made: str, *words: str) -> Stage:
        return Stage(name, words, out / made)

    return [
        # what every stage takes to start, and holds
        stage("start", "atlas.json", "train", "vae", "--help"),
        stage("shards", "shards", "shards", "write", f"source.paths={out}/atlas-soma/census_data/homo_sapiens",
              f"out={out}/shards", CONDITIONS),
        stage("vae", "vae", "train", "vae", *config.vae, f"data.shards={out}/shards", f"run_dir={out}/vae"),
        stage("encode", "latents", "encode", f"vae={out}/vae", f"shards={out}/shards", f"out={out}/latents"),
        stage("ldm", "ldm", "train", "ldm", *config.ldm, f"data.shards={out}/latents", f"run_dir={out}/ldm"),
        stage("export", "model", "export", f"vae={out}/vae", f"ldm={out}/ldm", f"out={out}/model"),
        stage("generate", "generated.h5ad", "generate", f"model={out}/model", f"conditions={out}/wanted.csv",
              f"out={out}/generated.h5ad"),
        stage("evaluate", "report", "evaluate", f"generated={out}/generated.h5ad", f"shards={out}/shards", CONDITIONS,
              f"model={out}/model", f"vae={out}/vae", f"ldm={out}/ldm", f"out={out}/report"),
    ]  # fmt: skip


# --- what was foretold ---------------------------------------------------------------------------------------------


def foretold(config: FoundationConfig) -> dict[str, dict[str, float]]:
    """Stage -> numbers as in MEASURES, from sizes alone, as docs/foundation.md has them."""
    n_held_out = round(config.cells / 10)  # validation, and as many of test
    cells = {"n_cells": config.cells - 2 * n_held_out, "n_validation": n_held_out}
    torch.set_num_threads(1)
    peak = f"hardware.peak_tflops={peak_flops(torch.device('cpu'), torch.float32) / 1e12}"  # of this machine's core
    vae = plan("vae", *config.vae, peak, **cells, n_test=n_held_out, n_genes=config.genes, expressed=config.expressed)
    assert isinstance(vae.config, PlanVAEConfig)
    assert vae.encode is not None
    shape = {"n_latents": vae.config.model.n_latents, "latent_width": vae.config.model.latent_width}
    ldm = plan("ldm", *config.ldm, peak, **cells, **shape)
    # Heun evaluates the network twice a step. Forward is a third of one. Validation decodes a cell with all its genes
    a_step_s = (
        ldm.cost.flops / 3 / ldm.config.hardware.micro_batch / (ldm.config.hardware.peak * ldm.config.hardware.mfu)
    )
    decoded_s = (vae.validation_s or 0.0) / validated(vae.config)
    return {
        "shards": {
            "s": config.cells / measured("shards-20k-soma.json", "soma: rate"),
            "written": config.cells * config.expressed * BYTES_OF_A_COUNT / 1e9,
        },
        "vae": of_training(vae),
        "encode": {"s": vae.encode.seconds, "written": vae.encode.written_bytes / 1e9},
        "ldm": of_training(ldm),
        "generate": {"s": n_held_out * (2 * SamplerConfig.n_steps * a_step_s + decoded_s)},
        "evaluate": {"s": n_held_out * measured("evaluation-atlas.json", "CPU time") / 100_000},
    }


def plan(*words: str, **sizes: int) -> Plan:
    """That of `scldm plan`."""
    return plan_of(plan_verb.cut(plan_verb.read([*words, *(f"{key}={value}" for key, value in sizes.items())])))


def of_training(planned: Plan) -> dict[str, float]:
    """One rank holds gradients and optimizer whole, as under ZeRO-1."""
    seconds = planned.config.train.steps * planned.step_s + planned.validations * (planned.validation_s or 0.0)
    return {"s": seconds, "memory": planned.by_stage[1].peak / 1e9}


def measured(file: str, name: str) -> float:
    """A row of a committed benchmark."""
    rows = json.loads((Path(__file__).parent / file).read_text())["rows"]
    return next(row["value"] for row in rows if row["name"] == name)


if __name__ == "__main__":
    sys.exit(run_benchmark("foundation"))
