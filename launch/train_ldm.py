"""`scldm train ldm`: stage 2, the diffusion transformer, on a latent set or on cells encoded as they come.

Encoding as they come costs the autoencoder's forward pass at every visit of a cell, and no disk. With vae/tiny and
ldm/tiny on one CPU core it ran 1,710 cells/s from 423 fresh genes and 1,380 from all 1,267. Stored latents gave 2,030.
What a fresh gene set gains in quality was not measured. A stored set has every cell from all its genes.
Reading order: TrainLDMConfig, main, set_up, where the latents come from, what the conditions are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import pandas as pd
import torch

from data_pipeline.format.schema import Manifest
from data_pipeline.stream.gene_set_config import GeneSetConfig, as_whole_cells
from data_pipeline.stream.loader import CellLoader, LatentLoader, LoaderConfig, StreamConfig
from launch import training
from launch.evaluation.gate import gate_of, warn
from launch.evaluation.preview import Trained, of_ldm
from launch.run_data import EncodedFrom, check_encodes, data_of, encoded_from, library_sizes_of
from launch.staged import at_hand
from launch.together import read_table
from launch.trained import check_given, checkpoint_of, trained_vae
from scldm.batch import GeneCounts
from scldm.errors import InputError
from scldm.model.dit import DiT, DiTConfig
from scldm.model.predicted import Posterior
from scldm.model.vae import VAE
from scldm.parallel.dist import World
from scldm.train.init_from import dit_from
from scldm.train.losses import FlowConfig, GuidanceConfig, LDMStage
from scldm.train.optim import OptimConfig
from scldm.train.previews import Make
from scldm.train.step_cost import StepCost, dit_step
from scldm.vocab import ConditionVocab
from scldm.weights import weights_hash

PURPOSE = """Train the diffusion transformer on latents that `scldm encode` wrote. With vae=RUN it trains on cells that
are encoded as they come, each time from a fresh gene set. Run again with the same run_dir, it resumes."""
EXAMPLE = """
scldm train ldm ldm/tiny hardware/cpu data.shards=latents run_dir=runs/ldm
torchrun --standalone --no-python --nproc-per-node 8 scldm train ldm ldm/base data.shards=latents run_dir=runs/ldm
scldm train ldm ldm/tiny hardware/cpu vae=runs/vae data.shards=shards given.policy=random given.share=0.5 \
  run_dir=runs/ldm
