"""`scldm shards write`: an atlas as a shard set."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.convert.config import ShardsWriteConfig
from data_pipeline.format.schema import Manifest
from scldm.files import of_bytes

PURPOSE = """Turn an atlas (h5ad files, a SOMA experiment, the Census) into shuffled training shards with splits.
If it is interrupted, run the same command again. As an array job, give each task --task i/n. The array does one stage
of the work. Run it again until each task says that its share is done, then one command with --finish. Under Slurm,
`scldm submit shards write ... --tasks n` submits all of that."""
EXAMPLE = """scldm shards write out=shards source.paths=cells.h5ad conditions=cell_type split.stratify=cell_type
scldm shards write data/census source.census_version=2025-01-30 out=census-human \\
  source.obs_filter="tissue_general == 'lung'" workers=8 memory=64GiB"""
CONFIG = ShardsWriteConfig
FIRST = (
    *("source.paths", "out", "conditions", "split.validation", "split.test"),
    *("split.by", "source.layer", "filter.n_top_genes", "workers", "seed"),
)


def report_lines(manifest: Manifest) -> Iterator[str]:
    """What became of each source's genes."""
    lost = manifest.genes_report
    for uri, n in lost.without_version.items():
        yield f"{uri}: {n:,} of its Ensembl ids have a version, and are joined without it"
    for uri, n in lost.not_in_vocabulary.items():
        nameless = lost.without_name.get(uri, 0)
        yield f"{uri}: {n:,} of its genes are not in the set" + (f", {nameless:,} have no name" if nameless else "")


def main(config: ShardsWriteConfig) -> None:
    _ = config.process_bytes
    from data_pipeline.convert.write_shards import write_shards  # with pandas, once nothing is known to be wrong

    manifest = write_shards(config)
    if manifest:
        splits = ", ".join(f"{s.name} {s.n_cells:,}" for s in manifest.splits if s.n_cells)
        size = sum(s.bytes for s in manifest.shards)
        layers = sorted({f"{s['uri'] or 'Census'}: {s['layer']}" for s in manifest.sources})
        print(f"counts from {'; '.join(layers[:3])}{' and others' if len(layers) > 3 else ''}")
        for line in report_lines(manifest):
            print(line)
        print(
            f"{config.out}: {manifest.n_cells:,} cells ({splits}) x {manifest.genes.n_genes:,} genes, "
            f"{len(manifest.shards)} shards, {of_bytes(size)}, {size / manifest.n_cells:,.0f} bytes a cell"
        )
