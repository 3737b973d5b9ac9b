"""`scldm transform`: a user's own cells as they would be under other conditions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from launch.own_cells import OwnCellsConfig, model_and_cells, write_whole
from launch.together import moves_of
from scldm.checked import SEEDS, checked
from scldm.flow.sampler import SamplerConfig
from scldm.pretrained import Kind

PURPOSE = """Take the cells of an h5ad file to other conditions, as control cells to a perturbation. Each goes to
its noise along the flow of its own conditions, and back along that of others. What no condition says is kept."""
EXAMPLE = """
scldm transform model=model h5ad=control.h5ad by=cell_type,treatment to=treatment=IFN out=stimulated.h5ad
scldm transform model=model h5ad=control.h5ad by=treatment to=treatment=IFN alphas=0,0.5,1 kind=means out=way.h5ad
"""


@dataclass(frozen=True, kw_only=True)
class TransformConfig(OwnCellsConfig):
    """Which cells to take where.

    h5ad: file with raw counts, and the cells' own conditions as columns of obs
    to: CONDITION=LABEL, one or more
    out: h5ad file to write: the cells where they were taken, with obs scldm_alpha and scldm_source, their names before
    by: columns of obs that are the cells' own conditions. None takes all that the model has
    alphas: how far to go, all cells for each: 0 is their own conditions, 1 the others
    genes: genes to write, any that the model knows. None writes those of the file
    kind: counts, drawn, or means, expected counts (float32)
    seed: of the counts' draws
    """

    to: tuple[str, ...]
    by: tuple[str, ...] = ()
    alphas: tuple[float, ...] = checked((1.0,), at_least=0, at_most=1)
    genes: tuple[str, ...] = ()
    kind: Kind = "counts"
    seed: int = checked(0, at_least=0, below=SEEDS)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


CONFIG = TransformConfig
FIRST = (
    *("model", "h5ad", "out", "to", "by"),
    *("alphas", "genes", "layer", "seed", "sampler.n_steps"),
)


def main(config: TransformConfig) -> Path:
    """Write the file. Returns its path."""
    out = Path(config.out)
    to = moves_of(config)
    with model_and_cells(config) as (model, adata):
        made = model.transform(
            adata, to, by=config.by or None, alphas=config.alphas, seed=config.seed, sampler=config.sampler,
            layer=config.layer or None, genes=config.genes or None, kind=config.kind,
        )  # fmt: skip
        write_whole(made, out)
    print(f"{made.n_obs:,} cells x {made.n_vars:,} genes: {out}")
    return out
