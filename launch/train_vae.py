"""`scldm train vae`: stage 1, the autoencoder, on a shard set."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch

from data_pipeline.stream.gene_set_config import GeneSetConfig, as_whole_cells
from data_pipeline.stream.loader import CellLoader, LoaderConfig
from launch.evaluation.gate import judge_run
from launch.evaluation.preview import Trained, of_vae
from launch.staged import at_hand
from launch.training import Parts, RunConfig, check_has_validation, run_training, start_of, whole_cells
from scldm.checked import checked
from scldm.kernels import check_available
from scldm.model.vae import VAE, VAEConfig, chosen
from scldm.parallel.dist import World
from scldm.train.init_from import vae_from
from scldm.train.loop import TrainConfig
from scldm.train.losses import VAEStage
from scldm.train.step_cost import StepCost, vae_step
from scldm.vocab import MIN_GENE_SHARE

PURPOSE = """Train the autoencoder on a shard set. Run again with the same run_dir, it resumes.
At its end the best checkpoint is judged on validation cells, beside mean profiles: gate.json, and one line."""
EXAMPLE = """
scldm train vae vae/tiny hardware/cpu data.shards=shards run_dir=runs/vae
torchrun --standalone --no-python --nproc-per-node 8 scldm train vae vae/20m data.shards=shards run_dir=runs/vae
"""


@dataclass(frozen=True)
class TrainVAEConfig(RunConfig):
    """Stage 1.

    init_from: model folder whose autoencoder to start from. Genes are joined by name, new ones get new rows
    min_gene_share: of its genes or of those of data.shards, whichever are fewer, that both must have. With fewer it is
        refused
    gate: at the end, judge the best checkpoint on at most 2,000 validation cells beside mean profiles. There is one for
        each combination too, where there are at most 200. false leaves that out
    """

    data: LoaderConfig
    model: VAEConfig = field(default_factory=VAEConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(patience=5))
    gate: bool = True
    min_gene_share: float = checked(MIN_GENE_SHARE, at_least=0, at_most=1)


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
    place = config.place(world)
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
    joined = ()
    if trained is not None:
        joined = vae_from(module, loader.vocab, trained.vae, trained.genes, config.min_gene_share)

    bf16 = config.hardware.precision == "bf16"

    def cost() -> StepCost:
        sizes = (n_genes, config.hardware.micro_batch, *genes_of(config.data, n_genes))
        per_cell = sets_per_cell(config.data, n_genes)
        return vae_step(config.model, *sizes, per_cell, bf16=bf16)

    dtype = torch.bfloat16 if bf16 else torch.float32
    attention = chosen(config.model, world.device, dtype)
    preview = None
    if world.is_first and config.train.preview_share:
        preview = of_vae(Trained.of("train vae", config, loader.manifest, world.device), module)
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