"""
MIN_STD = 1e-6  # a latent number that is the same in every cell can't be scaled to variance 1
# training cells that means are fitted on, the first ones: so many a combination on average, least and most in all
MEAN_CELLS, LEAST_MEAN_CELLS, MOST_MEAN_CELLS = 64, 65_536, 1_048_576
MOMENT_CELLS = 4_096  # training cells whose latents give the moments, where there is no latent set that has them


@dataclass(frozen=True)
class TrainLDMConfig(training.RunConfig):
    """Stage 2. The conditions are those of the latent set.

    vae: run folder of the autoencoder, best checkpoint: encode the cells of data.shards as they come
    given: gene set that they are encoded from
    label_embeddings: condition -> CSV file of its labels (first column) and a vector of numbers for each. The model is
        told the vector, so that every label of the file can be asked for, trained or not
    init_from: model folder whose diffusion transformer to start from. Conditions and labels are joined by name, new
        ones get new rows
    """

    vae: str = ""
    given: GeneSetConfig = field(default_factory=GeneSetConfig)
    label_embeddings: dict[str, str] = field(default_factory=dict)
    model: DiTConfig = field(default_factory=DiTConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-4, schedule="cosine"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.given.check("given")
        if self.given.policy != "all" and not self.vae:
            raise InputError(f"given.policy={self.given.policy} has no effect on latents. Give vae=RUN too")


CONFIG = TrainLDMConfig
FIRST = (
    *("run_dir", "data.shards", "train.steps", "train.global_batch", "hardware.micro_batch"),
    *("optim.lr", "model.continuous", "init_from", "tracking.uri", "train.seed"),
)


def main(config: TrainLDMConfig) -> dict[str, float]:
    """Train. Returns the last validation metrics."""
    return training.run_training("train ldm", config, lambda world: set_up(config, world))


def set_up(config: TrainLDMConfig, world: World) -> training.Parts:
    as_given, config = config, at_hand(config)  # a copy that a job staged has the cells alone
    source = cells(config, world) if config.vae else latents(config, world)
    if world.is_first:
        gate = gate_of(Path(as_given.vae or as_given.data.shards), source.manifest.extra["vae"])
        warn(gate, f"vae={as_given.vae}" if as_given.vae else f"data.shards={as_given.data.shards}")
    vocab, features = described(source.manifest.conditions, config.label_embeddings)
    manifest = replace(source.manifest, conditions=vocab)
    n_latents, latent_width = manifest.extra["shape"]
    module = DiT(
        config.model,
        n_latents,
        latent_width,
        {name: vocab.n_labels(name) for name in vocab.names},
        values=values_of(vocab, config),
        features=features,
        combinations_KC=trained_combinations(manifest, config.data.select),
    )
    if config.model.library_size:
        of_all = library_sizes_of(manifest).of(pd.DataFrame(index=range(1)))
        module.size.log_moments.copy_(torch.tensor([of_all.log_mean_n[0], max(of_all.log_std_n[0], MIN_STD)]))
    trained, joined = training.start_of(config), ()
    if trained is not None:
        if trained.dit is None:
            raise InputError(f"init_from={config.init_from} holds an autoencoder alone. It can start `scldm train vae`")
        of, own = weights_hash(trained.vae.state_dict()), manifest.extra["vae"]
        if of != own:
            raise InputError(
                f"init_from={config.init_from}: its diffusion transformer knows the latents of its own autoencoder "
                f"(weights {of[:12]}), these are another's ({own[:12]}). Encode the cells with that one, or train anew"
            )
        joined = dit_from(module, vocab, trained.dit, trained.conditions)
    module.latent_mean_LZ.copy_(source.mean_LZ)
    module.latent_std_LZ.copy_(source.std_LZ.clamp_min(MIN_STD))
    stage = LDMStage(module, config.guidance, config.flow, source.encode)
    if not training.has_started(config):  # else they are in its checkpoint
        fit_means(stage, source.alone(config.hardware.micro_batch), world)

    def cost() -> StepCost:
        bf16, n_cells = config.hardware.precision == "bf16", config.hardware.micro_batch
        return dit_step(config.model, n_latents, latent_width, {}, n_cells, bf16=bf16)

    preview = preview_of(as_given, module, manifest, world) if world.is_first and config.train.preview_share else None
    return training.Parts(module, stage, source.loader, source.validation, manifest, joined, cost, preview=preview)


def preview_of(config: TrainLDMConfig, module: DiT, manifest: Manifest, world: World) -> Make | None:
    """What makes previews: with the autoencoder and the cells that the latents come from."""
    shards = config.data.shards
    if config.vae:
        source = EncodedFrom(Path(config.vae), "best", at_hand(config).data.shards)
    else:
        source = encoded_from(Path(shards))
    hashes = {name: manifest.extra[name] for name in ("vae", "cells") if name in manifest.extra}
    return of_ldm(Trained.of("train ldm", config, manifest, world.device), module, source, hashes)


# --- where the latents come from -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """manifest: of the cells, with what a latent set's `extra` says
    mean_LZ, std_LZ: moments over training cells
    alone: a loader of all training cells, for one process with batches of this size
    encode: of cells that come as counts
    """

    loader: LatentLoader | CellLoader
    validation: LatentLoader | CellLoader
    manifest: Manifest
    mean_LZ: torch.Tensor
    std_LZ: torch.Tensor
    alone: Callable[[int], LatentLoader | CellLoader]
    encode: Callable[[GeneCounts], Posterior] | None = None


def latents(config: TrainLDMConfig, world: World) -> Source:
    """A latent set, in which every cell was encoded once from all its genes."""
    loader = LatentLoader(config.data, split="train", **config.place(world))
    training.check_has_validation(loader.manifest, config.data.shards)
    every, most_cells = replace(config.data, balance=[]), config.train.validation_cells
    validation = LatentLoader(every, split="validation", most_cells=most_cells, **config.place(world))
    extra = loader.manifest.extra

    def alone(batch: int) -> LatentLoader:
        return LatentLoader(every, split="train", global_batch=batch, micro_batch=batch, device=world.device)

    return Source(loader, validation, loader.manifest, torch.tensor(extra["mean"]), torch.tensor(extra["std"]), alone)


def cells(config: TrainLDMConfig, world: World) -> Source:
    """A set of cells, each encoded whenever it comes. Moments, shifts and validation are of whole cells, as latent
    sets are."""
    vae, origin = trained_vae(Path(config.vae), "best")
    vae = vae.to(world.device)
    stream = {f.name: getattr(config.data, f.name) for f in fields(StreamConfig)}
    loader = CellLoader(LoaderConfig(**stream, given=config.given), split="train", **config.place(world))
    training.check_has_validation(loader.manifest, config.data.shards)
    of_set, named = data_of(loader.manifest), f"data.shards={config.data.shards}"
    check_encodes(config.vae, checkpoint_of(origin), of_set, named, world.is_first)
    check_given(config.given, origin, "given", world)
    whole = LoaderConfig(**{**stream, "balance": []}, given=as_whole_cells(config.given))
    n_genes = loader.vocab.n_genes
    batch = training.whole_cells(config.hardware.micro_batch, config.given.of(n_genes).n_genes or n_genes, n_genes)
    of_pass = {"micro_batch": batch, "most_cells": config.train.validation_cells}
    validation = CellLoader(whole, split="validation", **{**config.place(world), **of_pass})

    def alone(size: int) -> CellLoader:
        size = min(size, batch)
        return CellLoader(whole, split="train", global_batch=size, micro_batch=size, device=world.device)

    mean_LZ, std_LZ = moments(vae, alone(batch), world)
    shape = [vae.config.n_latents, vae.config.latent_width]
    extra = {"vae": origin["hash"], "shape": shape, "genes": asdict(config.given), "encoded": "as they come"}
    manifest = replace(loader.manifest, kind="latents", extra=extra)
    return Source(loader, validation, manifest, mean_LZ, std_LZ, alone, vae.encode)


@torch.no_grad()
def moments(vae: VAE, every: CellLoader, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents of the first training cells, (L, Z). The same on every rank."""
    found, n = [], 0
    with every as loader:
        for (one,) in loader.one_pass():
            one = one.to(world.device)
            found.append(vae.encode(one.given).mean_BLZ[one.weight_B > 0].double().cpu())
            n += len(found[-1])
            if n >= MOMENT_CELLS:
                break
    latent_nLZ = torch.cat(found)
    return latent_nLZ.mean(0).float(), latent_nLZ.std(0, unbiased=False).float()


