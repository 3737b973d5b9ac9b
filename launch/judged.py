"""What `scldm evaluate` is to judge, and which of its keys that takes, by the words of its command line alone: known
before packages are imported, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from scldm.errors import InputError
from scldm.files import flat

# what is judged -> the keys it takes. A key takes those below it too
TAKES: Mapping[str, tuple[str, ...]] = {
    "generated": (
        *("generated", "out", "conditions", "protocol", "control", "shards", "cache_folder", "cache_gb", "real"),
        *("split", "layer", "model", "vae", "ldm", "device", "batch", "precision", "evaluate", "tracking"),
    ),
    "vae": (
        *("vae", "model", "shards", "cache_folder", "cache_gb", "out", "conditions", "published", "device", "batch"),
        *("precision", "evaluate.seed", "evaluate.max_real_cells", "tracking.enabled"),
    ),
    "embedding": (
        *("embedding", "key", "label", "held_out_by", "real", "layer", "out", "evaluate.seed", "tracking.enabled"),
    ),
}


# with generated: key -> the key without which it has no meaning
NEEDS: Mapping[str, str] = {
    **dict.fromkeys(("split", "layer"), "real"),
    **dict.fromkeys(("cache_folder", "cache_gb"), "shards"),
    **dict.fromkeys(("device", "batch", "precision"), "model"),
}


def check_judged(config: Any) -> None:
    """config: of `scldm evaluate`, or one of its keys' kinds. Raises: InputError where it says nothing to judge, or
    too much."""
    if config.generated and config.embedding:
        raise InputError("generated and embedding are judged apart: give one of them")
    if config.generated and not config.out:
        raise InputError("generated needs out=FOLDER for the report and its figures")
    if config.embedding and not config.label:
        raise InputError("embedding needs label=COLUMN: the obs column that is to be read from it")
    if mode := "generated" if config.generated else "embedding" if config.embedding else "":
        refuse_unused(config, mode)
        if mode == "generated" and bool(config.real) == bool(config.shards):
            raise InputError("give real cells once: as shards=FOLDER, or real=FILE.h5ad whose obs has a split column")
        return
    if not (config.vae or config.model):
        raise InputError(
            "give what is to be judged: generated=FILE with shards or real, vae=RUN with shards, or embedding=FILE "
            "with label"
        )
    if not config.shards:
        raise InputError("an autoencoder is judged on the test cells of a shard set: give shards=FOLDER")
    if config.vae and config.model:
        raise InputError("vae and model are judged apart without generated: give one of them")
    refuse_unused(config, "vae")


def refuse_unused(config: Any, mode: str) -> None:
    """Raises: InputError for a key that was changed from its default, and that this mode does not use."""
    given = mode if getattr(config, mode) else "model"
    default = dict(flat(asdict(type(config)())))
    for key, value in flat(asdict(config)):
        if value == default.get(key):
            continue
        if not any(key == taken or key.startswith(f"{taken}.") for taken in TAKES[mode]):
            raise InputError(f"{key}={value} has no effect with {given}=, which takes {', '.join(TAKES[mode])}")
        if mode == "generated" and (needed := NEEDS.get(key)) and not getattr(config, needed):
            raise InputError(f"{key}={value} has no effect with generated= without {needed}=: leave it out")
