"""No harmed file is read as if it were sound: every format, by bytes and by JSON values.

A harm is refused by an InputError that names the file, or changes nothing that is read. Where even the hashes agree
with the harm, as somebody who means ill would have it, nothing but an InputError is raised.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import scldm
from data_pipeline.convert import write_shards
from data_pipeline.convert.config import ShardsWriteConfig, SourceConfig, SplitConfig
from data_pipeline.convert.plan import Plan, settings_of
from data_pipeline.convert.source import SourceSpec
from data_pipeline.convert.stages import ChosenGenes, Layout
from data_pipeline.convert.write_shards import finished_set
from data_pipeline.format.block import decode_block
from data_pipeline.format.describe import describe_text
from data_pipeline.format.latent_block import LatentSlots
from data_pipeline.format.page import describe_html
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.format.schema import CELL_COLUMNS, GENE_COLUMNS, read_manifest, vocab_tag
from data_pipeline.write_cells import CellWriter
from data_pipeline.write_latents import LatentWriter, noted
from launch import quickstart
from launch.cluster.notes import find_notes, submitted
from launch.cluster.status import state_of_run, training
from launch.quickstart import QuickstartConfig
from launch.report import evaluations, facts
from launch.run_data import encoded_from, kept_data
from launch.shards_write import report_lines
from scldm.errors import InputError
from scldm.given_json import read_sealed, sealed
from scldm.model_folder import save_pretrained
from scldm.train.checkpoint import read_ema
from scldm.train.tracked import new_note, unsent
from scldm.weights import weights_hash
from tests.data_pipeline.small_sets import known_cells, write_set
from tests.mutations import check_every_harm, check_nothing_else_is_raised, check_taken_or_refused, harmed_json, outcome
from tests.scldm.small_model import CONDITIONS, GENES, library_sizes, networks
from tests.scldm.small_model import cells as small_cells
from tests.scldm.train.small_runs import small_run

pytestmark = pytest.mark.heavy

FEW, MANY = 40, 4_000


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(str(a.dtype).encode() + a.tobytes() for a in arrays)).hexdigest()


def read_cells(folder: Path) -> Any:
    """All that readers take of a set."""
    with closing(ShardSet(str(folder))) as shards:
        m = shards.manifest
        found = [shards.cell_column(name) for name in (*CELL_COLUMNS, *(f"condition.{n}" for n in m.conditions.names))]
        found += [shards.gene_column(name) for name in GENE_COLUMNS]
        for block in range(len(shards.blocks)):
            of = decode_block(shards.fetch(block).tobytes(), vocab_tag=vocab_tag(m.genes), where=shards.where(block))
            found += [of.indptr, of.columns, of.counts, of.sources, of.rows, *of.conditions]
        return m.to_json(), digest(*found)


def read_latents(folder: Path) -> Any:
    with closing(ShardSet(str(folder))) as shards:
        slots, found = LatentSlots(shards.manifest, 1), []
        for block in range(len(shards.blocks)):
            slots.fill(0, shards.fetch(block), shards.where(block))
            n = int(slots.n_cells[0])
            found += [slots.latent[0, :n].copy(), slots.about[0, :n].copy()]
        return shards.manifest.to_json(), digest(*found)


def read_model(folder: Path) -> Any:
    model = scldm.load(folder)
    assert model.dit is not None
    weights = [weights_hash(net.state_dict()) for net in (model.vae, model.dit)]
    configs = asdict(model.vae.config), asdict(model.dit.config)
    sizes = model.library_sizes.to_json()
    return weights, configs, model.genes.to_json(), model.conditions.to_json(), sizes, model.origin, model.hash


def read_checkpoint(run: Path) -> Any:
    found = read_ema(run, "latest")
    return weights_hash(found), found.checkpoint.state


def small(folder: Path) -> Path:
    return write_set(folder, known_cells(60, 20, 60), "none", block_cells=16)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind, small, since every harm is followed by reading it all."""
    at = tmp_path_factory.mktemp("sound")
    cells = ShardSet(str(small(at / "cells")))
    writer = LatentWriter(at / "latents", cells, "of a vae", (2, 3))
    with writer.begun():
        for shard in writer.missing_shards():
            entry = cells.manifest.shards[shard]
            latents = np.random.default_rng(shard).normal(size=(entry.n_cells, 2, 3)).astype(np.float32)
            writer.write_shard(shard, latents)
        writer.finish()
    cells.close()
    vae, dit = networks()
    save_pretrained(at / "model", vae, dit, GENES, CONDITIONS, library_sizes(), {"from": "a test"})
    small_run("vae", at / "run", steps=2, validate_every=2, save_every=2)
    return {name: at / name for name in ("cells", "latents", "model", "run")}


