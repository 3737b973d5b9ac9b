"""What `scldm plan` says today, beside every measured figure that it can be compared with.

Nothing is measured here. Figures of a CPU are those of the JSON files of this folder. Published ones stand below with
their sources.

Reading order: PlanCheckConfig, main, figures of this folder, published_autoencoder, published_transformer.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import train as train_benchmark
from benchmarks import vae_step as vae_step_benchmark
from benchmarks.foundation import measured, plan
from benchmarks.report import Report, Row, run_benchmark
from benchmarks.ways import of_preset
from launch import cli
from launch.planning.config import GB, PlannedHardware, PlanVAEConfig
from launch.planning.of_encode import encode_of
from launch.planning.plan import OPTIMIZER_BYTES
from scldm.model.vae import VAEConfig
from scldm.train.budget import sent_bytes
from scldm.train.step_cost import StepCost, step_cost

PURPOSE = """Put what `scldm plan` says beside what was measured: steps, encoding and memory on a CPU by committed
benchmarks, the hours and memory that scLDM's paper gives of 8 A100, and the cells/s that fast-scgpt gives of one and
eight H100. Nothing is measured, nor trained."""
EXAMPLE = """
python -m benchmarks.plan_check
python -m benchmarks.plan_check save=benchmarks/plan-check.json
"""
FOLDER = Path(__file__).parent
PYTHON_GB = 0.5  # of a process that has only started: `start: peak memory` of foundation-cpu.json


@dataclass(frozen=True)
class PlanCheckConfig:
    """What to print.

    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    json: bool = False
    save: str = ""


CONFIG = PlanCheckConfig


@dataclass(frozen=True)
class Figure:
    """A measured number, and what is planned for it, in one unit."""

    name: str
    measured: float
    planned: float
    unit: str


def main(config: PlanCheckConfig) -> Report:
    """Print the table. Returns it."""
    report = Report("plan_check", save=config.save)
    for figure in chain(of_steps(), of_engines(), of_sustained_run(), of_verbs(), published_autoencoder()):
        report.add(Row(f"{figure.name}: measured", figure.measured, figure.unit))
        report.add(Row(f"{figure.name}: planned", figure.planned, figure.unit))
        report.add(Row(f"{figure.name}: planned / measured", figure.planned / figure.measured, "x"))
    for row in published_transformer():
        report.add(row)
    report.print(config.json)
    return report


# --- figures of this folder ----------------------------------------------------------------------------------------


def words_of(model: VAEConfig) -> list[str]:
    return [f"model.{key}={json.dumps(value)}" for key, value in vars(model).items()]


def config_of(file: str, module: Any) -> Any:
    """Of the benchmark that wrote a file, by its command."""
    words = shlex.split(json.loads((FOLDER / file).read_text())["command"])
    return cli.config_of(module, words[words.index("-m") + 2 :])


def of_steps() -> Iterator[Figure]:
    """Steps of the autoencoder on a core whose large matrix product the same file has."""
    for file in sorted(path.name for path in FOLDER.glob("vae-step-*.json")):
        config = config_of(file, vae_step_benchmark)
        shape, group = of_preset(config.preset, config.model), 1 if config.own_sets else config.cells
        given = (f"data.given.policy=random data.given.gene_set_group={group} data.given.n_genes={config.n_given} "
                 f"hardware.micro_batch={config.cells} train.global_batch={config.cells}")  # fmt: skip
        peak = measured(file, "large matrix product") / 1e3
        for way in ("plain", "sdpa", "factorised"):
            words = [*words_of(shape), *given.split(), f"model.attention={way}", f"hardware.peak_tflops={peak}"]
            planned = plan("vae", "hardware/cpu", *words, n_genes=config.n_genes, n_cells=1_000)
            name = f"{file.removesuffix('.json')}, {way}"
            yield Figure(f"{name}, a step", measured(file, way), 1e3 * planned.step_s, "ms of CPU time")
            memory = measured(file, f"{way}: peak memory") * 2**20 / GB
            yield Figure(f"{name}, activations and gradients", memory, planned.by_stage[1].activations / GB, "GB")


def of_engines() -> Iterator[Figure]:
    """A small step of each engine, alone and on two ranks."""
    for file, n_ranks, rows in (
        ("train-cpu.json", 1, {"plain: a step": ""}),
        (
            "train-cpu-two-ranks.json",
            2,
            {f"{engine} at zero_stage={n}: a step": f"hardware.engine={engine} hardware.zero_stage={n}"
             for engine in ("deepspeed", "fsdp") for n in (2, 3)},
        ),
    ):  # fmt: skip
        config = config_of(file, train_benchmark)
        words = [*words_of(config.model), f"hardware.gpus_per_node={n_ranks}", f"hardware.micro_batch={config.cells}"]
        words += [f"train.global_batch={n_ranks * config.cells}"]
        for row, engine in rows.items():
            planned = plan("vae", "hardware/cpu", *words, *engine.split(), n_genes=config.n_genes, n_cells=1_000)
            name = f"{file.removesuffix('.json')}, {row}"
            yield Figure(name, measured(file, row), 1e3 * planned.step_s, "ms of CPU time")


