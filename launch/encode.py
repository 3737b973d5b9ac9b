"""`scldm encode`: every cell of a shard set through the frozen autoencoder, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data_pipeline.format.read_shards import ShardSet
from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.loader import shard_batches
from data_pipeline.write_latents import LatentWriter, precision_of
from launch.evaluation.gate import GATE, gate_of, warn
from launch.run_data import check_encodes, data_of, keep_encoded_from
from launch.staged import at_hand
from launch.trained import check_given, checkpoint_of, trained_vae
from scldm.batch import GeneCounts
from scldm.checked import Checked, checked
from scldm.errors import InputError
from scldm.files import write_json
from scldm.model.all_genes import encoder_of
from scldm.model.predicted import Posterior
from scldm.model.vae import VAE
from scldm.networks import AskedPrecision, precision_on
from scldm.parallel.dist import World, close_world, world_of_environment
from scldm.progress import Progress

PURPOSE = """Encode every cell of a shard set once: posterior means as a latent set, which stage 2 trains on.
Runs on any number of ranks, each with its own shards. If it is interrupted, run the same command again."""
EXAMPLE = """
scldm encode vae=runs/vae shards=shards out=latents
torchrun --standalone --no-python --nproc-per-node 8 scldm encode vae=runs/vae shards=shards out=latents
"""
LONGEST_WAIT_S = 7 * 86_400  # for the slowest rank's last shard: 65,536 cells of 10 a second take two hours


@dataclass(frozen=True)
class EncodeConfig(Checked):
    """What to encode with what.

    vae: run folder of the autoencoder
    shards: shard set with the same gene vocabulary, a folder or fsspec URL
    out: folder of the latent set
    which: checkpoint: best by the validation metric, or latest
    genes: what the encoder is given of a cell
    batch: cells per forward pass
    precision: float32, bfloat16, whose latents are off by 0.006 of their deviation, or auto: bfloat16 on a GPU that
        has it
    threads: CPU threads per rank for torch
    cache_folder: where the index and blocks of a remote set are kept. The folder of its training will do
    cache_gb: limit of the blocks kept there, in 1e9 bytes
    """

    vae: str
    shards: str
    out: str
    which: Literal["best", "latest"] = "best"
    genes: GeneSetConfig = field(default_factory=GeneSetConfig)
    batch: int = checked(64, at_least=1)
    precision: AskedPrecision = "auto"
    threads: int = checked(1, at_least=1)
    cache_folder: str = ""
    cache_gb: float = checked(50.0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.genes.check("genes")


CONFIG = EncodeConfig
FIRST = ("vae", "shards", "out", "which", "genes.policy", "genes.share", "batch", "precision", "threads")


def main(config: EncodeConfig) -> Path:
    """Write this rank's shards, and on the first rank the manifest when all are there. Returns the folder."""
    as_given, config = config, at_hand(config)  # a copy that a job staged is gone after it
    world = world_of_environment()
    there = precision_of(config.out) if config.precision == "auto" else ""  # latents go on in their own
    config = replace(config, precision=there or precision_on(world.device, config.precision))
    torch.set_num_threads(config.threads)
    vae, origin = trained_vae(Path(config.vae), config.which)
    vae = vae.to(world.device)
    gate = gate_of(Path(config.vae), origin["hash"])
    if world.is_first:
        warn(gate, f"vae={config.vae}")
    cache_bytes = int(config.cache_gb * 1e9)
    with closing(ShardSet(config.shards, cache_folder=config.cache_folder, cache_bytes=cache_bytes)) as cells:
        if cells.manifest.kind != "cells":
            raise InputError(f"{config.shards}: a set of {cells.manifest.kind}, not of cells")
        of_vae = checkpoint_of(origin)
        check_encodes(config.vae, of_vae, data_of(cells.manifest), f"shards={config.shards}", world.is_first)
        check_given(config.genes, origin, "genes", world)
        shape = (vae.config.n_latents, vae.config.latent_width)
        world.join(LONGEST_WAIT_S)
        config = replace(config, precision=world.of_first(config.precision))  # whatever device a rank has
        writer = LatentWriter(config.out, cells, origin["hash"], shape, config.genes, config.precision)
        with writer.begun() if world.is_first else nullcontext():
            missing = writer.missing_shards()
            world.barrier()  # all ranks have seen the same missing shards before the first is written
            own = missing[world.rank :: world.size]
            n_cells = sum(cells.manifest.shards[k].n_cells for k in own)
            with Progress("encode", n_cells, "cells", shown=world.is_first) as bar:
                encode = encoder(vae, cells, config, world)
                for shard in own:
                    writer.write_shard(shard, latents(encode, cells, shard, config, world, bar))
            world.barrier()
            if world.is_first:
                # before the set is finished, as what a kill leaves of them is removed until then
                keep_encoded_from(Path(config.out), as_given.vae, config.which, as_given.shards)
                if gate:  # for who trains on these latents
                    write_json(Path(config.out) / GATE, gate)
                writer.finish()
                print(f"{cells.manifest.n_cells:,} cells as {shape[0]} tokens of width {shape[1]}: {config.out}")
    close_world()
    return Path(config.out)


def encoder(vae: VAE, cells: ShardSet, config: EncodeConfig, world: World) -> Callable[[GeneCounts], Posterior]:
    """The autoencoder's, or for all genes the one that pays for expressed ones alone."""
    if config.genes.policy != "all":
        return vae.encode
    every = torch.arange(1, cells.manifest.genes.n_genes + 1, device=world.device)
    encode = encoder_of(vae, every, cells.gene_column("fraction_expressed"))

    def of(given: GeneCounts) -> Posterior:
        assert given.gene_ids.shape == every.shape  # to compare the genes too, the host would wait for a GPU
        return encode(given.counts_BS)

    return of


def latents(
    encode: Callable[[GeneCounts], Posterior],
    cells: ShardSet,
    shard: int,
    config: EncodeConfig,
    world: World,
    bar: Progress,
) -> Iterator[np.ndarray]:
    """Posterior means of a shard's cells in stored order, (B, L, Z) a piece."""
    for made in shard_batches(cells, shard, micro_batch=config.batch, given=config.genes, device=world.device):
        batch = made.to(world.device)
        # not around the loop: what asks for a piece would compute in it too
        with torch.no_grad(), torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            mean_BLZ = encode(batch.given).mean_BLZ
        yield mean_BLZ.float().cpu().numpy()
        bar.advance(len(batch))
