"""What a command line names that must be there already: files, folders, and the columns, conditions and genes that it
asks of them. Small JSON files and h5py alone tell it, before packages are imported, which takes seconds. What is said
is what those say who read them. They check the same again, and more.

Reading order: INPUTS, check_inputs, columns of files, names of a model, kinds of sets and runs.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from data_pipeline.convert.open import ANYWHERE, named
from launch.planned import needs_shards
from launch.together import WRITES, moves_of, no_table
from scldm import cells_opened
from scldm.errors import InputError
from scldm.files import check_new, check_page, check_writable
from scldm.given_json import read_checked, typed
from scldm.model_files import check_names
from scldm.train.tracked import check_followed

JUDGED = ("generated", "embedding")  # keys of files that evaluate judges
NO_RUN = "{value} is not a run folder: it has no config.json"
NO_CURVES = "{key}={value}: no metrics.jsonl with metrics in it. Give the folder of a training run"
# keys of what must be there already -> the file in it that says what it is, and what is said where there is none
INPUTS = {
    **dict.fromkeys(("h5ad", "like", "real", *JUDGED), ("", "{value}: no such file")),
    **dict.fromkeys(("vae", "ldm", "runs"), ("config.json", NO_RUN)),
    **dict.fromkeys(
        ("shards", "data.shards", "path"),
        ("manifest.json", "{value}: no manifest.json: not a shard set, or one that is not finished"),
    ),
    **dict.fromkeys(
        ("source.gene_table", "filter.gene_list", "split.held_out", "label_embeddings"),
        ("", "{key}: {value}: no such file"),
    ),
    **dict.fromkeys(
        ("model", "init_from"),
        ("config.json", "{value} is not a model folder: it has no config.json. `scldm export` writes one"),
    ),
}
MAKE_A_FILE = ("checkpoint convert",)  # which may be a folder
PAGES = {"report": "out", "shards info": "html"}  # verb -> the key that names its page
SETS = ("path", "shards", "data.shards")  # keys of shard sets, whose stores know `~`
PLANS: Mapping[str, Literal["vae", "ldm"]] = {"plan": "vae", "plan ldm": "ldm"}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")  # endings of tables that pandas unpacks
MOST_ROWS = 10_000  # of a table of conditions that are looked at here: they take a tenth of a second


def check_inputs(verb: str, config: Any) -> None:
    """config: of the verb, or one of its keys' kinds. Raises: InputError for what is not there, or can't be written."""
    if verb in WRITES:
        cells_opened.check_out(
            config.out, WRITES[verb], **{key: getattr(config, key, "") for key in ("h5ad", "like", "conditions")}
        )
    elif verb not in PLANS:
        check_made(verb, config)
    for key, (file, said) in INPUTS.items():
        if unread(key, verb, config):
            continue
        if key in ("vae", "ldm") and getattr(config, "generated", ""):
            file, said = "metrics.jsonl", NO_CURVES
        given = _at(config, key)
        given = list(given.values()) if isinstance(given, Mapping) else given
        for value in given if isinstance(given, list) else [given]:
            if not isinstance(value, str) or not value or ANYWHERE.match(value):
                continue
            path = os.path.expanduser(value) if key in SETS else value
            if not os.path.exists(os.path.join(path, file) if file else path):
                raise InputError(said.format(key=key, value=value))
    if verb in NAMES:
        NAMES[verb](config)


def check_made(verb: str, config: Any) -> None:
    """Raises: InputError where the file or folder that a verb makes can't be written. A finished set is only read."""
    if verb in PAGES:
        if page := getattr(config, PAGES[verb], ""):
            check_page(PAGES[verb], page)
        return
    for key in ("out", "run_dir"):
        if (value := getattr(config, key, "")) and not ANYWHERE.match(value):
            path = os.path.expanduser(value) if verb == "shards write" else value  # its store knows `~`
            if not os.path.isfile(os.path.join(path, "manifest.json")):
                check_writable(key, path, is_file=verb in MAKE_A_FILE)


def unread(key: str, verb: str, config: Any) -> bool:
    """Whether nothing reads what a key names: a plan that knows all sizes, or a run that goes on from a checkpoint."""
    if key == "init_from":
        run_dir = getattr(config, "run_dir", "")
        begun = os.path.isdir(os.path.join(run_dir, "checkpoints")) or getattr(config, "branch_from", "")
        return bool(begun) or verb in PLANS
    return key == "data.shards" and verb in PLANS and not needs_shards(config, PLANS[verb])


def _at(config: Any, dotted_key: str) -> Any:
    return reduce(lambda at, name: getattr(at, name, None), dotted_key.split("."), config)


# --- columns of files ----------------------------------------------------------------------------------------------


@contextmanager
def file_at(path: str) -> Iterator[Any]:
    """An h5ad file. None for what other packages open: zarr and SOMA."""
    if path.rstrip("/").endswith(".soma") or cells_opened.is_zarr(path):
        yield None
        return
    with cells_opened.open_cells(path) as file, cells_opened.reading(path):
        yield file


