"""What the keys of a verb say together, by the words of its command line alone: known before packages are imported,
which takes seconds. Each function takes the verb's config, or one of its keys' kinds. What `scldm evaluate` takes is in
judged.py.

Reading order: check_generate, moves_of, check_export, TOGETHER.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from launch.judged import check_judged
from scldm.errors import InputError

WRITES = {  # verb -> how what it writes may end
    "generate": (".h5ad", ".zarr", ".soma"),
    **dict.fromkeys(("embed", "reconstruct", "transform"), (".h5ad",)),
}


def check_generate(config: Any) -> None:
    """Raises: InputError unless one thing says how many cells of what."""
    ways = [name for name in ("conditions", "like", "shards", "n") if getattr(config, name) not in ("", None)]
    if len(ways) != 1:
        raise InputError(f"give exactly one of conditions, like, shards and n. Given: {', '.join(ways) or 'none'}")
    if config.by and not (config.like or config.shards):
        raise InputError(f"by={','.join(config.by)} names columns of like, which is not given")
    if config.like and not config.by:
        raise InputError("like needs by: the columns of its obs that are conditions of the model, as by=cell_type")


def moves_of(config: Any) -> dict[str, str]:
    """Where `scldm transform` takes cells: condition -> label. Raises: InputError for a word that says no such."""
    to: dict[str, str] = {}
    for part in config.to:
        name, _, label = part.partition("=")
        if not (name and label):
            raise InputError(f"to={','.join(config.to)} must be CONDITION=LABEL, as to=treatment=IFN")
        to[name] = label
    return to


def check_export(config: Any) -> None:
    """Raises: InputError for a model that MLflow's registry does not take."""
    if config.register and not config.ldm:
        raise InputError(f"register={config.register} needs ldm: an autoencoder alone generates no cells")
    if config.alias and not config.register:
        raise InputError(f"alias={config.alias} needs register=NAME, the model that it is an alias of")
    if config.alias and not re.fullmatch(r"(?!latest$|v\d+$)[\w-]+", config.alias, re.ASCII):
        raise InputError(
            f"alias={config.alias}: give letters, digits, _ and -, and not latest or v1, as MLflow wants it"
        )


TOGETHER: Mapping[str, Callable[[Any], object]] = {
    "evaluate": check_judged,
    "export": check_export,
    "generate": check_generate,
    "transform": moves_of,
}
