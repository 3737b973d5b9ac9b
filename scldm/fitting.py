"""An AnnData in, a trained model out: `scldm.fit`. It runs what the verbs run, one after another, in this process.

Of the library this module and cells_to_fit.py alone know the data pipeline and the verbs. They import them when `fit`
is called, so that whoever loads a model needs neither.

Reading order: fit, its folder, the stages, presets and keys.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

from scldm.arguments import folder_of, names_of, seed_of, text_of
from scldm.cells_to_fit import (
    SPLIT,
    Tables,
    digest_of,
    gene_columns,
    n_cells_in,
    path_of,
    splits_of,
    tables_of,
    write_slim,
)
from scldm.environment import install_hint
from scldm.errors import InputError, read_json
from scldm.files import check_writable, flat, remove, write_json
from scldm.given_json import typed
from scldm.parallel.dist import address_from_environment
from scldm.pretrained import Pretrained, load

if TYPE_CHECKING:
    from data_pipeline.convert.config import ShardsWriteConfig

Keys = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]  # of a stage: presets and keys, merged in order

NOTE = "fit.json"
CELLS = "cells.h5ad"
PARTS = ("shards", "vae", "latents", "ldm", "model", "start")  # folders
MOST_THREADS = 4  # beyond it steps of the small presets are no faster
FEW_CELLS = 100  # to train on. With fewer, fit warns
SMALL = 10_000  # cells. With fewer, blocks are small too, so that there are many to shuffle
# training cells up to which a preset is taken: the table of docs/presets.md
PRESETS = (
    (SMALL, "vae/tiny", "ldm/tiny"),
    (100_000, "vae/dentate_gyrus", "ldm/base"),
    (10_000_000, "vae/20m", "ldm/base"),
    (sys.maxsize, "vae/70m", "ldm/large"),
)
# keys that `fit` itself gives: stage -> key -> the argument to give instead
OWN = {
    "shards": {"out": "folder", "source.paths": "adata", "source.layer": "layer", "conditions": "conditions"},
    "vae": {"run_dir": "folder", "data.shards": "adata", "init_from": "start_from"},
    "ldm": {"run_dir": "folder", "data.shards": "adata", "init_from": "start_from", "vae": "vae"},
}

# what messages of the verbs tell to type -> what is typed here
SAID = (("source.layer", "layer"), ("missing=LABEL", "shards={'missing': LABEL}"))


def fit(
    adata: ad.AnnData | str | os.PathLike[str],
    conditions: Sequence[str] = (),
    *,
    layer: str | None = None,
    shards: Mapping[str, Any] | None = None,
    vae: Keys = (),
    ldm: Keys = (),
    start_from: Pretrained | str | os.PathLike[str] | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> Pretrained:
    """Train a model on the cells: first the autoencoder, then the diffusion transformer on its latents.

    It runs in this process, on the GPU if torch has one, else on the CPU. `obs["scldm_split"]` of an AnnData then says
    of every cell whether it was trained on: train, validation, test, or left out by a filter. A file is left as it is.

    adata: the cells, in memory, in a file (backed) or lazy, or the path of an h5ad or zarr file. Raw counts are found
        in `X`, `layers["counts"]` or `raw.X`
    conditions: columns of obs that cells can be generated for, as ["cell_type", "treatment"]
    layer: where the counts are, where that can't be found: X, raw or a layer's name
    shards: keys of `scldm shards write`, as {"filter.n_top_genes": 2000, "split.by": "donor"}. Validation and test
        take a tenth of the cells each, of every combination of conditions alike
    vae: of the first stage a preset, keys of `scldm train vae`, or both: ["vae/tiny", {"train.steps": 600}]. Without a
        preset it follows from the number of cells. On a CPU it is the small one
    ldm: the same of the second stage and `scldm train ldm`
    start_from: a trained model, or its folder: the autoencoder starts from its weights and has its shape. Genes are
        joined by name. The diffusion transformer is trained anew, as it knows the latents of its own autoencoder alone
    seed: of splits, order, and every draw of training
    folder: keep all files there. The same call goes on where it was interrupted. None keeps nothing but the model

    Raises: InputError that names the argument, the value and what would be right.
    """
    names = names_of("conditions", conditions, "obs columns", '["cell_type"]')
    path = path_of(adata, names)
    words = {name: _words(name, given) for name, given in (("shards", shards or {}), ("vae", vae), ("ldm", ldm))}
    if words["shards"].presets:
        raise InputError(f"shards={shards!r} must be a mapping of keys, as shards={{'split.validation': 0.2}}")
    seed = seed_of(seed)
    if layer is not None:
        text_of("layer", layer, "counts")
    if (n_ranks := address_from_environment()[1]) > 1:
        raise InputError(f"fit runs in one process, and this is one of {n_ranks}. `scldm train` runs on many")
    if start_from is not None and not isinstance(start_from, Pretrained):
        start_from = load(folder_of("start_from", start_from))
    with _in_folder(folder) as work:
        file = str(path or work.resolve() / CELLS)
        settings: dict[str, Any] = {"conditions": names, "layer": layer or "", "seed": seed}
        settings |= {name: [*of.presets, *of.keys] for name, of in words.items()}
        try:
            n_cells = adata.n_obs if isinstance(adata, ad.AnnData) else n_cells_in(Path(adata))
            config = _checked_keys(words, settings, n_cells, file, work)
            tables = tables_of(adata, config) if isinstance(adata, ad.AnnData) else None
            settings |= {"start_from": start_from.hash if start_from else "", "cells": digest_of(adata, file, tables)}
            with _noted(work, settings), _calm():
                model = _train(adata, tables, config, words, start_from, seed, work)
        except InputError as error:
            said = str(error).replace(file, "adata" if isinstance(adata, ad.AnnData) else str(adata))
            for key, here in (*SAID, *([(f"{work}/", "")] if folder is None else [])):
                said = said.replace(key, here)
            raise InputError(said) from None
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            raise InputError(f"fit needs the package {package}. {install_hint(package)}") from error
        if isinstance(adata, ad.AnnData):
            adata.obs[SPLIT] = pd.Categorical(splits_of(work / "shards", adata.n_obs))
    return model


# --- its folder -----------------------------------------------------------------------------------------------------


@contextmanager
def _in_folder(given: Any) -> Iterator[Path]:
    """Where all files go. A new one in which a refused call leaves nothing is removed.

    Raises: InputError where there can be no such folder.
    """
    if given is None:
        with tempfile.TemporaryDirectory(prefix="scldm-fit-") as place:
            yield Path(place)
        return
    try:
        work = folder_of("folder", given)
        check_writable("folder", str(work))
        new = [path for path in (work, *work.parents) if not path.exists()]
        work.mkdir(parents=True, exist_ok=True)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"folder={str(given)!r} can't be made or read ({error}). Choose another") from None
    try:
        yield work
    except InputError:
        with suppress(OSError):  # what holds anything stays
            for path in new:
                path.rmdir()
        raise


def _has_begun(work: Path, stage: str) -> bool:
    return (work / stage / "config.json").is_file()


@contextmanager
def _noted(work: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Note in the folder what it is of. Keys of a stage may change until it has begun. Where a call is refused before
    anything is trained, what it made goes.

    Raises: InputError where the folder holds what another call made, or anything else.
    """
    note, settings = work / NOTE, json.loads(json.dumps(settings))
    is_new = not note.is_file()
    if not is_new:
        before = typed(dict[str, Any], read_json(note), str(note))
        fixed = [key for key in settings if key not in ("vae", "ldm") or _has_begun(work, key)]
        differ = [key for key in fixed if before.get(key) != settings[key]]
        if differ:
            told = "; ".join(f"{key} was {before.get(key)!r}, now {settings[key]!r}" for key in differ)
            raise InputError(f"folder={work} holds another fit: {told}. Choose another folder")
    elif any(work.iterdir()):
        raise InputError(f"folder={work} is not empty and no folder of scldm.fit. Choose another")
    write_json(note, settings)
    try:
        yield
    except InputError:
        for name in (NOTE, CELLS, *PARTS) if is_new and not _has_begun(work, "vae") else ():
            remove(work / name)
        raise


