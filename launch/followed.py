"""A verb as an MLflow run of its own, where it is a stage of something larger: $SCLDM_PARENT names that one's folder.

What trains or scores generated cells has the key `tracking`, and a run with or without a parent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.verbs import STAGES


@contextmanager
def followed(verb: str, config: Any) -> Iterator[None]:
    """Within, a verb that makes something is followed by its first rank, in `tracking/VERB` of the parent's folder. The
    first rank of every other node samples that node."""
    parent = os.environ.get("SCLDM_PARENT", "")
    if not parent or verb not in STAGES:
        yield
        return
    from scldm.train.machine import place_from_environment
    from scldm.train.sending import OF_STAGES, fail_parent
    from scldm.train.tracking import Tracker, TrackingConfig

    folder, place = Path(parent) / OF_STAGES / verb.replace(" ", "-"), place_from_environment()
    if not is_first_rank():
        sampled = place.samples and not hasattr(config, "tracking") and getattr(config, "out", "")
        with Tracker(folder, TrackingConfig(), active=False, place=place) if sampled else nullcontext():
            yield
        return
    if hasattr(config, "tracking") or not getattr(config, "out", ""):
        try:
            yield
        except BaseException:
            fail_parent(Path(parent))
            raise
        return

    datasets = [dataset_of(source, "input") for source in [getattr(config, "shards", "")] if source]
    of = {"stage": verb, "params": asdict(config), "datasets": datasets, "place": place}
    with Tracker(folder, TrackingConfig(), by_parent=True, **of) as tracker:
        tracker.tag(out=config.out)
        yield
        if (Path(config.out) / "manifest.json").is_file():
            tracker.tag(**{"out.manifest": dataset_of(config.out, "output")["digest"]})


def refused_early(verb: str) -> None:
    """A verb was refused before its config was whole: what it is a stage of has failed."""
    parent = os.environ.get("SCLDM_PARENT", "")
    if parent and verb in STAGES and is_first_rank():
        from scldm.train.sending import fail_parent

        fail_parent(Path(parent))


def is_first_rank() -> bool:
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0"


def dataset_of(source: str, context: str) -> dict[str, Any]:
    """A shard set as MLflow's datasets have it. Its digest is the hash of the manifest, hence of all cells."""
    from data_pipeline.format.read_shards import manifest_hash
    from data_pipeline.format.schema import read_manifest

    of = read_manifest(source)
    splits = {split.name: split.n_cells for split in of.splits}
    profile = {"kind": of.kind, "n_cells": of.n_cells, "n_genes": of.genes.n_genes, **splits}
    name = Path(source.rstrip("/")).name
    return {"name": name, "source": source, "digest": manifest_hash(of), "context": context, "profile": profile}
