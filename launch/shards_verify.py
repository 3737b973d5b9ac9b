"""`scldm shards verify`: is a shard set whole, and what its sources hold?"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.convert.verify import verify_shards
from scldm.checked import Checked, checked
from scldm.errors import InputError

PURPOSE = """Read every byte of a shard set: hashes, counts, order, statistics. Compare some cells with their sources.
Of latents, the mean and standard deviation that training scales them by are computed again.
Exit code 2 where something is wrong, with shard and block of each fault."""
EXAMPLE = "scldm shards verify path=shards"


@dataclass(frozen=True)
class ShardsVerifyConfig(Checked):
    """Check a shard set.

    path: its folder or fsspec URL
    sample: cells to compare with the sources, where they are reachable. 0 compares none
    """

    path: str
    sample: int = checked(256, at_least=0)


CONFIG = ShardsVerifyConfig


def main(config: ShardsVerifyConfig) -> None:
    verdict = verify_shards(config.path, config.sample)
    for note in verdict.notes:
        print(note)
    if verdict.faults:
        for fault in verdict.faults:
            print(fault)
        raise InputError(f"{config.path}: {len(verdict.faults)} faults, the first: {verdict.faults[0]}")
    compared = f", {verdict.n_compared} cells compared with their sources" if verdict.n_compared else ""
    n_blocks = sum(s.n_blocks for s in verdict.manifest.shards)
    print(f"{config.path}: sound: {verdict.manifest.n_cells:,} cells in {n_blocks:,} blocks{compared}")