# --- the stages ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """What was given for a stage, as words of a command line."""

    presets: list[str]
    keys: list[str]


def _checked_keys(
    words: Mapping[str, Words], settings: dict[str, Any], n_cells: int, file: str, work: Path
) -> ShardsWriteConfig:
    """How shards of the cells are written. Raises: InputError for what is wrong with the keys of any stage."""
    from data_pipeline.convert.config import ShardsWriteConfig
    from launch import train_ldm, train_vae
    from launch.config import check_presets, compose

    for name, verb in (("vae", train_vae), ("ldm", train_ldm)):
        presets = _presets_of(name, words[name], f"{name}/tiny", [])
        try:
            check_presets(f"{name}=", presets, (name, "hardware"))
            config: Any = compose(verb.CONFIG, [*presets, *words[name].keys, "data.shards=-", "run_dir=-"])
            for key, table in config.label_embeddings.items() if name == "ldm" else ():
                if "://" not in table and not os.path.isfile(table):
                    raise InputError(f"label_embeddings.{key}={table}: no such file")
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    given, conditions = words["shards"].keys, json.dumps(settings["conditions"])
    defaults = [f"seed={settings['seed']}"]
    if not {word.partition("=")[0] for word in given} & {"split.by", "split.stratify", "split.held_out"}:
        defaults += [f"split.stratify={conditions}"]
    if n_cells <= SMALL:
        defaults += ["block_cells=64", "shard_cells=1024"]
    own = [f"out={work / 'shards'}", f"conditions={conditions}", f"source.layer={settings['layer']}"]
    return compose(ShardsWriteConfig, [*defaults, *given, *own, f"source.paths={json.dumps([file])}"])