@torch.no_grad()
def fit_means(stage: LDMStage, every: LatentLoader | CellLoader, world: World) -> None:
    """The shifts of labels, and what labels do together, from the latents of the first training cells. The same on
    every rank."""
    module, combinations = stage.module, stage.module.combinations
    if not module.means.names:
        return
    K = len(combinations.labels_KC)
    # cells that are encoded as they come cost more than latents that are read
    most = LEAST_MEAN_CELLS if combinations.interaction_KLZ is None or stage.encode else MOST_MEAN_CELLS
    most = min(max(LEAST_MEAN_CELLS, MEAN_CELLS * K), most)
    row_of: dict[int, int] = {}
    total_RLZ = torch.zeros(min(K, 2 * most) + 1, *module.latent_shape, dtype=torch.float64)
    n_R, square_R = (torch.zeros(len(total_RLZ), dtype=torch.float64) for _ in range(2))
    n_cells = 0.0
    with every as loader:
        for (one,) in loader.one_pass():
            z_BLZ = module.standardise(stage.latents(one.to(world.device)).cpu()).double()
            weight_B = one.weight_B.cpu().double()
            index_B = combinations.index(module.label_ids(module.of_labels(one.conditions)).cpu())
            row_B = torch.tensor([row_of.setdefault(k, len(row_of)) for k in index_B.tolist()])
            total_RLZ.index_add_(0, row_B, z_BLZ * weight_B[:, None, None])
            square_R.index_add_(0, row_B, z_BLZ.square().sum((1, 2)) * weight_B)
            n_R.index_add_(0, row_B, weight_B)
            n_cells += float(weight_B.sum())
            if n_cells >= most:
                break
    seen = [(k, row) for k, row in sorted(row_of.items()) if k < K and n_R[row] > 0]
    if world.rank == 0 and (n_lacking := K - len(seen)):
        print(
            f"scldm: train ldm: {n_lacking:,} of {K:,} combinations have no cell among the first {n_cells:,.0f} "
            "training cells, of which means are taken. Theirs will follow from their relatives",
            file=sys.stderr,
            flush=True,
        )
    seen_K, rows = torch.tensor([k for k, _ in seen]), [row for _, row in seen]
    n_K, mean_KLZ = n_R[rows], total_RLZ[rows]
    mean_KLZ /= n_K[:, None, None]
    within_K = square_R[rows] - n_K * mean_KLZ.square().sum((1, 2))
    variance = float(within_K.sum() / (n_K - 1).clamp_min(0).sum().clamp_min(1))
    module.fit_means(combinations.labels_KC[seen_K], n_K, mean_KLZ, variance)


