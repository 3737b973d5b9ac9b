"""What `scldm evaluate` is to judge, by the words of its command line alone: known before packages are imported, which
takes seconds.
"""

from __future__ import annotations

from typing import Any

from scldm.errors import InputError


def check_judged(config: Any) -> None:
    """config: of `scldm evaluate`, or one of its keys' kinds. Raises: InputError where it says nothing to judge."""
    if config.generated and config.embedding:
        raise InputError("generated and embedding are judged apart: give one of them")
    if config.generated and not config.out:
        raise InputError("generated needs out=FOLDER for the report and its figures")
    if config.embedding and not config.label:
        raise InputError("embedding needs label=COLUMN: the obs column that is to be read from it")
    if config.generated or config.embedding:
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