def _train(
    adata: ad.AnnData | str | os.PathLike[str],
    tables: Tables | None,
    shards: ShardsWriteConfig,
    words: Mapping[str, Words],
    start_from: Pretrained | None,
    seed: int,
    work: Path,
) -> Pretrained:
    """Every stage as its verb does it. Each goes on where it stopped."""
    from data_pipeline.format.schema import read_manifest
    from data_pipeline.stream.gene_set_config import as_whole_cells
    from launch import encode, export, shards_write, train_ldm, train_vae
    from launch.config import compose
    from launch.evaluation.gate import read_gate, told_by_the_caller

    if tables is not None:
        assert isinstance(adata, ad.AnnData)
        write_slim(adata, tables, shards, Path(shards.source.paths[0]))
    with _unsaid():
        shards_write.main(shards)

    out = {name: str(work / name) for name in PARTS}
    manifest = read_manifest(out["shards"])
    splits = {split.name: split.n_cells for split in manifest.splits}
    on_gpu = torch.cuda.is_available()
    first, second = _presets(splits["train"], on_gpu)
    if splits["train"] < FEW_CELLS:
        few = f"{splits['train']} cells to train on are few: a model of fewer than {FEW_CELLS} learns little of them"
        print(f"scldm.fit: WARNING: {few}", file=sys.stderr)
    threads = max(1, min(MOST_THREADS, torch.get_num_threads()))
    machine = ["hardware/one_gpu" if on_gpu else "hardware/cpu"]
    common = ["hardware.engine=plain", f"hardware.threads={threads}"]
    common += ["tracking.enabled=false", "train.hang_s=0", "train.stop_signals=[]"]
    common += [f"train.seed={seed}", f"data.seed={seed}"]
    shape: list[str] = []
    if start_from is not None:
        start_from.save(out["start"])
        shape = [f"model.{key}={_text('vae', key, value)}" for key, value in asdict(start_from.vae.config).items()]
        shape += [f"init_from={out['start']}"]
    of_vae, of_ldm = words["vae"], words["ldm"]
    of_stages = _presets_of("vae", of_vae, first, machine), _presets_of("ldm", of_ldm, second, machine)
    told = [preset for of in of_stages for preset in of if not preset.startswith("hardware/")]
    told = [f"{splits['train']:,} cells to train on", *told, f"on a {'GPU' if on_gpu else 'CPU'}"]
    print(f"scldm.fit: {', '.join(told)}", file=sys.stderr)
    place = [f"data.shards={out['shards']}", f"run_dir={out['vae']}"]
    vae = compose(train_vae.TrainVAEConfig, [*of_stages[0], *common, *shape, *of_vae.keys, *place])
    place = [f"data.shards={out['latents']}", f"run_dir={out['ldm']}"]
    ldm = compose(train_ldm.TrainLDMConfig, [*of_stages[1], *common, *of_ldm.keys, *place])
    train_ldm.values_of(train_ldm.described(manifest.conditions, ldm.label_embeddings)[0], ldm)  # before hours pass
    with _unsaid(), told_by_the_caller():
        train_vae.main(_fitting(vae, of_vae))
        if (gate := read_gate(work / "vae")) and gate["passed"] is not None:
            failed = "" if gate["passed"] else "WARNING: "
            print(f"scldm.fit: {failed}the autoencoder is {gate['line']}", file=sys.stderr)
        genes = as_whole_cells(vae.data.given)
        encode.main(encode.EncodeConfig(out["vae"], out["shards"], out["latents"], genes=genes, threads=threads))
        train_ldm.main(_fitting(ldm, of_ldm))
        export.main(export.ExportConfig(out["vae"], out["model"], out["ldm"]))
    model = load(out["model"], "cuda" if on_gpu else "cpu")
    model = replace(model, gene_columns=gene_columns(adata, model.genes.ids))
    model.save(out["model"])
    return model


