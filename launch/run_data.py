"""What a training run keeps of its data, and whether other data is the same. Later verbs work without the shards.

Every verb asks `other_data`. Training resumes on the very same data alone. An autoencoder may encode other cells of the
same genes, and a warning says so where the training cells differ: its test cells may have been trained on.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_pipeline.format.schema import Manifest
from scldm.environment import without_passwords
from scldm.errors import InputError, read_json
from scldm.files import write_json
from scldm.given_json import PathText, typed
from scldm.library_size import LibrarySizeModel, LogNormal
from scldm.vocab import GeneVocab

GENES, CONDITIONS, SIZES, LATENTS = "genes.json", "conditions.json", "library_sizes.json", "latents.json"
MISSING = "missing.json"
ENCODED_FROM = "encoded_from.json"  # beside latents
OTHER_CELLS = "other training cells, as after another split"


def data_of(manifest: Manifest) -> dict[str, Any]:
    """File of a run folder -> what it says of the data. MISSING is there where missing values were given a label."""
    now = {
        GENES: manifest.genes.to_json(),
        CONDITIONS: manifest.conditions.to_json(),
        SIZES: library_sizes_of(manifest).to_json(),
    }
    if missing := manifest.query.get("missing"):
        now[MISSING] = {"label": missing}
    if manifest.kind == "latents":
        now[LATENTS] = manifest.extra
    return json.loads(json.dumps(now))


def kept_data(run_dir: Path) -> dict[str, Any]:
    """The same from a run folder. Raises: InputError for a file that holds something else."""
    files = (GENES, CONDITIONS, SIZES, MISSING, LATENTS)
    return {name: _kept(run_dir / name) for name in files if (run_dir / name).is_file()}


def _kept(path: Path) -> dict[str, Any]:
    """One of these files. Raises: InputError."""
    if path.name == GENES:
        return GeneVocab.load(path).to_json()
    if path.name == MISSING:
        return asdict(typed(_Missing, read_json(path), str(path)))
    return typed(dict[str, Any], read_json(path), str(path))


@dataclass(frozen=True)
class _Missing:
    label: str


def library_sizes_of(manifest: Manifest) -> LibrarySizeModel:
    """The library sizes that the manifest states, by label instead of by id."""
    labels = manifest.conditions.labels
    fitted = {}
    for entry in manifest.statistics.library_sizes:
        keys = [tuple(labels[name][k] for name, k in zip(entry.by, ids, strict=True)) for ids in entry.ids]
        moments = map(LogNormal, entry.n, entry.log_mean, entry.log_std)
        fitted[entry.by] = dict(zip(keys, moments, strict=True))
    return LibrarySizeModel(manifest.conditions.names, fitted)


def keep_data(run_dir: Path, manifest: Manifest) -> None:
    """Write what a run keeps of its data into its folder.

    Raises: InputError where the folder has that of other data: its weights mean nothing with it.
    """
    now = data_of(manifest)
    check_data(run_dir, now, str(run_dir))
    for name, value in now.items():
        if not (run_dir / name).is_file():
            write_json(run_dir / name, value)


def other_data(folder: Path, now: Mapping[str, Any]) -> dict[str, str]:
    """File -> in words, what data has that is not what the folder of a run keeps. Empty where it is the same."""
    found = {}
    for name, value in now.items():
        if (folder / name).is_file() and (kept := _kept(folder / name)) != value:
            found[name] = _told(name, kept, value)
    return found


def _told(name: str, kept: Any, now: Any) -> str:
    if name == GENES:
        before, after = (list(of.get("ids", ())) for of in (kept, now))
        if sorted(before) == sorted(after):
            return "the same genes in another order"
        return f"other genes ({len(after):,}, not those {len(before):,})"
    if name == SIZES and not _same_cells(kept, now):
        return OTHER_CELLS
    return {
        CONDITIONS: "other conditions or labels",
        SIZES: "other library sizes by condition",
        MISSING: "another label of missing values",
        LATENTS: "other latents",
    }[name]


def _same_cells(kept: Any, now: Any) -> bool:
    """Whether two sets of library sizes are of the same training cells, by those of all cells together."""
    one, other = (LibrarySizeModel.from_json(of, SIZES).fitted.get((), {}).get(()) for of in (kept, now))
    if one is None or other is None:
        return one is other
    return one.n_cells == other.n_cells and all(math.isclose(a, b) for a, b in zip(one[1:], other[1:], strict=True))


def check_data(folder: Path, now: Mapping[str, Any], who: str) -> None:
    """Raises: InputError where a run's folder, or its checkpoint's, says something else of its data."""
    if found := other_data(folder, now):
        told = "; ".join(f"data.shards has {what} ({name})" for name, what in found.items())
        raise InputError(f"{who} was trained on other data: {told}. Choose another run_dir")


def check_encodes(vae_run: str, kept: Path, now: Mapping[str, Any], given: str, is_first: bool) -> None:
    """Warn where the autoencoder of this run was trained on other cells than this data's training cells.

    kept: folder of its checkpoint
    given: the key and value that named the data

    Raises: InputError where the genes are others, or stand in another order.
    """
    found = other_data(kept, {name: now[name] for name in (GENES, SIZES)})
    if GENES in found:
        raise InputError(
            f"{vae_run} was trained on other data: {given} has {found[GENES]} ({GENES}). Write it from cells with the "
            "run's genes in their order, or train anew with init_from, which joins genes by name"
        )
    if found.get(SIZES) == OTHER_CELLS and is_first:
        print(
            f"\nscldm: WARNING: {vae_run} was trained on other data: {given} has {OTHER_CELLS} ({SIZES}). Its "
            "validation and test cells may have been trained on: scores may be too good\n",
            file=sys.stderr,
            flush=True,
        )


class EncodedFrom(NamedTuple):
    """vae: run folder of the autoencoder. which: its checkpoint. shards: set of the cells, a folder or a URL"""

    vae: Path
    which: Literal["best", "latest"]
    shards: str


@dataclass(frozen=True)
class _Noted:
    vae: PathText
    which: Literal["best", "latest"]
    shards: PathText


def keep_encoded_from(latents: Path, vae: str, which: str, shards: str) -> None:
    """Note beside latents where they come from. Paths are from the latents' folder: all may be moved together."""
    of = {"vae": _seen_from(latents, vae), "which": which, "shards": _seen_from(latents, without_passwords(shards))}
    write_json(latents / ENCODED_FROM, of)


def encoded_from(latents: Path) -> EncodedFrom | None:
    """Where latents come from, as far as that is noted. Hashes in their manifest say whether it is still there."""
    path = latents / ENCODED_FROM
    if not path.is_file():
        return None
    of = typed(_Noted, read_json(path), str(path))
    shards = of.shards if "://" in of.shards else os.path.normpath(latents / of.shards)
    return EncodedFrom(Path(os.path.normpath(latents / of.vae)), of.which, shards)


def _seen_from(folder: Path, path: str) -> str:
    return path if "://" in path else os.path.relpath(Path(path).expanduser().resolve(), folder.resolve())
