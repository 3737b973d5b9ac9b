"""Trained runs read back: their networks with the EMA of the weights, and whether cells suit them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from data_pipeline.format.schema import OfLatents
from data_pipeline.stream.gene_set_config import OF_THE_CELL, GeneSetConfig, as_whole_cells
from scldm.errors import InputError, read_json
from scldm.given_json import typed
from scldm.model.dit import DiT, DiTConfig
from scldm.model.vae import VAE, VAEConfig
from scldm.parallel.dist import World
from scldm.train.checkpoint import Weights, Which, read_ema
from scldm.train.run_folder import read_config
from scldm.vocab import ConditionVocab, GeneVocab
from scldm.weights import Network, fitting, network_of, weights_hash

Kind = TypeVar("Kind", VAEConfig, DiTConfig, GeneSetConfig)


@dataclass(frozen=True)
class Trained(Generic[Network]):
    """A network of a run, of which nothing is in memory.

    make: makes one of its shape
    run: its folder
    weights: EMA, of one of its checkpoints
    config: of the run, as the checkpoint has it
    """

    make: Callable[[], Network]
    run: Path
    weights: Weights
    config: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.weights.checkpoint.folder

    def shape(self) -> Network:
        """On the meta device. Raises: InputError where the weights do not fit into it, or are not finite."""

        def made() -> Network:
            with torch.device("meta"):
                return self.make()

        return fitting(made, self.weights, self.weights.empty, str(self.folder)).eval()

    @cached_property
    def origin(self) -> dict[str, Any]:
        """Where the weights come from. All are read for their hash."""
        return self.origin_of(self.weights)

    def origin_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The same where they were read."""
        step, sha256 = self.weights.checkpoint.step, weights_hash(tensors)
        return {
            "run": str(self.run),
            "step": step,
            "checkpoint": str(self.folder),
            "hash": sha256,
            "config": self.config,
        }


def vae_of(run_dir: Path, which: Which) -> Trained[VAE]:
    """The autoencoder of a run.

    All is read from the checkpoint, which has config and vocabularies by their hashes: those of the run's folder may
    have been changed.
    """
    read_config(run_dir)
    if (run_dir / "latents.json").is_file():
        raise InputError(f"vae={run_dir} is a run of `scldm train ldm`, not of `scldm train vae`")
    weights = read_ema(run_dir, which)
    target = weights.checkpoint.folder
    config, n_genes = read_config(target), GeneVocab.load(target / "genes.json").n_genes
    of = _part_of(VAEConfig, config, target, "model").portable
    return Trained(lambda: VAE(of, n_genes), run_dir, weights, config)


def trained_vae(run_dir: Path, which: Which) -> tuple[VAE, dict[str, Any]]:
    """The autoencoder of a run in memory, and where its weights come from."""
    trained = vae_of(run_dir, which)
    vae = network_of(trained.make, dict(trained.weights), str(trained.folder))
    return vae.eval().requires_grad_(False), trained.origin_of(vae.state_dict())


def dit_of(run_dir: Path, vae: Trained[VAE], shape: tuple[int, int], which: Which) -> Trained[DiT]:
    """The diffusion transformer of a run on this autoencoder's latents.

    shape: tokens of a latent, and their width
    Raises: InputError where its latents are another autoencoder's.
    """
    read_config(run_dir)
    if not (run_dir / "latents.json").is_file():
        raise InputError(f"ldm={run_dir} is not a run of `scldm train ldm`")
    weights = read_ema(run_dir, which)
    target = weights.checkpoint.folder
    config, path = read_config(target), target / "latents.json"
    latents = typed(OfLatents, read_json(path), str(path))
    if latents.vae != vae.origin["hash"]:
        raise InputError(
            f"{run_dir} was trained on the latents of another autoencoder (weights {latents.vae[:12]}, "
            f"this one {vae.origin['hash'][:12]}). Name the run and checkpoint that encoded them"
        )
    conditions = ConditionVocab.load(target / "conditions.json")
    n_labels = {name: conditions.n_labels(name) for name in conditions.names}
    of = _part_of(DiTConfig, config, target, "model").portable
    return Trained(lambda: DiT.of_tensors(of, *shape, n_labels, weights), run_dir, weights, config)


def checkpoint_of(origin: Mapping[str, Any]) -> Path:
    """The checkpoint that a network comes from: its folder has config and vocabularies, whose hashes were compared."""
    return Path(origin["checkpoint"])


def _part_of(kind: type[Kind], run: Any, run_dir: Path, key: str) -> Kind:
    """A part of the config of a run."""
    where = str(run_dir / "config.json")
    for name in key.split("."):
        run = typed(dict[str, Any], run, where).get(name)
    return typed(kind, run, f"{where}: {key}")


def check_given(given: GeneSetConfig, origin: Mapping[str, Any], key: str, world: World) -> None:
    """Says where genes were drawn by weight in training alone, or now alone: the shares of genes are then others.

    origin: of the autoencoder, from `trained_vae`

    Raises: InputError where cells would be given to the autoencoder otherwise than it was trained. It is another
    function of all genes (or of a random choice of them, zeros included) than of the genes that a cell expresses.
    """
    vae_run = origin["run"]
    trained = _part_of(GeneSetConfig, origin["config"], checkpoint_of(origin), "data.given")
    right = as_whole_cells(trained)
    padded = "expressed_plus_zeros"  # whose n_genes says how many zeros a cell has
    same = given.policy == trained.policy and (given.policy != padded or given.n_genes == trained.n_genes)
    if not same and {given.policy, trained.policy} & set(OF_THE_CELL):
        is_, was, give = (
            f"{at}.policy={of.policy}" + (f" {at}.n_genes={of.n_genes}" if of.policy == padded else "")
            for at, of in ((key, given), ("data.given", trained), (key, right))
        )
        raise InputError(f"{is_}: {vae_run} was trained with {was}. Give {give}")
    if world.is_first and (given.policy == "weighted") != (trained.policy == "weighted"):
        print(
            f"{key}.policy={given.policy}: {vae_run} was trained with data.given.policy={trained.policy}: it met genes "
            "in other shares than here",
            file=sys.stderr,
        )