# --- what the conditions are ---------------------------------------------------------------------------------------


def described(vocab: ConditionVocab, files: dict[str, str]) -> tuple[ConditionVocab, dict[str, torch.Tensor]]:
    """The vocabulary with all labels of the files, behind those of the set, and these labels' vectors.

    Raises: InputError for a file that can't be read, has no vector for a label of the set, or is of no condition.
    """
    labels, features = dict(vocab.labels), {}
    for name, path in files.items():
        key = f"label_embeddings.{name}={path}"
        vocab.require(name, key)
        table = read_table(f"label_embeddings.{name}", path, index_col=0, dtype={0: str})
        if table.columns.empty:
            raise InputError(f"{key}: no column of numbers beside that of the labels")
        try:
            vectors = table.to_numpy("float32")
        except (TypeError, ValueError) as error:
            raise InputError(f"{key}: not a CSV file of labels and numbers: {' '.join(str(error).split())}") from None
        table.index = table.index.astype(str)
        if "" in table.index:
            raise InputError(f"{key}: row {table.index.tolist().index('') + 2} has no label. Name it, or leave it out")
        if table.index.has_duplicates:
            raise InputError(f"{key}: label {table.index[table.index.duplicated()][0]!r} stands twice")
        missing = [label for label in labels[name] if label not in table.index]
        if missing:
            raise InputError(f"{key}: no vector for {missing[0]!r}, nor for {len(missing) - 1} more labels of the set")
        labels[name] = (*labels[name], *(label for label in table.index if label not in labels[name]))
        features[name] = torch.from_numpy(vectors[table.index.get_indexer(list(labels[name]))])
        if not features[name].isfinite().all():
            raise InputError(f"{key}: not all of its numbers are finite")
    return ConditionVocab(labels), features


def values_of(vocab: ConditionVocab, config: TrainLDMConfig) -> dict[str, torch.Tensor]:
    """The number that each label of a continuous condition is.

    Raises: InputError for an unknown condition, or a label that is no number.
    """
    values = {}
    for name in config.model.continuous:
        if name not in vocab.names:
            told = ", ".join(vocab.names) or "none"
            raise InputError(f"model.continuous.{name}: no such condition. The set has {told}")
        if name in config.label_embeddings:
            raise InputError(f"condition {name!r} stands in model.continuous and in label_embeddings: choose one")
        try:
            values[name] = torch.tensor([float(label) for label in vocab.labels[name]])
        except ValueError as error:
            raise InputError(f"model.continuous.{name}: not all of its labels are numbers: {error}") from None
        if not values[name].isfinite().all():
            raise InputError(f"model.continuous.{name}: not all of its labels are finite numbers")
    return values


def trained_combinations(manifest: Manifest, select: Mapping[str, Sequence[str]] | None = None) -> torch.Tensor:
    """Label ids of all conditions in every combination that a training cell has, (K, C) int64.

    select: condition -> labels: what training is restricted to
    """
    counts, train = manifest.statistics.combinations, manifest.split_number("train")
    assert counts.by == manifest.conditions.names
    rows = [ids for ids, n in zip(counts.ids, counts.n, strict=True) if n[train]]
    labels_KC = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(counts.by))
    for name, wanted in (select or {}).items():
        ids = torch.from_numpy(manifest.conditions.encode(name, list(wanted)))
        labels_KC = labels_KC[torch.isin(labels_KC[:, counts.by.index(name)], ids)]
    return labels_KC
