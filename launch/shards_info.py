"""`scldm shards info`: what a shard set holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.format.describe import describe_text
from data_pipeline.format.schema import read_manifest
from scldm.files import write_page

PURPOSE = "Print what a shard set holds: splits, conditions, sources, sizes. Or draw it as a page with figures."
EXAMPLE = """scldm shards info path=shards
scldm shards info path=shards html=shards.html"""


@dataclass(frozen=True)
class ShardsInfoConfig:
    """Describe a shard set.

    path: its folder or fsspec URL
    html: write a self-contained page with figures to this file
    """

    path: str
    html: str = ""


CONFIG = ShardsInfoConfig


def main(config: ShardsInfoConfig) -> None:
    manifest = read_manifest(config.path)
    print(describe_text(config.path, manifest))
    if config.html:
        from data_pipeline.format.page import describe_html  # the text alone needs no jinja2

        write_page(Path(config.html), describe_html(config.path, manifest).encode())
        print(f"{config.html}: the same with figures")