READ: dict[str, Callable[[Path], Any]] = {
    "cells": read_cells, "latents": read_latents, "model": read_model, "run": read_checkpoint,
}  # fmt: skip
STEP = "checkpoints/step-00000002"
FILES = [
    *(("cells", path) for path in ("manifest.json", "index/blocks.npy", "index/cells.row.npy")),
    *(("cells", path) for path in ("index/cells.condition.type.npy", "shards/train-000000.tar")),
    *(("latents", path) for path in ("manifest.json", "index/blocks.npy", "shards/train-000000.tar")),
    *(("model", path) for path in ("config.json", "model.safetensors", "genes.json", "conditions.json")),
    ("model", "library_sizes.json"),
    *(("run", f"{STEP}/{name}") for name in ("state.json", "part-0-of-1.safetensors", "buffers.safetensors")),
    ("run", "checkpoints/latest"),
]


@pytest.mark.parametrize("n", [FEW, pytest.param(MANY, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind, path", FILES)
def test_no_harm_is_read_as_sound(sound: dict[str, Path], tmp_path: Path, kind: str, path: str, n: int) -> None:
    folder = Path(shutil.copytree(sound[kind], tmp_path / kind))
    assert check_every_harm(folder / path, lambda: READ[kind](folder), n) > n // 4


@pytest.mark.parametrize("n", [3 * FEW, pytest.param(MANY, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "kind, path, within",
    [
        ("cells", "manifest.json", ""),
        ("latents", "manifest.json", ""),
        ("model", "config.json", ""),
        ("run", f"{STEP}/state.json", "state"),
    ],
)
def test_a_harm_whose_hash_agrees_is_taken_or_refused(
    sound: dict[str, Path], tmp_path: Path, kind: str, path: str, within: str, n: int
) -> None:
    folder = Path(shutil.copytree(sound[kind], tmp_path / kind))
    assert check_nothing_else_is_raised(folder / path, lambda: READ[kind](folder), within, n) > n // 4


def followed_run(at: Path) -> Path:
    """A run folder with all that verbs read of it. Nothing was trained."""
    at.mkdir()
    GENES.save(at / "genes.json")
    CONDITIONS.save(at / "conditions.json")
    start = {"time": "2026-01-01T00:00:00+00:00", "command": "scldm train vae vae/tiny", "host": "n1", "git": "0" * 40}
    of_set = {"name": "shards", "source": "shards", "digest": "0", "context": "training", "profile": {"n_cells": 3}}
    note = {**new_note("", "scldm", "vae"), "datasets": [of_set], "artifacts": [["plan.json", ""]]}
    for name, document in {
        "config.json": {"train": {"steps": 9, "global_batch": 4, "hang_s": 0}, "data": {"shards": "shards"}},
        "outcome.json": {"state": "failed", "exit_code": 1, "reason": "x", "time": "now"},
        "environment.json": [{**start, "slurm_job": None, "versions": {"torch": "2"}}],
        "tracked.json": note,
        "changes.json": [{"step": 3, "time": "now", "changed": {"optim.lr": [0.1, 0.2]}}],
        "gate.json": {"line": "better", "step": 3, "hash": "0", "passed": True},
        "missing.json": {"label": "none"},
        "encoded_from.json": {"vae": "../vae", "which": "best", "shards": "s3://a/shards"},
    }.items():
        (at / name).write_text(json.dumps(document))
    for name, document in {"slurm/job.json": {"id": "7", "words": []}, "chain/chain.json": [str(at / "slurm")]}.items():
        (at / name).parent.mkdir()
        (at / name).write_text(json.dumps(document))
    has = {"uri": "x", "run_id": "1", "sent": {"metrics.jsonl": 0}, "artifacts": {"plan.json": [3, 4]}}
    (at / "mlflow_run.json").write_text(json.dumps({**has, "datasets": [of_set], "refused": {"tags a": 1}}))
    (at / "evaluation.json").write_text(json.dumps({"made_with": {"vae": "x", "model": ""}, "vae": {"folder": "x"}}))
    (at / "nonfinite.jsonl").write_text(json.dumps({"step": 3, "rank": 0, "what": "loss nan", "cells": []}) + "\n")
    row = {"step": 3, "split": "train", "loss": 1.0, "cells_per_s": 2.0, "cells_seen": 12, "time": 1.0}
    (at / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return at


def told_of_run(run: Path) -> Any:
    """As `scldm status`, `report` and `track replay` read it."""
    return state_of_run(run), training(run, with_outcome=True), facts(run)["headline"], unsent(run)


def begun_latents(at: Path) -> Path:
    """An unfinished set of latents."""
    with closing(ShardSet(str(small(at / "cells")))) as cells:
        writer = LatentWriter(at / "l", cells, "v", (2, 3))
        with writer.begun():
            writer.write_shard(0, np.ones((cells.manifest.shards[0].n_cells, 2, 3), np.float32))
        return at / "l"


def written_latents(folder: Path) -> Any:
    with closing(ShardSet(str(folder.parent / "cells"))) as cells:
        return LatentWriter(folder, cells, "v", (2, 3)).written(0)


def begun_shards(at: Path) -> Path:
    """The work folder of a set whose end was never reached."""
    at.mkdir()
    small_cells(12).write_h5ad(at / "a.h5ad")
    source, split = SourceConfig(paths=(str(at / "a.h5ad"),)), SplitConfig(validation=0, test=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_shards, "finish_set", Mock(side_effect=InterruptedError))
        with pytest.raises(InterruptedError):
            write_shards.write_shards(ShardsWriteConfig(str(at / "set"), source=source, split=split))
    return at / "set" / ".work"


def unfinished_latents(folder: Path) -> Any:
    with closing(ShardSet(str(folder.parent / "cells"))) as cells:
        return LatentWriter(folder, cells, "v", (2, 3)).identity


def begun_cells(at: Path) -> Path:
    at.mkdir()
    with cells_in(at).begun():
        return at


def cells_in(folder: Path) -> CellWriter:
    return CellWriter(folder / "o.h5ad", 3, ["a"], np.int32, {"model": "m", "sampler": json.dumps({"n_steps": 2})})


def began_as(folder: Path) -> dict[str, Any]:
    return read_sealed(dict[str, Any], folder / "o.h5ad.parts" / "made_by.json")


def begun_quickstart(at: Path) -> Path:
    quickstart.open_folder(QuickstartConfig(), at)
    return at


@pytest.mark.parametrize("n", [FEW, pytest.param(MANY, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "make, path, read",
    [
        *((followed_run, f"{name}.json", told_of_run) for name in ("config", "outcome", "environment", "tracked")),
        *((followed_run, f"{name}.json", told_of_run) for name in ("changes", "gate")),
        *((followed_run, f"{name}.json", kept_data) for name in ("genes", "missing", "conditions")),
        (followed_run, "encoded_from.json", encoded_from),
        (followed_run, "slurm/job.json", lambda run: submitted(run / "slurm")),
        (followed_run, "chain/chain.json", lambda run: find_notes(run / "chain")),
        (followed_run, "evaluation.json", lambda run: list(evaluations(run))),
        (begun_quickstart, "quickstart.json", lambda folder: quickstart.open_folder(QuickstartConfig(), folder)),
    ],
)
def test_a_harmed_file_of_a_verb_is_taken_or_refused(tmp_path: Path, make, path: str, read, n: int) -> None:
    folder = make(tmp_path / "at")
    read(folder)
    assert check_taken_or_refused(folder / path, lambda: read(folder), n) > n // 8


@pytest.mark.parametrize("n", [FEW, pytest.param(MANY, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "make, path, read",
    [
        (begun_latents, "parts/set.json", lambda folder: (noted(folder), unfinished_latents(folder))),
        (begun_latents, "parts/000000.json", written_latents),
        (begun_shards, "plan/plan.json", lambda work: str(Plan.load(work / "plan"))),
        (begun_shards, "plan/gene_ids.0.json", lambda work: Plan.load(work / "plan").gene_ids(0)),
        (begun_shards, "genes.json", ChosenGenes.load),
        (begun_shards, "layout.json", lambda work: str(Layout.load(work))),
        (begun_cells, "o.h5ad.parts/made_by.json", lambda folder: (cells_in(folder).missing, began_as(folder))),
    ],
)
def test_no_harmed_file_of_unfinished_work_is_read_as_sound(tmp_path: Path, make, path: str, read, n: int) -> None:
    folder = make(tmp_path / "at")
    assert check_every_harm(folder / path, lambda: read(folder), n) > n // 4
    assert check_nothing_else_is_raised(folder / path, lambda: read(folder), "", n) > n // 8


@pytest.mark.parametrize("n", [FEW, pytest.param(MANY, marks=pytest.mark.exhaustive)])
def test_a_harmed_note_of_what_mlflow_has_is_taken_or_counts_as_none(tmp_path: Path, n: int) -> None:
    run = followed_run(tmp_path / "at")
    whole, found = unsent(run), list[Any]()

    def read() -> None:
        found.append(unsent(run))

    assert check_taken_or_refused(run / "mlflow_run.json", read, n) == 0
    (run / "mlflow_run.json").unlink()
    assert unsent(run) in found
    assert whole in found


@pytest.mark.parametrize("n", [FEW, pytest.param(MANY, marks=pytest.mark.exhaustive)])
def test_a_set_that_is_described_is_taken_or_refused(tmp_path: Path, n: int) -> None:
    """`shards info`, its page, and `shards write` over a finished set."""
    folder = small(tmp_path / "set")
    path = folder / "manifest.json"
    source = SourceSpec("h5ad", "cells.h5ad", "X", 100, 60, 3.0)
    genes = {"not_in_vocabulary": {"cells.h5ad": 3}, "without_name": {"cells.h5ad": 1}}
    query = settings_of(ShardsWriteConfig(str(folder)))
    said = {"sources": [{**source.to_json(), "n_cells": 100}], "report": {"genes": genes}, "query": query}
    said |= {"split_rule": {"validation": 0.1, "stratify": ["type"]}}
    whole = {key: of for key, of in json.loads(path.read_text()).items() if key != "sha256"} | said
    path.write_text(json.dumps(sealed(whole)))

    def read() -> Any:
        manifest = read_manifest(str(folder))
        list(report_lines(manifest))
        finished_set(ShardsWriteConfig(str(folder)))
        return describe_text(str(folder), manifest).encode(), describe_html(str(folder), manifest).encode()

    read()
    rng, n_refused = np.random.default_rng(0), 0
    for k in range(n):
        harmed = harmed_json({key: whole[key] for key in ("sources", "report", "split_rule", "query")}, rng)
        path.write_text(json.dumps(sealed({**whole, **harmed})))
        n_refused += bool(outcome(path, read, f"harm {k}, {json.dumps(harmed)[:300]}")[1])
    assert n_refused > n // 8


@pytest.mark.parametrize("text", ["../../model", "/etc", "step-1", "step-00000002/../..", "", "step-00000002\nx"])
def test_a_pointer_names_a_checkpoint_beside_it(sound: dict[str, Path], tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(sound["run"], tmp_path / "run"))
    for which in ("best", "latest"):
        (folder / "checkpoints" / which).write_text(text)
        with pytest.raises(InputError, match=f"checkpoints/{which} is damaged: it holds "):
            read_ema(folder, which)


@pytest.mark.parametrize("name", ["n" * 256, "a/" * 1_001, "a\0b"])
def test_a_path_that_no_file_system_takes_is_refused_with_the_file_that_says_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"made_with": {"model": name}}))
    with pytest.raises(
        InputError, match=r"evaluation.json: made_with: model is .* must be a path of at most 2,000 bytes"
    ):
        list(evaluations(tmp_path))
