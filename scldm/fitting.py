"""An AnnData in, a trained model out: `scldm.fit`. It runs what the verbs run, one after another, in this process.

This module alone of the library knows the data pipeline and the verbs. It imports them when `fit` is called, so that
whoever loads a model needs neither.

Reading order: fit, the stages, the cells, presets and keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

from scldm.arguments import folder_of, names_of, seed_of, text_of
from scldm.cells_file import made_storable, read_frame, read_names, write_cells
from scldm.cells_opened import frame_of, open_cells, reading
from scldm.count_matrix import FILE_ROWS, row_blocks, table_in_memory, x_of
from scldm.environment import install_hint
from scldm.errors import InputError, read_json
from scldm.files import flat, made_aside, write_json
from scldm.given_json import typed
from scldm.label_text import texts
from scldm.parallel.dist import address_from_environment
from scldm.pretrained import Pretrained, load

if TYPE_CHECKING:
    from data_pipeline.convert.config import ShardsWriteConfig

Keys = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]  # of a stage: presets and keys, merged in order

NOTE = "fit.json"
SPLIT = "scldm_split"  # the obs column that says which cells were trained on
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
    path = _checked(adata, names)
    words = {name: _words(name, given) for name, given in (("shards", shards or {}), ("vae", vae), ("ldm", ldm))}
    if words["shards"].presets:
        raise InputError(f"shards={shards!r} must be a mapping of keys, as shards={{'split.validation': 0.2}}")
    seed, folder = seed_of(seed), None if folder is None else folder_of("folder", folder)
    if layer is not None:
        text_of("layer", layer, "counts")
    if (n_ranks := address_from_environment()[1]) > 1:
        raise InputError(f"fit runs in one process, and this is one of {n_ranks}. `scldm train` runs on many")
    if start_from is not None and not isinstance(start_from, Pretrained):
        start_from = load(folder_of("start_from", start_from))
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory(prefix="scldm-fit-") as place:
        work = Path(place)
        settings = {"conditions": list(names), "layer": layer or "", "seed": seed}
        settings |= {name: [*of.presets, *of.keys] for name, of in words.items()}
        used = " ".join([*names, *words["shards"].keys])
        settings |= {"start_from": start_from.hash if start_from else "", "cells": _digest(adata, path, used)}
        _note(work, json.loads(json.dumps(settings)))
        try:
            with _calm():
                model = _train(adata, path, names, layer or "", words, start_from, seed, work)
        except InputError as error:
            cells = "adata" if isinstance(adata, ad.AnnData) else str(adata)
            said = str(error).replace(str(work / "cells.h5ad"), cells)
            for key, here in SAID:
                said = said.replace(key, here)
            raise InputError(said) from None
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            raise InputError(f"fit needs the package {package}. {install_hint(package)}") from error
        if isinstance(adata, ad.AnnData):
            adata.obs[SPLIT] = pd.Categorical(_splits(work / "shards", adata.n_obs))
    return model


# --- the stages ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """What was given for a stage, as words of a command line."""

    presets: list[str]
    keys: list[str]


def _train(
    adata: ad.AnnData | str | os.PathLike[str],
    path: Path | None,
    conditions: tuple[str, ...],
    layer: str,
    words: Mapping[str, Words],
    start_from: Pretrained | None,
    seed: int,
    work: Path,
) -> Pretrained:
    """Every stage as its verb does it. Each goes on where it stopped."""
    from data_pipeline.convert.config import ShardsWriteConfig
    from data_pipeline.format.schema import read_manifest
    from data_pipeline.stream.gene_set_config import as_whole_cells
    from launch import encode, export, shards_write, train_ldm, train_vae
    from launch.config import check_presets, compose
    from launch.evaluation.gate import read_gate, told_by_the_caller

    given = words["shards"].keys
    chosen = {word.partition("=")[0] for word in given}
    n_cells = adata.n_obs if isinstance(adata, ad.AnnData) else _n_cells(Path(adata))
    defaults = [f"seed={seed}"]
    if not chosen & {"split.by", "split.stratify", "split.held_out"}:
        defaults += [f"split.stratify={json.dumps(conditions)}"]
    if n_cells <= SMALL:
        defaults += ["block_cells=64", "shard_cells=1024"]
    out = {name: str(work / name) for name in ("shards", "vae", "latents", "ldm", "model", "start")}
    own = [f"out={out['shards']}", f"conditions={json.dumps(conditions)}", f"source.layer={layer}"]
    for name, verb in (("vae", train_vae), ("ldm", train_ldm)):  # before anything is made
        presets = words[name].presets or [f"{name}/tiny"]
        try:
            check_presets(f"{name}=", presets, (name, "hardware"))
            compose(verb.CONFIG, [*presets, *words[name].keys, "data.shards=-", "run_dir=-"])
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    file = str(path or work.resolve() / "cells.h5ad")
    config = compose(ShardsWriteConfig, [*defaults, *given, *own, f"source.paths={json.dumps([file])}"])
    if path is None:
        assert isinstance(adata, ad.AnnData)
        _write_cells(adata, config, Path(config.source.paths[0]))
    with _unsaid():
        shards_write.main(config)

    splits = {split.name: split.n_cells for split in read_manifest(out["shards"]).splits}
    on_gpu = torch.cuda.is_available()
    first, second = _presets(splits["train"], on_gpu)
    if splits["train"] < FEW_CELLS:
        few = f"{splits['train']} cells to train on are few: a model of fewer than {FEW_CELLS} learns little of them"
        print(f"scldm.fit: WARNING: {few}", file=sys.stderr)
    threads = max(1, min(MOST_THREADS, torch.get_num_threads()))
    common = ["hardware/one_gpu" if on_gpu else "hardware/cpu", "hardware.engine=plain", f"hardware.threads={threads}"]
    common += ["tracking.enabled=false", "train.hang_s=0", "train.stop_signals=[]"]
    common += [f"train.seed={seed}", f"data.seed={seed}"]
    shape: list[str] = []
    if start_from is not None:
        start_from.save(out["start"])
        shape = [f"model.{key}={_text('vae', key, value)}" for key, value in asdict(start_from.vae.config).items()]
        shape += [f"init_from={out['start']}"]
    of_vae, of_ldm = words["vae"], words["ldm"]
    presets = of_vae.presets or [first], of_ldm.presets or [second]
    print(
        f"scldm.fit: {splits['train']:,} cells to train on, {', '.join([*presets[0], *presets[1]])}, "
        f"on a {'GPU' if on_gpu else 'CPU'}",
        file=sys.stderr,
    )
    place = [f"data.shards={out['shards']}", f"run_dir={out['vae']}"]
    vae = compose(train_vae.TrainVAEConfig, [*presets[0], *common, *shape, *of_vae.presets[1:], *of_vae.keys, *place])
    with _unsaid(), told_by_the_caller():
        train_vae.main(_fitting(vae, of_vae))
        if (gate := read_gate(work / "vae")) and gate["passed"] is not None:
            failed = "" if gate["passed"] else "WARNING: "
            print(f"scldm.fit: {failed}the autoencoder is {gate['line']}", file=sys.stderr)
        genes = as_whole_cells(vae.data.given)
        encode.main(encode.EncodeConfig(out["vae"], out["shards"], out["latents"], genes=genes, threads=threads))
        place = [f"data.shards={out['latents']}", f"run_dir={out['ldm']}"]
        ldm = compose(train_ldm.TrainLDMConfig, [*presets[1], *common, *of_ldm.presets[1:], *of_ldm.keys, *place])
        train_ldm.main(_fitting(ldm, of_ldm))
        export.main(export.ExportConfig(out["vae"], out["model"], out["ldm"]))
    model = load(out["model"], "cuda" if on_gpu else "cpu")
    model = replace(model, gene_columns=_gene_columns(adata, model.genes.ids))
    model.save(out["model"])
    return model


def _presets(n_cells: int, on_gpu: bool) -> tuple[str, str]:
    """Those for so many training cells. On a CPU the larger ones would take weeks."""
    return next(found for most, *found in PRESETS if n_cells <= most or not on_gpu)  # pyright: ignore[reportReturnType]


def _fitting(config: Any, words: Words) -> Any:
    """With the largest micro-batch that divides the global batch, unless one was asked for."""
    if any(word.startswith("hardware.micro_batch=") for word in words.keys):
        return config
    whole, most = config.train.global_batch, config.hardware.micro_batch
    fits = max(m for m in range(1, min(whole, most) + 1) if whole % m == 0)
    return replace(config, hardware=replace(config.hardware, micro_batch=fits))


def _note(work: Path, settings: dict[str, Any]) -> None:
    """Raises: InputError where the folder holds what another call made, or anything else."""
    note = work / NOTE
    if note.is_file():
        before = typed(dict[str, Any], read_json(note), str(note))
        differ = [key for key in settings if before.get(key) != settings[key]]
        if differ:
            told = "; ".join(f"{key} was {before.get(key)!r}, now {settings[key]!r}" for key in differ)
            raise InputError(f"folder={work} holds another fit: {told}. Choose another folder")
    elif work.is_dir() and any(work.iterdir()):
        raise InputError(f"folder={work} is not empty and no folder of scldm.fit. Choose another")
    else:
        work.mkdir(parents=True, exist_ok=True)
        write_json(note, settings)


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


# --- the cells -----------------------------------------------------------------------------------------------------


def _checked(adata: Any, conditions: tuple[str, ...]) -> Path | None:
    """The file with the cells, or None where they are in memory. Raises: InputError for what are no cells, or an obs
    without these columns."""
    if isinstance(adata, ad.AnnData):
        if adata.isbacked and adata.is_view:
            raise InputError(
                f'adata is a view of a file, whose obs can\'t get the column "{SPLIT}". Give adata.to_memory()'
            )
        for name in conditions:
            if name not in adata.obs:
                there = ", ".join(map(str, adata.obs.columns)) or "none"
                raise InputError(f"conditions: adata.obs has no column {name!r}. It has {there}")
        return None
    if not isinstance(adata, str | os.PathLike):
        raise InputError(f"adata is of type {type(adata).__name__}. It must be an AnnData, or the path of an h5ad file")
    path = Path(adata)
    with open_cells(path) as file:  # which says what it is, if it is no such file
        frame_of(file, "obs", path)
    return path.resolve()


def _n_cells(path: Path) -> int:
    with open_cells(path) as file, reading(path):
        return len(read_names(frame_of(file, "obs", path)))


def _write_cells(adata: ad.AnnData, config: ShardsWriteConfig, path: Path) -> None:
    """What training needs of the cells as a file, unless an earlier call wrote it: it would be another file."""
    if path.exists():
        return
    from data_pipeline.convert.splits import columns_of

    columns = list(dict.fromkeys([*config.conditions, *columns_of(config.split)]))
    missing = [name for name in columns if name not in adata.obs]
    if missing:
        raise InputError(f"shards: adata.obs has no column {missing[0]!r}. It has {', '.join(map(str, adata.obs))}")
    obs = table_in_memory(adata.obs)
    obs = obs if config.source.obs_filter else obs[columns]
    for name in columns:
        column = pd.Series(obs[name])
        obs = obs.assign(**{name: texts(column).where(column.notna()).astype("category")})
    parts: dict[str, Any] = {"obs": obs}
    var = table_in_memory(adata.var)
    parts["var"] = var if config.source.var_filter or config.source.gene_column else var[[]]
    wanted = {"counts", config.source.layer.removeprefix("layers/")}
    kept = {name: matrix for name, matrix in adata.layers.items() if name in wanted}
    slim = ad.AnnData(x_of(adata), **parts, layers=kept)
    if adata.raw is not None:
        names = {"obs": adata.obs_names, "var": adata.raw.var_names}
        frames: dict[str, Any] = {of: pd.DataFrame(index=index) for of, index in names.items()}
        slim.raw = ad.AnnData(adata.raw.X, **frames)
    with made_aside(path) as part:
        write_cells(made_storable(slim), part, compression=None)


def _digest(adata: ad.AnnData | str | os.PathLike[str], path: Path | None, used: str) -> str:
    """What tells cells apart: of a file its name, size and time, of an AnnData its genes, counts and labels.

    used: the words that name the columns of obs and var that matter
    """
    if path is not None:
        from data_pipeline.convert.source import size_and_time

        size, modified_ns = size_and_time(str(path))
        return f"{path} {size} {modified_ns}"
    assert isinstance(adata, ad.AnnData)
    digest = hashlib.sha256("\n".join([*map(str, adata.var_names), *map(str, adata.obs_names)]).encode())
    for table in map(table_in_memory, (adata.obs, adata.var)):  # of var, those that choose or name genes
        for name in table:
            if str(name) in used and name != SPLIT:
                digest.update("\n".join([str(name), *table[name].astype(str)]).encode())
    raw: list[Any] = [] if adata.raw is None else [adata.raw.X]
    matrices: list[Any] = [x_of(adata), *(adata.layers[name] for name in sorted(adata.layers)), *raw]
    blocks: Any = (block for matrix in matrices if matrix is not None for block in row_blocks(matrix))
    for block in blocks:
        for start in range(0, block.shape[0], FILE_ROWS):  # the same in memory as in a file
            rows = block[start : start + FILE_ROWS]
            for part in (rows.data, rows.indices.astype(np.int64), rows.indptr.astype(np.int64)):
                digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _gene_columns(adata: ad.AnnData | str | os.PathLike[str], ids: Sequence[str]) -> pd.DataFrame:
    """The text columns of var, such as symbols beside ids, for the genes that the model has."""
    if isinstance(adata, ad.AnnData):
        var = table_in_memory(adata.var)
    else:
        path = Path(adata)
        with open_cells(path) as file, reading(path):
            var = read_frame(frame_of(file, "var", path))
    columns = {
        str(name): column.astype(str)
        for name, column in var.items()
        if isinstance(column.dtype, pd.CategoricalDtype | pd.StringDtype) or column.map(type).eq(str).all()
    }
    found = pd.DataFrame(columns, index=var.index)
    return found.reindex(list(ids)) if set(ids) <= set(var.index) else pd.DataFrame(index=pd.Index(ids))


def _splits(shards: Path, n_cells: int) -> np.ndarray:
    """The split of every cell, in the order of the cells."""
    from data_pipeline.format.read_shards import ShardSet

    out = np.full(n_cells, "left out", object)
    with closing(ShardSet(str(shards))) as cells:
        row = cells.cell_column("row")
        for split in cells.manifest.splits:
            out[row[split.first_cell :][: split.n_cells]] = split.name
    return out


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
