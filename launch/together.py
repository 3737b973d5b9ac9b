"""What the keys of a verb say together, by the words of its command line alone: known before packages are imported,
which takes seconds. Each function takes the verb's config, or one of its keys' kinds. What `scldm evaluate` takes is in
judged.py.
"""

from __future__ import annotations

import re
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.stream.gene_set_config import GeneSetConfig
from launch.judged import check_judged
from scldm.checked import check_divides
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


def no_table(path: str | Path, error: Exception, key: str = "conditions") -> InputError:
    """What is said of a table that can't be read."""
    why = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{key}={path}: not a readable CSV file: {why}")


def read_table(key: str, path: str | Path, **how: Any) -> Any:
    """A CSV file as pandas reads it, packed or not. A label may be called `NA`. Raises: InputError for a file that is
    none."""
    import pandas as pd  # takes long

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            return pd.read_csv(path, keep_default_na=False, **how)
    except Exception as error:  # pandas', and those of what unpacks a file or fetches it, which have no common kind
        raise no_table(path, error, key) from None


def moves_of(config: Any) -> dict[str, str]:
    """Where `scldm transform` takes cells: condition -> label. Raises: InputError for a word that says no such."""
    to: dict[str, str] = {}
    for part in config.to:
        name, _, label = part.partition("=")
        if not (name and label):
            raise InputError(f"to={','.join(config.to)} must be CONDITION=LABEL, as to=treatment=IFN")
        to[name] = label
    return to


def check_device(config: Any) -> None:
    """Raises: InputError for a device that can be none of torch's. Whether it is there, torch says later."""
    if config.device and (config.device == "gpu" or not re.fullmatch(r"[a-z]+(:\d+)?", config.device, re.ASCII)):
        raise InputError(f"device={config.device}: torch knows cpu, cuda, cuda:1 and others")


def check_export(config: Any) -> None:
    """Raises: InputError for a model that MLflow's registry does not take."""
    name, alias = config.register, config.alias
    if name and not (name.isprintable() and re.fullmatch(r"(?! *$|\.$|\.\.)[^/:]{1,256}", name)):
        raise InputError(
            f"register={reprlib.repr(name)}: give a name of at most 256 printable letters, not blank, without / and "
            ":, and not . or one that begins with .."
        )
    if alias and not re.fullmatch(r"(?!latest$|v\d+$)[\w-]{1,255}", alias, re.ASCII | re.IGNORECASE):
        raise InputError(
            f"alias={reprlib.repr(alias)}: give letters, digits, _ and -, at most 255, and not latest or v1, however "
            "written"
        )
    if name and not config.ldm:
        raise InputError(f"register={name} needs ldm: an autoencoder alone generates no cells")
    if alias and not name:
        raise InputError(f"alias={alias} needs register=NAME, the model that it is an alias of")


def check_sampler(config: Any) -> None:
    from scldm.flow.sampler import SamplerConfig  # with numpy

    SamplerConfig(**vars(config.sampler))


def check_vae(config: Any) -> None:
    for key in ("given", "asked"):
        GeneSetConfig(**vars(getattr(config.data, key))).check(f"data.{key}")
    for name in ("n_heads", "decoder_cross_heads"):
        check_divides(config.model, name, "width", "model.")


def check_ldm(config: Any) -> None:
    GeneSetConfig(**vars(config.given)).check("given")
    check_divides(config.model, "n_heads", "width", "model.")


TOGETHER: Mapping[str, Sequence[Callable[[Any], object]]] = {
    "train vae": [check_vae],
    "plan": [check_vae],
    "encode": [lambda config: GeneSetConfig(**vars(config.genes)).check("genes")],
    "train ldm": [check_ldm],
    "plan ldm": [check_ldm],
    "export": [check_export],
    "generate": [check_generate, check_sampler, check_device],
    "transform": [moves_of, check_sampler, check_device],
    "embed": [check_device],
    "reconstruct": [check_device],
    "evaluate": [check_judged, check_device],
}
