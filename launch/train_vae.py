"""`scldm train vae`: stage 1, the autoencoder, on a shard set."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from data_pipeline.stream.gene_set_config import GeneSetConfig, as_whole_cells
from data_pipeline.stream.loader import CellLoader, LoaderConfig
from launch.evaluation.gate import judge_run
from launch.evaluation.preview import Trained, of_vae
from launch.staged import at_hand
from launch.training import Parts, check_changes, check_has_validation, check_waits, run_training, start_of, whole_cells
from scldm.checked import Checked
from scldm.kernels import check_available
from scldm.model.vae import VAE, VAEConfig, chosen
from scldm.parallel.dist import World
from scldm.parallel.engine import HardwareConfig
from scldm.train.init_from import vae_from
from scldm.train.loop import TrainConfig
from scldm.train.losses import VAEStage
from scldm.train.optim import OptimConfig
from scldm.train.step_cost import StepCost, vae_step
from scldm.train.tracking import TrackingConfig

PURPOSE = """Train the autoencoder on a shard set. Run again with the same run_dir, it resumes.
At its end the best checkpoint is judged on validation cells, beside mean profiles: gate.json, and one line."""
EXAMPLE = """
scldm train vae vae/tiny hardware/cpu data.shards=shards run_dir=runs/vae
torchrun --standalone --no-python --nproc-per-node 8 scldm train vae vae/20m data.shards=shards run_dir=runs/vae
"""


@dataclass(frozen=True)
class TrainVAEConfig(Checked):
    """Stage 1.

    run_dir: folder of the run
    init_from: model folder whose autoencoder to start from. Genes are joined by name, new ones get new rows
    branch_from: RUN@STEP, as runs/vae@15000 or @latest or @best: a new run that begins with that checkpoint, its place
        in the cells' order included. Give the parent's keys again. Those of optim, train and hardware.precision may
        differ
    allow_changes: keys that may differ from the run's config.json, as optim.lr,train.steps. Each change is noted in
        changes.json with its step. Those of optim, train and hardware.precision can change
    gate: at the end, judge the best checkpoint on at most 2,000 validation cells beside mean profiles. There is one for
        each combination too, where there are at most 200. false leaves that out
    deepspeed: any key of DeepSpeed's own configuration that does not change the result, as deepspeed.steps_per_print=9.
        Other engines have no use for it
    """

    run_dir: str
    data: LoaderConfig
    init_from: str = ""
    branch_from: str = ""
    allow_changes: list[str] = field(default_factory=list)
    gate: bool = True
    model: VAEConfig = field(default_factory=VAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(patience=5))
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_waits(self)
        check_changes(self)


CONFIG = TrainVAEConfig
FIRST = (
    *("run_dir", "data.shards", "train.steps", "train.global_batch", "hardware.micro_batch"),
    *("optim.lr", "data.given.share", "init_from", "tracking.uri", "train.seed"),
)


def main(config: TrainVAEConfig) -> dict[str, float]:
    """Train. Returns the last validation metrics."""
    judge = partial(judge_run, at_hand(config)) if config.gate else None
    return run_training("train vae", config, lambda world: set_up(at_hand(config), world), judge)


def set_up(config: TrainVAEConfig, world: World) -> Parts:
    if config.model.attention == "fused":
        check_available(world.device)
    place: Any = {
        "rank": world.rank,
        "world_size": world.size,
        "global_batch": config.train.global_batch,
        "micro_batch": config.hardware.micro_batch,
        "device": world.device,
    }
    loader = CellLoader(config.data, split="train", **place)
    check_has_validation(loader.manifest, config.data.shards)
    # judged on all genes of every held-out cell, whatever it trains on, in micro-batches that take no more memory
    given = as_whole_cells(config.data.given)
    asked = GeneSetConfig("same" if given.policy == "all" else "all")
    whole = replace(config.data, given=given, asked=asked, balance=[])
    n_genes = loader.vocab.n_genes
    in_training = max(genes_of(config.data, n_genes))
    place["micro_batch"] = whole_cells(config.hardware.micro_batch, in_training, n_genes)
    validation = CellLoader(whole, split="validation", most_cells=config.train.validation_cells, **place)
    module = VAE(config.model, loader.vocab.n_genes)
    mean_G = torch.tensor(loader.cells.gene_column("mean"), dtype=torch.float32)
    module.start_at(mean_G + 0.5 / loader.manifest.n_cells)  # half a count where no training cell has one
    trained = start_of(config)
    joined = vae_from(module, loader.vocab, trained.vae, trained.genes) if trained is not None else ()

    def cost() -> StepCost:
        sizes = (n_genes, config.hardware.micro_batch, *genes_of(config.data, n_genes))
        per_cell = sets_per_cell(config.data, n_genes)
        return vae_step(config.model, *sizes, per_cell, bf16=config.hardware.precision == "bf16")

    dtype = torch.bfloat16 if config.hardware.precision == "bf16" else torch.float32
    attention = chosen(config.model, world.device, dtype)
    preview = None
    if world.is_first and config.train.preview_share:
        as_dict, precision = asdict(config), "bfloat16" if config.hardware.precision == "bf16" else "float32"
        of = ("train vae", as_dict, config.data, loader.manifest, config.train.seed, world.device, precision)
        preview = of_vae(Trained(*of), module)
    return Parts(module, VAEStage(module), loader, validation, loader.manifest, joined, cost, attention, preview)


def genes_of(data: LoaderConfig, n_genes: int) -> tuple[int, int]:
    """Genes given and asked of a cell in training, of so many in the vocabulary."""
    given = data.given.of(n_genes).n_genes or n_genes
    asked = given if data.asked.policy == "same" else data.asked.of(n_genes).n_genes or n_genes
    return min(given, n_genes), min(asked, n_genes)


def sets_per_cell(data: LoaderConfig, n_genes: int) -> tuple[bool, bool]:
    """Whether each cell of a micro-batch has genes of its own in training, given and asked."""
    given = data.given.is_per_cell(n_genes)
    return given, given if data.asked.policy == "same" else data.asked.is_per_cell(n_genes)
