"""`scldm generate`: new cells for given conditions, any number of them, by any number of ranks.

Reading order: GenerateConfig, main, which cells.
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import scldm
from data_pipeline.write_cells import N_EVALUATIONS, CellWriter, require_room
from launch.together import WRITES, check_generate, read_table
from scldm.cells_file import read_obs
from scldm.cells_opened import check_out
from scldm.checked import SEEDS, Checked, checked
from scldm.count_draws import DRAWS_VERSION
from scldm.environment import cpu_maker
from scldm.errors import InputError
from scldm.flow.sampler import SamplerConfig
from scldm.networks import AskedPrecision, Kind, batch_on, device_of, precision_on, usable
from scldm.parallel.dist import close_world, world_of_environment
from scldm.pretrained import Pretrained
from scldm.progress import Progress
from scldm.request.wanted import Wanted

PURPOSE = """Generate cells for given conditions: integer counts or means in CSR, the conditions as categorical obs.
Runs on any number of ranks. If it is interrupted, run the same command again. The cells are the same bit for bit for
any number of ranks and interruptions. Threads, batch and the kind of device change a sum's last bits. They are kept in
the file and may not change in between."""
EXAMPLE = """
scldm generate model=model conditions=wanted.csv out=generated.h5ad
scldm generate model=model like=cells.h5ad by=cell_type,donor out=generated.zarr seed=1
scldm generate model=model n=1000 genes=CD3E,MS4A1 kind=means out=generated.h5ad
torchrun --standalone --no-python --nproc-per-node 8 scldm generate model=model n=1000000 out=generated.soma
"""


@dataclass(frozen=True)
class GenerateConfig(Checked):
    """Which cells to make. Exactly one of conditions, like, shards and n says how many of what.

    model: model folder that `scldm export` wrote
    out: what to write: a path that ends in .h5ad, .zarr or .soma (a SOMA experiment)
    conditions: CSV with a column per condition and, if there is one, a column n_cells (else one cell per row)
    like: h5ad or zarr file whose cells' labels are taken, one new cell for each
    shards: shard set of cells whose test split's labels are taken, one new cell for each, as `scldm evaluate` compares
    by: columns of `like` that are conditions of the model. Also library_size, if it has one
    n: number of cells without any condition
    genes: genes to write, in this order. None writes all
    kind: counts, drawn, or means, the decoder's expected counts (float32, none of them 0)
    seed: of all draws. A cell's are keyed by it and by the cell's number
    device: torch device. Empty is the rank's GPU where there is one
    batch: cells that go through the networks at once. null takes 64 on a CPU, and on a GPU what a quarter of its memory
        holds, at most 1,024
    precision: float32, bfloat16, whose expected counts are off by 0.6 %, or auto: bfloat16 on a GPU that has it
    threads: CPU threads per rank for torch. On a CPU, rather start a rank for each core
    """

    model: str
    out: str
    conditions: str = ""
    like: str = ""
    shards: str = ""
    by: tuple[str, ...] = ()
    n: int | None = checked(None, at_least=1)
    genes: tuple[str, ...] = ()
    kind: Kind = "counts"
    seed: int = checked(0, at_least=0, below=SEEDS)
    device: str = ""
    batch: int | None = checked(None, at_least=1)
    precision: AskedPrecision = "auto"
    threads: int = checked(1, at_least=1)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_generate(self)


CONFIG = GenerateConfig
FIRST = (
    *("model", "out", "conditions", "like", "by"),
    *("n", "genes", "seed", "sampler.n_steps", "sampler.guidance_scale"),
)


def main(config: GenerateConfig) -> Path:
    """Write this rank's cells, and on the first rank the file when all are there. Returns its path."""
    torch.set_num_threads(config.threads)
    check_out(config.out, WRITES["generate"], like=config.like, conditions=config.conditions)
    table = wanted_cells(config)
    if config.device:
        usable(config.device)
    model = scldm.load(config.model, batch=config.batch)
    device = device_of(config.device)  # it is on the CPU until it is known whether anything is missing
    if config.batch is None:
        model = replace(model, batch=batch_on(device, model.vae))
    model = replace(model, precision=precision_on(device, config.precision))
    wanted = model.check_conditions(table, config.seed, config.sampler)
    del table
    columns = model.columns(config.genes or None)
    genes = list(model.var(columns).index)
    dtype = np.float32 if config.kind == "means" else np.int32
    writer = CellWriter(
        config.out, wanted.n_cells, genes, dtype, made_by(config, model, wanted, genes), batch=model.batch
    )
    if not writer.finished:
        writer.require_space(model.nonzeros_a_cell(wanted, columns, config.kind))

    world = world_of_environment()
    if writer.finished:
        if world.is_first:
            writer.remove_parts()  # a kill may have left them
            print(f"{config.out} is there: {wanted.n_cells:,} cells x {len(genes):,} genes")
        return Path(config.out)
    if world.is_first:
        for note in wanted.notes:
            print(note, file=sys.stderr)
    with writer.begun() if world.is_first else nullcontext():
        world.join()  # all ranks have seen the same missing parts before the first is written
        own = writer.missing[world.rank :: world.size]
        if own:
            model = model.to(config.device or world.device)
        with Progress("generate", sum(len(writer.rows(p)) for p in own), "cells", shown=world.is_first) as bar:
            for part in own:
                rows = writer.rows(part)
                made = model.make(wanted, rows, columns, config.sampler, config.kind, bar.advance)
                of_cells = {"library_size": wanted.library_size(rows), N_EVALUATIONS: made.n_evaluations_n}
                writer.write_part(part, made.matrix, of_cells)
        world.barrier()
        if world.is_first:
            n_evaluations = int(writer.column(N_EVALUATIONS).sum(dtype=np.int64))
            writer.join(
                lambda: model.obs(wanted, config.sampler, writer.column("library_size")), {N_EVALUATIONS: n_evaluations}
            )
            print(
                f"{wanted.n_cells:,} cells x {len(genes):,} genes, {n_evaluations:,} network evaluations "
                f"({n_evaluations / wanted.n_cells:,.4g} a cell): {config.out}"
            )
    close_world()
    return Path(config.out)