def of_sustained_run() -> Iterator[Figure]:
    file = "sustained-run.json"
    words = json.loads((FOLDER / file).read_text())["settings"]["words"].split()
    for start, n_ranks in (("undisturbed, start 1, 2 ranks, steps 2 to 999", 2),
                           ("disturbed, start 4, 1 rank, steps 627 to 776", 1)):  # fmt: skip
        planned = plan("vae", *words, f"hardware.gpus_per_node={n_ranks}", n_genes=36_130, n_cells=800_000)
        name = f"{file.removesuffix('.json')}, {n_ranks} rank{'s' * (n_ranks > 1)}"
        took = measured(file, f"{start}: CPU time of a step, median")
        yield Figure(f"{name}, a step", took, planned.step_s, "s of CPU time")
        memory = measured(file, f"{start}: memory in its last quarter, median")
        yield Figure(f"{name}, memory of a rank", memory, planned.by_stage[2].peak / GB + PYTHON_GB, "GB")


def of_verbs() -> Iterator[Figure]:
    """Encoding anew, by the shape of vae/tiny. The stages of the foundation run as foretold before it began."""
    file = "encode-cpu.json"
    settings = json.loads((FOLDER / file).read_text())["settings"]
    told = plan("vae/tiny", "hardware/cpu", n_genes=settings["genes"], n_cells=settings["cells"],
                expressed=settings["expressed"]).config  # fmt: skip
    assert isinstance(told, PlanVAEConfig)
    encode = encode_of(told)
    assert encode is not None
    a_cell = 1e3 * encode.seconds / encode.n_cells
    yield Figure("encode-cpu, a cell", measured(file, "CPU time"), a_cell, "ms of CPU time")
    file = "foundation-cpu.json"
    units = {"vae: CPU time": "s", "encode: CPU time": "s", "ldm: CPU time": "s", "encode: written": "GB"}
    for row, unit in units.items():
        yield Figure(f"foundation-cpu, {row}", measured(file, row), measured(file, f"{row}, foretold"), unit)
    for row in ("vae: peak memory", "ldm: peak memory"):
        foretold = measured(file, f"{row}, foretold") + PYTHON_GB
        yield Figure(f"foundation-cpu, {row}", measured(file, row), foretold, "GB")


# --- published: scLDM's autoencoder --------------------------------------------------------------------------------

# data -> training cells (four fifths), genes, most expressed genes of a cell, hours on 8 A100-80GB.
# Source: Palla et al., arXiv 2511.02986, for the hours and the 33 to 45 GB of a GPU
SCLDM = {
    "dentate gyrus": (14_570, 17_002, 6_147, 0.30),
    "Tabula Muris": (196_000, 19_734, 9_059, 14.5),
    "HLCA": (467_955, 27_997, 10_186, 17.0),
    "Parse 1M": (1_014_152, 2_000, 2_000, 5.9),
}
EPOCHS = 100  # the paper gives none. Source: experiments/configs/vae_training.yaml of czi-ai/scldm, for dentate gyrus


def published_autoencoder() -> Iterator[Figure]:
    """By its network: float32, the linear token, nothing beside cross-attention, each cell its expressed genes."""
    shape = "vae/dentate_gyrus hardware/node_8gpu hardware.gpu=A100 hardware.precision=fp32 model.attention=sdpa"
    words = f"{shape} model.token=linear model.direct=false data.given.gene_set_group=1".split()
    for data, (n_cells, n_genes, n_given, hours) in SCLDM.items():
        for told, policy in (("the same genes asked", "same"), ("all genes asked", "all")):
            if n_given == n_genes and policy == "same":
                continue
            asked = [f"data.given.n_genes={n_given}", f"data.asked.policy={policy}"]
            planned = plan(*words, *asked, n_genes=n_genes, n_cells=n_cells)
            took = EPOCHS * n_cells / planned.cells_per_s / 3_600
            yield Figure(f"scLDM, 8 A100, {data}, {told}, {EPOCHS} epochs", hours, took, "hours")
            if data == "dentate gyrus":
                memory = planned.by_stage[1].peak / GB
                yield Figure(f"scLDM, memory of a GPU, of 33 to 45, {told}", 33.0, memory, "GB")


# --- published: fast-scgpt's transformer ---------------------------------------------------------------------------

