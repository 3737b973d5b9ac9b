"""What `python -m benchmarks.loader` measures on: its settings, the synthetic cells in every format, the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import loader_controls as controls
from benchmarks import shards as bench_shards
from benchmarks.shards import BenchShardsConfig
from data_pipeline.convert.config import ShardsWriteConfig, SourceConfig, SplitConfig
from data_pipeline.convert.write_shards import write_shards
from data_pipeline.format import schema
from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.loader import CellLoader, LoaderConfig
from scldm.errors import InputError
from scldm.files import made_aside

PARTS = ("speed", "costs", "memory", "resume", "mixing", "scale")
CONTROLS = ("mmap", "soma", "scdataset", "webdataset")


@dataclass(frozen=True)
class BenchLoaderConfig:
    """What to measure.

    folder: for the synthetic cells in every format (about 4 GB at 100,000 cells); what is there is used again
    cells: synthetic cells
    genes: synthetic genes
    expressed: genes with a count, per cell
    batch: cells of a batch
    n_genes: random genes of a batch
    rounds: of every reader
    parts: of the benchmark: speed, costs, memory, resume, mixing, scale
    controls: mmap, soma (tiledbsoma-ml), scdataset, webdataset (a sample a cell)
    scale_cells: cells of the synthetic index
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    folder: str = "???"
    cells: int = 100_000
    genes: int = 20_000
    expressed: int = 1_763
    batch: int = 128
    n_genes: int = 2_048
    rounds: int = 12
    parts: tuple[str, ...] = PARTS
    controls: tuple[str, ...] = CONTROLS
    scale_cells: int = 100_000_000
    json: bool = False
    save: str = ""

    def __post_init__(self) -> None:
        for key, known in (("parts", PARTS), ("controls", CONTROLS)):
            unknown = [name for name in getattr(self, key) if name not in known]
            if unknown:
                raise InputError(f"{key}={unknown[0]!r} is unknown; there are {', '.join(known)}")


def prepare(config: BenchLoaderConfig, folder: Path) -> None:
    """The same cells in every format that the chosen parts read."""
    folder.mkdir(parents=True, exist_ok=True)
    atlas = BenchShardsConfig(cells=config.cells, genes=config.genes, expressed=config.expressed)
    bench_shards.keep_to_one_atlas(folder, cells=config.cells, genes=config.genes, expressed=config.expressed)

    def once(name: str, write: Callable[[Path], Any]) -> None:
        if not (folder / name).exists():
            with made_aside(folder / name) as part:
                write(part)

    once("atlas.h5ad", lambda path: bench_shards.write_h5ad(path, atlas))
    for codec in schema.CODECS:
        # write_shards goes on by itself, and needs the name it will have
        write_shards(_set_of(folder, codec))
    if "mmap" in config.controls:
        once("mmap", lambda path: controls.write_mmap(folder / "shards-none", path))
    if "soma" in config.controls:
        once("atlas-soma", lambda path: bench_shards.write_soma(path, atlas))
    if "webdataset" in config.controls:
        once("samples", lambda path: controls.write_samples(folder / "shards-none", path))
    (folder / "n_genes").write_text(str(config.genes))


def _set_of(folder: Path, codec: schema.Codec) -> ShardsWriteConfig:
    return ShardsWriteConfig(
        out=str(folder / f"shards-{codec}"),
        source=SourceConfig(paths=(str(folder / "atlas.h5ad"),)),
        conditions=("cell_type",),
        split=SplitConfig(0.0, 0.0),
        codec=codec,
    )


def loader_of(config: BenchLoaderConfig, codec: str = "zstd", micro_batches: int = 1, **changes: Any) -> CellLoader:
    """micro_batches: of a step on this one rank"""
    sets = GeneSetConfig("random", config.n_genes, config.batch)
    given = LoaderConfig(str(Path(config.folder) / f"shards-{codec}"), seed=1, given=sets)
    step = micro_batches * config.batch
    return CellLoader(replace(given, **changes), global_batch=step, micro_batch=config.batch)


def batches_of(loader: CellLoader) -> Iterator[int]:
    for micro_batches in loader:
        yield sum(map(len, micro_batches))