def check_has(path: str, columns: Iterable[str], layer: str = "", key: str = "layer", gene_column: str = "") -> None:
    """Raises: InputError for a column of obs, a matrix or a column of var that a file lacks.

    key: that names the layer
    """
    with file_at(path) as file:
        if file is None:
            return
        cells_opened.check_columns(cells_opened.frame_of(file, "obs", path), columns, path)
        if layer:
            cells_opened.layer_in(file, layer, path, key)
        frames = [
            cells_opened.frame_of(file, name, path) for name in ("var", "raw/var") if gene_column and name in file
        ]
        if frames and not any(gene_column in frame for frame in frames):  # which of them, its counts say
            raise cells_opened.no_column(path, gene_column, cells_opened.column_names(frames[0]), "var")


def check_has_labels(path: str, columns: Iterable[tuple[str, str]]) -> None:
    """The same as evaluations say it. columns: the key that names a column, and the column"""
    from scldm.label_text import obs_lacks  # with numpy, as vocabularies below

    with file_at(path) as file:
        if file is None:
            return
        obs = cells_opened.frame_of(file, "obs", path)
        for key, column in columns:
            if column and column not in obs:
                raise obs_lacks(column, path, key, cells_opened.column_names(obs))


def check_sources(config: Any) -> None:
    """Of `scldm shards write`. A set that was begun needs no source, or says itself what it lacks."""
    out = os.path.expanduser(config.out)
    if ANYWHERE.match(out) or (os.path.isdir(out) and os.listdir(out)):
        return
    kind, uris = named(config.source)
    columns = [*config.conditions, *config.split.stratify, *filter(None, [config.split.by])]
    for uri in uris if kind == "h5ad" else ():
        check_has(uri, columns, config.source.layer, "source.layer", config.source.gene_column)


def check_soma(config: Any) -> None:
    check_new(config.out)
    check_has(config.h5ad, (), config.layer, gene_column=config.gene_column)


def check_evaluated(config: Any) -> None:
    conditions = [] if list(config.conditions) == ["none"] else [("condition", name) for name in config.conditions]
    if config.embedding:
        check_has_labels(config.embedding, [("label", config.label), ("held_out_by", config.held_out_by)])
        with file_at(config.embedding) as file:
            if file is not None:
                cells_opened.check_key(file, config.key, config.embedding)
    if config.generated:
        check_has_labels(config.generated, conditions)
        model = model_at(config)[1] if config.model else {}
        if config.control and (judged := config.conditions or model.get("conditions", ())):
            from scldm.evaluate.named import check_controls

            check_controls(config.control, judged)
    if config.layer:
        check_has(config.real or config.embedding, (), config.layer)
    if config.generated and config.real:
        check_has_labels(config.real, [*conditions, ("split", config.split)])
    if config.shards and not ANYWHERE.match(config.shards):
        check_kind(config.shards, "cells")
        check_conditions_of_set(config.shards, [*(name for _, name in conditions), *config.control])
    if not config.generated:
        check_run(config.vae, "vae", of_latents=False)
    if config.published:
        from scldm.evaluate.named import check_published

        check_published(config.published)


# --- names of a model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """What is asked here of a model's config.json, which holds more."""

    ldm: dict[str, Any] | None = None
    conditions: tuple[str, ...] = ()


def model_at(config: Any) -> tuple[Path, dict[str, Any]]:
    """The folder of a model and its config.json. Raises: InputError for a run folder."""
    folder = Path(config.model)
    told = read_checked(_Model, folder / "config.json") or {}
    if "format_version" not in told:
        raise InputError(f"{folder} is not a model folder: its config.json is no model's. `scldm export` writes one")
    return folder, told


def check_generated(config: Any) -> None:
    folder, told = model_at(config)
    asked = labels_in(config.conditions) if config.conditions else dict.fromkeys(config.by, ())
    if config.like:
        check_has(config.like, config.by)
    if config.shards and not ANYWHERE.match(config.shards):
        check_conditions_of_set(config.shards, config.by)
    check_conditions(folder, told, {name: of for name, of in asked.items() if name != "library_size"})
    check_genes(folder, config.genes)


def check_transformed(config: Any) -> None:
    folder, told = model_at(config)
    to = moves_of(config)
    check_conditions(folder, told, {**dict.fromkeys(config.by, ()), **{name: [to[name]] for name in to}})
    check_has(config.h5ad, [*config.by, *to], config.layer)
    check_genes(folder, config.genes)


def check_reconstructed(config: Any) -> None:
    folder, _ = model_at(config)
    check_has(config.h5ad, (), config.layer)
    check_genes(folder, getattr(config, "genes", ()))