# Source: README.md of slaf-project/fast-scgpt at c34d9c6, "Benchmarks", and
# https://slaf-project.github.io/slaf/blog/blazing-fast-dataloaders-3/, section 6. Both runs: 240 cells a GPU, 50 steps
SCGPT_PARAMETERS, SCGPT_CELLS, TOKENS = 51_061_760, 240, 1_026  # 1,024 genes and two more tokens
STATED = {1: (842.0, 0.3721, 368.0), 8: (31_900.0, 0.316, 2_500.0)}  # GPUs -> cells/s, MFU, TFLOP/s of all GPUs
MEAN_OF_EIGHT = 50 * 8 * SCGPT_CELLS / 24.1  # cells/s: its 50 steps took 24.1 s, and the median one 60 ms


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.linear = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(6))

    def forward(self, x_BSD: Tensor) -> Tensor:
        query, key, value, out, up, down = self.linear
        h_BSD = self.norms[0](x_BSD)
        heads = (of(h_BSD).unflatten(-1, (4, -1)).transpose(1, 2) for of in (query, key, value))
        x_BSD = x_BSD + out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x_BSD + down(F.gelu(up(self.norms[1](x_BSD))))


class ScGPT(nn.Module):
    """Its shape as its config says it: 12 layers of width 512, MLPs as wide, 62,714 genes and 51 bins in one table,
    which also reads masked genes out, 15 of 100."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(62_714 + 51, 512)
        self.blocks = nn.ModuleList(Block(512) for _ in range(12))
        self.norm, self.bins = nn.LayerNorm(512), nn.Linear(512, 51, bias=False)

    def forward(self, n_cells: int) -> Tensor:
        """The loss."""
        ids_BS = torch.ones((n_cells, TOKENS), dtype=torch.int64)
        x_BSD = self.table(ids_BS) + self.table(ids_BS)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        x_BSD = self.norm(x_BSD)
        masked = x_BSD[:, : round(0.15 * TOKENS)].flatten(0, 1)
        genes, bins = masked @ self.table.weight[:62_714].T, self.bins(x_BSD)
        targets = torch.ones(len(masked), dtype=torch.int64)
        return F.cross_entropy(genes.float(), targets) + bins.float().logsumexp(-1).mean()


def published_transformer() -> Iterator[Row]:
    """What its two figures are by the FLOPs that the network takes, and what the plan's arithmetic says of it."""
    cost = step_cost(ScGPT, lambda network: network(SCGPT_CELLS), bf16=True)
    P = cost.n_parameters
    assert P == SCGPT_PARAMETERS, P
    attention = 12 * 12 * 512 * TOKENS**2  # 12 layers, two products of 2 x tokens^2 x width, forward and twice backward
    as_stated = 12 * P * TOKENS  # Source: fast_scgpt/training_metrics.py, which takes 6 of them for a forward pass
    counts = {
        "products that are made": cost.flops / SCGPT_CELLS,
        "6 x parameters x tokens, and attention": 6 * P * TOKENS + attention,
        "12 x parameters x tokens, as it counts": as_stated,
    }
    for told, flops in counts.items():
        yield Row(f"fast-scgpt, FLOPs of a cell, {told}", flops / 1e9, "GFLOP")
    for n, (cells_s, mfu, tflops) in STATED.items():
        name, peak = f"fast-scgpt, {n} H100", n * PlannedHardware(precision="bf16").peak
        yield Row(f"{name}: stated", cells_s, "cells/s")
        planned = planned_rate(cost, n)
        yield Row(f"{name}: planned at 35 % MFU", planned, "cells/s")
        yield Row(f"{name}: planned / stated", planned / cells_s, "x")
        yield Row(f"{name}: stated MFU", 100 * mfu, "%")
        for told, flops in counts.items():
            yield Row(f"{name}: MFU of the stated cells/s, by {told}", 100 * cells_s * flops / peak, "%")
        yield Row(f"{name}: cells/s that the stated MFU is of", 1e12 * tflops / as_stated, "cells/s")
    yield Row("fast-scgpt, 8 H100: mean of its 50 steps", MEAN_OF_EIGHT, "cells/s")
    yield Row("fast-scgpt, 8 H100: planned / mean of its 50 steps", planned_rate(cost, 8) / MEAN_OF_EIGHT, "x")
    # weights and moments in float32 beside activations and gradients
    memory = (cost.peak_with_gradients_bytes + 12 * P) / GB
    yield Row("fast-scgpt, 1 H100: memory, stated", 74.54, "GB")
    yield Row("fast-scgpt, 1 H100: memory, planned", memory, "GB")
    yield Row("fast-scgpt, 1 H100: memory, planned / stated", memory / 74.54, "x")


def planned_rate(cost: StepCost, n_gpus: int) -> float:
    """Cells/s of this network by the arithmetic of `plan_of`: data parallel, with the exchange beside the pass."""
    hardware = PlannedHardware(engine="deepspeed", precision="bf16", gpus_per_node=n_gpus)
    pass_s = max(cost.flops / (hardware.peak * hardware.mfu), 1e-6 * hardware.launch_us * cost.kernels)
    exchange_s = sent_bytes(cost, 1, n_gpus, 1) / hardware.ring
    step_s = max(pass_s, exchange_s) + OPTIMIZER_BYTES * cost.n_parameters / hardware.bandwidth
    return n_gpus * SCGPT_CELLS / step_s


if __name__ == "__main__":
    sys.exit(run_benchmark("plan_check"))