def _presets(n_cells: int, on_gpu: bool) -> tuple[str, str]:
    """Those for so many training cells. On a CPU the larger ones would take weeks."""
    return next(found for most, *found in PRESETS if n_cells <= most or not on_gpu)  # pyright: ignore[reportReturnType]


def _presets_of(stage: str, words: Words, chosen: str, machine: list[str]) -> list[str]:
    """A stage's presets: the chosen one first, unless one that was given says what the network is.

    machine: what `fit` knows of it goes before the presets that may say otherwise
    """
    presets = words.presets
    if not any(of.startswith(f"{stage}/") or of.endswith((".yaml", ".yml")) for of in presets):
        presets = [chosen, *presets]
    at = next((k for k, of in enumerate(presets) if not of.startswith(f"{stage}/")), len(presets))
    return [*presets[:at], *machine, *presets[at:]]


def _fitting(config: Any, words: Words) -> Any:
    """With the largest micro-batch that divides the global batch, unless one was asked for."""
    if any(word.startswith("hardware.micro_batch=") for word in words.keys):
        return config
    whole, most = config.train.global_batch, config.hardware.micro_batch
    fits = max(m for m in range(1, min(whole, most) + 1) if whole % m == 0)
    return replace(config, hardware=replace(config.hardware, micro_batch=fits))


@contextmanager
def _calm() -> Iterator[None]:
    """What training sets in this process is afterwards what it was: torch's threads and random state."""
    threads = torch.get_num_threads()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _unsaid() -> Iterator[None]:
    """Without the verbs' lines on stdout, which name files. Progress and warnings go to stderr."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


# --- presets and keys ----------------------------------------------------------------------------------------------


def _words(stage: str, given: Keys) -> Words:
    """A stage's presets and keys as a command line has them."""
    parts = [given] if isinstance(given, str | Mapping) else given
    if not isinstance(parts, Sequence):
        raise InputError(f"{stage}={given!r} must be a preset, a mapping of keys, or a list of both")
    words = Words([], [])
    for part in parts:
        if isinstance(part, str) and "=" not in part:
            words.presets.append(part)
        elif isinstance(part, Mapping):
            for key, value in flat(part):
                if key in OWN[stage] or key.startswith("tracking."):
                    instead = OWN[stage].get(key)
                    told = f"give the argument {instead}" if instead else "leave it out"
                    raise InputError(f"{stage}: {key} is set by fit itself: {told}")
                words.keys.append(f"{key}={_text(stage, key, value)}")
        else:
            raise InputError(f"{stage}={part!r} must be a preset, as vae/tiny, or a mapping, as {{'train.steps': 600}}")
    return words


def _text(stage: str, key: str, value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, str | os.PathLike):
        return str(value)
    if isinstance(value, np.generic):
        value = value.item()
    try:
        return json.dumps(value)
    except TypeError:
        raise InputError(f"{stage}: {key}={value!r} must be a number, a text, or a list of them") from None