def labels_in(path: str) -> dict[str, list[str]]:
    """The labels that a table of conditions asks for, by its columns. None of what may be none, or of what its reader
    unpacks: that says so."""
    if not os.path.exists(path):
        raise InputError(f"conditions={path}: no such file")
    if path.endswith(PACKED):
        return {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            columns, *rows = islice(csv.reader(file), MOST_ROWS)
    except (OSError, UnicodeDecodeError) as error:
        raise no_table(path, error) from None
    except (ValueError, csv.Error):
        return {}
    if any(len(row) > len(columns) for row in rows):
        return {}
    rows = [dict(zip(columns, row)) for row in rows if any(cell.strip() for cell in row)]
    rows = [row for row in rows if row.pop("n_cells", "1").strip("0 ")]  # of none, no label is asked for
    missing = ("", "nan")  # for which the model may have a label
    return {of: [row[of] for row in rows if row.get(of, "") not in missing] for of in columns if of != "n_cells"}


def check_conditions(folder: Path, told: Mapping[str, Any], asked: Mapping[str, Sequence[str]]) -> None:
    """asked: condition -> its labels. Raises: InputError for one that the model does not know."""
    if not (of := told.get("ldm")):
        raise InputError("this model folder holds an autoencoder alone: it embeds, but does not generate")
    from scldm.vocab import ConditionVocab

    labels = ConditionVocab.load(folder / "conditions.json").labels
    vocab = ConditionVocab({name: labels[name] for name in told.get("conditions", labels) if name in labels})
    continuous = typed(dict[str, str], of.get("continuous", {}), f"{folder / 'config.json'}: ldm.continuous")
    for name, wanted in asked.items():
        vocab.encode(name, () if name in continuous else wanted)


def check_genes(folder: Path, genes: Sequence[str]) -> None:
    if genes:
        from scldm.vocab import GeneVocab

        GeneVocab.load(folder / "genes.json").places(genes)


# --- kinds of sets and runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Set:
    """The same of a set's manifest."""

    kind: str = "cells"
    conditions: dict[str, tuple[str, ...]] = field(default_factory=dict)


def manifest_of(folder: str) -> dict[str, Any]:
    return read_checked(_Set, Path(folder).expanduser() / "manifest.json") or {}


def check_conditions_of_set(folder: str, conditions: Sequence[str]) -> None:
    there = list(manifest_of(folder).get("conditions", {}))
    if unknown := [name for name in conditions if name not in there]:
        raise InputError(f"{folder} has no condition={unknown[0]!r}. It has {', '.join(there) or 'none'}")


def check_kind(folder: str, kind: str) -> None:
    """kind: cells or latents. Raises: InputError for a set of the other."""
    if not ANYWHERE.match(folder):
        found = manifest_of(folder).get("kind", kind)
        if found != kind:
            raise InputError(f"{folder}: a set of {found}, not of {kind}")


def check_run(folder: str, key: str, of_latents: bool) -> None:
    """Raises: InputError for a run of the other stage."""
    if folder and not ANYWHERE.match(folder) and (Path(folder) / "latents.json").is_file() != of_latents:
        if of_latents:
            raise InputError(f"{key}={folder} is not a run of `scldm train ldm`")
        raise InputError(f"{key}={folder} is a run of `scldm train ldm`, not of `scldm train vae`")


def check_encoded(config: Any) -> None:
    check_run(config.vae, "vae", of_latents=False)
    check_kind(config.shards, "cells")
    if (Path(config.out) / "manifest.json").is_file():
        check_kind(config.out, "latents")


def check_exported(config: Any) -> None:
    check_run(config.vae, "vae", of_latents=False)
    if config.register:
        check_followed(Path(config.ldm))
        if find_spec("mlflow") is None:
            raise ModuleNotFoundError(name="mlflow")
    check_run(config.ldm, "ldm", of_latents=True)
    check_names(Path(config.out))


def check_trained(config: Any) -> None:
    if (Path(config.run_dir) / "latents.json").is_file():
        raise InputError(f"{config.run_dir} holds another run, of `scldm train ldm`. Choose another run_dir")
    check_stream(config, "cells")


def check_trained_ldm(config: Any) -> None:
    check_run(config.vae, "vae", of_latents=False)
    check_stream(config, "cells" if config.vae else "latents")


def check_stream(config: Any, kind: str) -> None:
    """What both trainings read: a set of this kind, with the conditions that are named, and the run that they go on
    with."""
    from scldm.train import branch
    from scldm.vocab import ConditionVocab

    check_kind(config.data.shards, kind)
    if not ANYWHERE.match(config.data.shards):
        of = ConditionVocab.from_json(manifest_of(config.data.shards).get("conditions", {}), config.data.shards)
        for name, labels in config.data.select.items():
            of.encode(name, labels)
        for name in sorted(config.data.balance):
            of.require(name, "balance")
        for name, path in getattr(config, "label_embeddings", {}).items():
            of.require(name, f"label_embeddings.{name}={path}")
    if branch.begins(config.branch_from, Path(config.run_dir)):
        branch.named(config.branch_from)


NAMES: Mapping[str, Callable[[Any], None]] = {
    "soma write": check_soma,
    "shards write": check_sources,
    "train vae": check_trained,
    "train ldm": check_trained_ldm,
    "encode": check_encoded,
    "export": check_exported,
    "generate": check_generated,
    "transform": check_transformed,
    "embed": check_reconstructed,
    "reconstruct": check_reconstructed,
    "evaluate": check_evaluated,
}
