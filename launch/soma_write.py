"""`scldm soma write`: an h5ad file's counts as a SOMA collection laid out as the Census."""

from __future__ import annotations

from data_pipeline.write_soma import SomaWriteConfig, write_soma

PURPOSE = "Write the counts of an h5ad file as a SOMA collection laid out as the Census."
EXAMPLE = """scldm soma write h5ad=cells.h5ad out=cells-soma
scldm shards write source.paths=cells-soma out=shards conditions=cell_type"""
CONFIG = SomaWriteConfig


def main(config: SomaWriteConfig) -> None:
    layer = write_soma(config)
    print(f"{config.out}: counts of {config.h5ad}: {layer}, experiment census_data/{config.organism}")
