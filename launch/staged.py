"""The copy of a shard set that a job put on the node's own disk (cluster/copy_shards.py), where there is one."""

from __future__ import annotations

import os
import typing
from dataclasses import replace
from typing import Any, TypeVar

Config = TypeVar("Config")


def at_hand(config: Config) -> Config:
    """The config of a verb on a shard set, to read it from. Within a job that staged it, it names the local copy."""
    staged, verb = os.environ.get("SCLDM_STAGED"), typing.cast(Any, config)
    if not staged:
        return config
    if hasattr(config, "data"):
        return replace(verb, data=replace(verb.data, shards=staged))
    return replace(verb, shards=staged)
