"""What a training shows of itself at validations: reconstructed or generated cells beside the same held-out cells.

The held-out cells are drawn once, under the run's seed, and are the same in every preview. They are validation cells:
nothing of the test split is read. Networks that train are used as they are, so that nothing is loaded or copied but the
frozen autoencoder of a second stage. It is on the device only while a preview is made.

Reading order: of_vae, of_ldm, Reconstructions, Generations.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from data_pipeline.format.read_shards import manifest_hash
from data_pipeline.format.schema import Manifest, read_manifest
from launch.run_data import EncodedFrom, library_sizes_of
from launch.trained import trained_vae
from scldm.environment import install_hint
from scldm.errors import InputError
from scldm.flow.sampler import SamplerConfig
from scldm.model.dit import DiT
from scldm.model.vae import VAE
from scldm.train.previews import Check, Make, Preview

if TYPE_CHECKING:  # what an evaluation imports takes seconds, and a node that trains may lack it
    from data_pipeline.stream.loader import StreamConfig
    from launch.training import RunConfig
    from scldm.evaluate.cells import Cells
    from scldm.evaluate.map_of_cells import FixedMap
    from scldm.evaluate.memorisation import Nearness
    from scldm.evaluate.space import Profile, Space
    from scldm.networks import Precision
    from scldm.pretrained import Pretrained

N_CELLS = 500  # held-out cells of a preview
N_READ = 2_000  # of a split at most that are read: training cells to which generated ones may lie near
SAMPLER = SamplerConfig(n_steps=20)
MOST_TOLD = 6  # metrics in a figure's title
PACKAGES = ("matplotlib", "sklearn", "scipy")


@dataclass(frozen=True)
class Trained:
    """What both stages' previews need of a run.

    config: resolved, as JSON has it
    data: how cells are read
    manifest: of what the run trains on
    """

    name: str
    config: Mapping[str, Any]
    data: StreamConfig
    manifest: Manifest
    seed: int
    device: torch.device
    precision: Precision

    @classmethod
    def of(cls, name: str, config: RunConfig, manifest: Manifest, device: torch.device) -> Trained:
        precision = "bfloat16" if config.hardware.precision == "bf16" else "float32"
        return cls(name, asdict(config), config.data, manifest, config.train.seed, device, precision)

    def model(self, vae: VAE, dit: DiT | None) -> Pretrained:
        from scldm.networks import preview_cells
        from scldm.pretrained import Pretrained

        of, batch = self.manifest, preview_cells(vae.config, vae.n_genes)
        origin = {"vae": {"config": self.config}} if dit is None else {}
        words = (of.genes, of.conditions, library_sizes_of(of), origin, "", batch, self.precision)
        return Pretrained(vae, dit, *words)

    def cells(
        self, shards: str, conditions: tuple[str, ...], splits: tuple[str, ...], n: int, check: Check
    ) -> list[Cells]:
        from launch.evaluation.cells import some_cells

        place = (self.data.cache_folder, self.data.cache_gb, self.data.select)
        return some_cells(shards, conditions, splits, n, self.seed, *place, check)


def of_vae(trained: Trained, module: VAE) -> Make | None:
    """What makes previews of the first stage. None, and a line that says why, where there are none."""
    return None if is_lacking() else Reconstructions(trained, module)


def of_ldm(trained: Trained, module: DiT, source: EncodedFrom | None, hashes: Mapping[str, str]) -> Make | None:
    """The same of the second stage.

    source: where its latents come from
    hashes: of the autoencoder's weights, `vae`. Of the cells' manifest, `cells`, where they come as latents
    """
    if source is None:
        print(
            f"scldm: {trained.name}: no previews, as {trained.data.shards} does not say which autoencoder and cells it "
            "comes from. `scldm encode`, run again, notes that",
            file=sys.stderr,
            flush=True,
        )
        return None
    return None if is_lacking() else Generations(trained, module, source, hashes)


def is_lacking() -> bool:
    """Whether a package is missing. Previews are then off, which is said."""
    lacking = next((package for package in PACKAGES if find_spec(package) is None), None)
    if lacking:
        told = f"scldm: no previews, as the package {lacking} is missing. {install_hint(lacking)}"
        print(told, file=sys.stderr, flush=True)
    return lacking is not None


def table_of(cells: Cells) -> pd.DataFrame:
    """The conditions of cells, and their total counts as library sizes."""
    sizes = np.asarray(cells.counts.sum(1), np.float64).ravel()
    return pd.DataFrame({**{name: list(column) for name, column in cells.labels.items()}, "library_size": sizes})


def some_of(cells: Cells, n: int, seed: int) -> Cells:
    """At most n of the cells that have counts, the same for the same seed."""
    from scldm.evaluate.space import subsample

    counted = np.flatnonzero(cells.counts.getnnz(1) > 0)
    return cells.select(counted[subsample(len(counted), n, seed)])


class Reconstructions:
    """Held-out cells, encoded, decoded and drawn: their genes' moments beside the cells' own."""

    def __init__(self, trained: Trained, module: VAE) -> None:
        self.trained, self.module = trained, module
        self.real: Cells | None = None

    def __call__(self, step: int, check: Check) -> Preview:
        from launch.evaluation.reconstructed_cells import known_genes, reconstructed
        from scldm.evaluate.figures import drawn
        from scldm.evaluate.figures.preview import reconstruction
        from scldm.evaluate.preview import gene_agreement, log_moments

        trained, model = self.trained, self.trained.model(self.module, None)
        if self.real is None:
            (held_out,) = trained.cells(trained.data.shards, (), ("validation",), N_CELLS, check)
            self.real = some_of(known_genes(model, held_out)[0], N_CELLS, trained.seed)
            check()
        made = reconstructed(model, self.real, trained.seed, check)
        check()
        moments = log_moments(self.real.counts), log_moments(made.counts)
        metrics = gene_agreement(*moments)
        title = f"step {step:,}: {len(self.real):,} held-out cells, reconstructed with the EMA of the weights"
        return Preview(metrics, drawn(lambda: reconstruction(title, *moments, metrics)))


class Generations:
    """Cells of the held-out cells' conditions and library sizes, generated with few steps. It shows their genes, their
    places on a map of the held-out cells, their response to conditions, and how near they are to training cells."""

    def __init__(self, trained: Trained, module: DiT, source: EncodedFrom, hashes: Mapping[str, str]) -> None:
        self.trained, self.module, self.source, self.hashes = trained, module, source, hashes
        self.ready: Ready | None = None

    def __call__(self, step: int, check: Check) -> Preview:
        from scldm.evaluate.figures import drawn
        from scldm.evaluate.figures.preview import generation
        from scldm.evaluate.memorisation import nearness
        from scldm.evaluate.preview import gene_agreement, log_moments, memorised, responses_to
        from scldm.evaluate.space import Profile

        trained, of = self.trained, self.ready or self._prepared(check)
        self.ready, seed = of, trained.seed
        try:
            vae = of.vae.to(trained.device)
            model = trained.model(vae, self.module)
            wanted = model.check_conditions(table_of(of.real), seed, SAMPLER)
            every, columns = range(wanted.n_cells), model.columns(None)
            matrix = model.make(wanted, every, columns, SAMPLER, "counts", lambda _: check()).matrix
        finally:
            of.vae.to("cpu")
        made = of.real.with_counts(matrix, of.real.genes, "generated cells")
        profile = Profile.of(made.counts, made.types, of.space)
        near = nearness(of.train_profile, profile, len(profile), seed, of.profile)
        moments = log_moments(of.real.counts), log_moments(made.counts)
        metrics = {**gene_agreement(*moments), **memorised(of.near, near)}
        check()
        slopes = responses_to(of.train, of.real, made, seed)
        metrics |= {f"response_slope/{name}": value for name, value in slopes.items()}
        check()
        places = {"real": of.places, "generated": of.map.place(profile.components)}
        shown = {name: value for name, value in metrics.items() if not name.startswith("log_")}
        title = (
            f"step {step:,}: {len(made):,} cells of the held-out cells' conditions, generated in {SAMPLER.n_steps} "
            "steps with the EMA of the weights\n"
            + ", ".join(
                f"{name.replace('_', ' ').replace('/', ' to ')} {value:.2f}"
                for name, value in [*shown.items()][:MOST_TOLD]
            )
        )
        image = drawn(lambda: generation(title, *moments, metrics, of.map.name, places))
        return Preview(metrics, image)

    def _prepared(self, check: Check) -> Ready:
        from scldm.evaluate.map_of_cells import FixedMap
        from scldm.evaluate.memorisation import nearness
        from scldm.evaluate.space import Profile, Space, fit_pca, log_normalise

        trained, source, seed = self.trained, self.source, self.trained.seed
        vae, origin = trained_vae(source.vae, source.which)
        if origin["hash"] != self.hashes["vae"]:
            raise InputError(f"{source.vae} is another autoencoder by now than that of the latents")
        if "cells" in self.hashes and manifest_hash(read_manifest(source.shards)) != self.hashes["cells"]:
            raise InputError(f"{source.shards} holds other cells by now than those that were encoded")
        check()
        names, splits = tuple(trained.manifest.conditions.names), ("train", "validation")
        train, held_out = trained.cells(source.shards, names, splits, N_READ, check)
        train, real = some_of(train, N_READ, seed), some_of(held_out, N_CELLS, seed)
        check()
        space = Space(fit_pca(log_normalise(train.counts), seed=seed, which="training"), fitted_on="training cells")
        profile = Profile.of(real.counts, real.types, space)
        train_profile = Profile.of(train.counts, train.types, space)
        near = nearness(train_profile, profile, len(profile), seed)
        check()
        fixed = FixedMap.of(profile.components, seed)
        places = fixed.place(profile.components)
        return Ready(vae, train, real, space, train_profile, profile, near, fixed, places)


@dataclass(frozen=True)
class Ready:
    """What is the same in every preview of generated cells.

    vae: on the CPU. places: of the held-out cells on the map, (cells, 2)
    """

    vae: VAE
    train: Cells
    real: Cells
    space: Space
    train_profile: Profile
    profile: Profile
    near: Nearness
    map: FixedMap
    places: np.ndarray