def made_by(config: GenerateConfig, model: Pretrained, wanted: Wanted, genes: list[str]) -> dict[str, str | int]:
    """All that decides what the cells are: uns["scldm"] of the file."""
    settings = {
        "draws": DRAWS_VERSION,
        "threads": config.threads,
        "device": kind_of(config.device),
    }
    return {
        **model.record("generate", seed=config.seed, sampler=config.sampler, kind=config.kind),
        "attention": model.attention_on(device_of(config.device)).way,
        "config": json.dumps(settings),
        "conditions_hash": wanted.hash,
        "genes_hash": hashlib.sha256("\n".join(genes).encode()).hexdigest(),
        **wanted.told,
    }


def kind_of(device: str) -> str:
    """What of a device decides the last bits of its sums: which GPU, or a CPU's maker and vector instructions, by which
    the libraries choose their code."""
    kind = torch.device(device_of(device)).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device or "cuda")
    return f"{kind} {cpu_maker()} {torch.backends.cpu.get_cpu_capability()}"


# --- which cells ---------------------------------------------------------------------------------------------------


def wanted_cells(config: GenerateConfig) -> pd.DataFrame:
    """One row per cell to make, one categorical column per condition that is given."""
    if config.shards:
        from launch.evaluation.cells import labels_of_split  # of the extra shards

        return labels_of_split(config.shards, "test", config.by)
    if config.n is not None:
        require_room(config.out, config.n)
        return pd.DataFrame(index=pd.RangeIndex(config.n))
    path = Path(config.conditions or config.like)
    if not path.exists():
        raise InputError(f"{'conditions' if config.conditions else 'like'}={path}: no such file")
    if config.conditions:
        table = read_table("conditions", path, dtype="category", index_col=False)
        if "n_cells" not in table:
            return table
        # 1e12 and 10.0 are whole numbers too
        numbers = np.asarray(pd.to_numeric(table["n_cells"].astype(str), errors="coerce"), np.float64)
        if not ((numbers >= 0) & (numbers < 1e18) & (numbers == np.floor(numbers))).all():
            raise InputError(f"{path}: column n_cells must hold whole numbers, 0 or more")
        require_room(config.out, int(numbers.sum()))
        rows = np.repeat(np.arange(len(table)), numbers.astype(int))
        return table.drop(columns="n_cells").iloc[rows].reset_index(drop=True)
    return read_obs(path, config.by)
