"""`scldm shards info`: what a shard set holds."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from data_pipeline.format.describe import describe_text
from data_pipeline.format.schema import read_manifest
from launch.cli import run_verb

PURPOSE = "Print what a shard set holds: splits, conditions, sources, sizes."
EXAMPLE = "scldm shards info path=shards"


@dataclass(frozen=True)
class ShardsInfoConfig:
    """Describe a shard set.

    path: its folder or fsspec URL
    """

    path: str


CONFIG = ShardsInfoConfig


def main(config: ShardsInfoConfig) -> None:
    print(describe_text(config.path, read_manifest(config.path)))


if __name__ == "__main__":
    sys.exit(run_verb("shards info", sys.argv[1:]))
