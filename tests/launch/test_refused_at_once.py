"""What a command line says wrong is refused before a package is imported that takes seconds: by its words, by the names
in small files, and by h5py alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from launch.together import WRITES
from launch.verbs import VERBS
from scldm.train.tracked import new_note
from scldm.vocab import GeneVocab

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("anndata", "mlflow", "numba", "pandas", "scanpy", "scipy", "sklearn", "tiledbsoma", "torch", "zarr")
# runs each command line in a fork of one process, and prints its exit code, its last words and what it imported
CODE = f"""
import json, os, sys
sys.modules["mlflow"] = None  # as where it is not installed
from launch.cli import main
for words in json.load(sys.stdin):
    if not (child := os.fork()):
        log = os.open("log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        out = os.dup(1)
        os.dup2(log, 1), os.dup2(log, 2)
        try:
            code = main(words)
        except SystemExit as error:
            code = error.code
        sys.stdout.flush(), sys.stderr.flush()
        said = open("log").read().splitlines()[-1:]
        os.write(out, (json.dumps([code, said, [m for m in {HEAVY} if sys.modules.get(m)]]) + "\\n").encode())
        os._exit(0)
    os.waitpid(child, 0)
"""
NO_RUN, NO_MODEL = "none is not a run folder: it has no config.json", "none is not a model folder: it has no config"
A_MODEL, NO_SET = "model=model h5ad=cells.h5ad out=o.h5ad ", "none: no manifest.json: not a shard set"
GENERATE, JUDGE = "generate model=model out=o.h5ad ", "evaluate generated=cells.h5ad out=o "
TRAIN = "train vae vae/tiny hardware/cpu data.shards=shards run_dir=o "
SHARDS = "shards write source.paths=cells.h5ad out=o "
ALONE = "this model folder holds an autoencoder alone: it embeds, but does not generate"
CASES = [
    ("evaluate vae=vae shards=shards protocol=cfgen", "protocol=cfgen has no effect with vae="),
    (JUDGE + "shards=shards split=part", "split=part has no effect with generated= without real="),
    (JUDGE, "give real cells once"),
    (JUDGE + "real=none.h5ad", "none.h5ad: no such file"),
    (JUDGE + "shards=none", NO_SET),
    (JUDGE + "shards=shards model=none", NO_MODEL),
    (JUDGE + "shards=shards ldm=none", "ldm=none: no metrics.jsonl with metrics in it"),
    (JUDGE + "shards=shards conditions=typ", "cells.h5ad: obs has no column condition='typ'. It has type, batch"),
    (JUDGE + "shards=shards conditions=batch", "shards has no condition='batch'. It has type"),
    (JUDGE + "real=cells.h5ad split=part", "cells.h5ad: obs has no column split='part'. It has type, batch"),
    (JUDGE + "shards=latents", "latents: a set of latents, not of cells"),
    (JUDGE + "shards=shards model=vae", "vae is not a model folder: its config.json is no model's"),
    (JUDGE + "shards=shards control.typ=B", "shards has no condition='typ'. It has type"),
    (JUDGE + "real=cells.h5ad split=type conditions=type control.batch=1", "control.batch=1: the conditions are type"),
    (JUDGE + "shards=shards model=model control.batch=1", "control.batch=1: the conditions are type"),
    ("evaluate vae=vae shards=shards published=mars", "published='mars' must be one of dentate_gyrus"),
    ("evaluate embedding=cells.h5ad label=type key=X_pca", "cells.h5ad: obsm has no key=X_pca. It has X_scldm"),
    (JUDGE + "real=cells.h5ad split=type layer=umis", "cells.h5ad: layer='umis' is not in the file"),
    ("evaluate vae=none shards=shards", NO_RUN),
    ("evaluate vae=ldm shards=shards", "vae=ldm is a run of `scldm train ldm`, not of `scldm train vae`"),
    ("evaluate embedding=cells.h5ad label=typ", "cells.h5ad: obs has no column label='typ'. It has type, batch"),
    ("checkpoint inspect at=none", "none is neither a checkpoint nor the folder of a run that has one"),
    ("checkpoint inspect at=vae which=7", "vae has no checkpoint which=7. It has steps 5"),
    ("checkpoint verify at=ldm", "ldm is neither a checkpoint nor the folder of a run that has one"),
    ("checkpoint convert at=none out=o", "none is neither a checkpoint nor the folder"),
    ("checkpoint convert at=vae out=o file_gb=1 to=dcp", "file_gb=1 is for to=safetensors, not for to=dcp"),
    ("shards write source.paths=none.h5ad out=o", "source.paths: none.h5ad: no such file"),
    ("shards write source.paths=none out=o", "source.paths: none: no such file or folder"),
    ("shards write source.paths=n*.h5ad out=o", "source.paths: n*.h5ad: no file matches"),
    ("shards write source.paths=wanted.csv out=o", "wanted.csv: a table, no AnnData file"),
    (SHARDS + "conditions=typ", "cells.h5ad: obs has no column 'typ'. It has type, batch"),
    (SHARDS + "source.layer=umis", "cells.h5ad: source.layer='umis' is not in the file. It has X, layers/counts"),
    (SHARDS + "source.gene_column=id", "cells.h5ad: var has no column 'id'. It has name"),
    (SHARDS + "split.by=donor", "cells.h5ad: obs has no column 'donor'. It has type, batch"),
    (SHARDS + "filter.gene_list=none.txt", "filter.gene_list: none.txt: no such file"),
    (SHARDS + "split.validation=0.6 split.test=0.6", "must add up to below 1"),
    (SHARDS + "memory=lots", "memory='lots' is no amount of memory"),
    (SHARDS + "memory=inf", "memory='inf' is no amount of memory"),
    (SHARDS + "memory=1MB", "memory=1MB is too little for workers=1"),
    ("shards verify path=none", NO_SET),
    ("shards info path=none", NO_SET),
    ("soma write h5ad=none.h5ad out=o", "none.h5ad: no such file"),
    ("quickstart h5ad=cells.h5ad condition=typ out=o", "condition=typ: obs of cells.h5ad has no such column. It has"),
    ("soma write h5ad=cells.h5ad out=vae", "out=vae: exists. A SOMA collection is written to a new folder"),
    ("soma write h5ad=cells.h5ad out=o layer=umis", "cells.h5ad: layer='umis' is not in the file"),
    ("soma write h5ad=cells.h5ad out=o gene_column=id", "cells.h5ad: var has no column 'id'. It has name"),
    ("quickstart h5ad=cells.h5ad condition=type layer=umis out=o", "cells.h5ad: layer='umis' is not in the file"),
    ("quickstart h5ad=cells.h5ad out=o", "h5ad and condition go together"),
    ("quickstart h5ad=cells.h5ad condition=type out=vae", "vae is not empty and not a quickstart's folder"),
    ("submit train vae vae/tiny data.shards=shards run_dir=o", "there is no Slurm on this machine"),
    ("submit shards write source.paths=none.h5ad out=o", "source.paths: none.h5ad: no such file"),
    ("submit pipeline out=o shards.source.paths=none.h5ad generate.n=3", "source.paths: none.h5ad: no such file"),
    (TRAIN.replace("shards=shards", "shards=none"), NO_SET),
    (TRAIN.replace("shards=shards", "shards=latents"), "latents: a set of latents, not of cells"),
    (TRAIN + "init_from=none", NO_MODEL),
    (TRAIN + "data.balance=typ", "balance: condition 'typ' is unknown. The set has type"),
    (TRAIN + "data.select.typ=B", "condition 'typ' is unknown. The model knows type"),
    (TRAIN + "data.select.type=NK", "condition 'type' has no label 'NK'"),
    (TRAIN + "branch_from=vae", "branch_from=vae must be RUN@STEP, with a step"),
    (TRAIN + "branch_from=none@5", "none is not a run folder: it has no config.json"),
    (TRAIN + "branch_from=vae@7", "the run has no checkpoint of step 7. There are 5"),
    (TRAIN.replace("run_dir=o", "run_dir=ldm"), "ldm holds another run, of `scldm train ldm`"),
    (
        "train ldm ldm/tiny data.shards=latents run_dir=o label_embeddings.typ=cells.h5ad",
        "label_embeddings.typ=cells.h5ad: condition 'typ' is unknown. The set has type",
    ),
    (
        "train ldm ldm/tiny data.shards=latents run_dir=o label_embeddings.type=none.csv",
        "label_embeddings: none.csv: no such file",
    ),
    (TRAIN + "model.width=10 model.n_heads=3", "model.n_heads=3 does not divide model.width=10"),
    (
        TRAIN + "data.given.policy=all data.given.share=1 data.given.n_genes=3",
        "has no effect with data.given.policy=all",
    ),
    ("train ldm ldm/tiny data.shards=shards run_dir=o", "shards: a set of cells, not of latents"),
    ("train ldm ldm/tiny data.shards=shards vae=ldm run_dir=o", "vae=ldm is a run of `scldm train ldm`"),
    ("encode vae=none shards=shards out=o", NO_RUN),
    ("encode vae=vae shards=latents out=o", "latents: a set of latents, not of cells"),
    ("encode vae=vae shards=shards out=o genes.share=0.5", "genes.share=0.5 has no effect with genes.policy=all"),
    ("export vae=vae ldm=vae out=o", "ldm=vae is not a run of `scldm train ldm`"),
    ("encode vae=vae shards=shards out=shards", "shards: a set of cells, not of latents"),
    ("export vae=vae out=o register=x", "register=x needs ldm"),
    ("export vae=vae ldm=ldm out=o register=a/b", "register='a/b': give a name of at most 256 printable letters"),
    ("export vae=vae ldm=ldm out=o register=x alias=V1", "alias='V1': give letters"),
    ("export vae=vae out=latents", "latents is not empty and not a model folder. Choose another out"),
    ("export vae=vae out=ldm", "ldm holds latents.json, which is none of a model's files"),
    ("export vae=vae ldm=ldm out=o register=x", "register: ldm was trained without MLflow: it has no tracked.json"),
    ("export vae=vae ldm=followed out=o register=x", "the package mlflow is missing"),
    ("checkpoint convert at=vae out=/proc/new.pt", "out=/proc/new.pt: /proc can't be written to"),
    ("embed out=/proc/new.h5ad model=model h5ad=cells.h5ad", "out=/proc/new.h5ad: /proc can't be written to"),
    ("encode vae=vae shards=shards out=wanted.csv/new", "wanted.csv can't be written to"),
    ("evaluate generated=cells.h5ad shards=shards out=/proc/new", "out=/proc/new: /proc can't be written to"),
    ("evaluate generated=cells.h5ad shards=shards out=wanted.csv", "wanted.csv can't be written to"),
    ("evaluate vae=vae shards=shards out=/proc/new", "out=/proc/new: /proc can't be written to"),
    ("export vae=vae out=/proc/new", "out=/proc/new: /proc can't be written to"),
    ("quickstart out=/proc/new", "out=/proc/new: /proc can't be written to"),
    ("report vae out=/proc/new.html", "out=/proc/new.html: /proc can't be written to"),
    ("report vae out=vae", "out=vae is a folder. Name the file to write, such as out=vae/page.html"),
    ("report vae out=vae/config.json", "out=vae/config.json exists and is no HTML page, which would be lost"),
    ("report vae out=cells.h5ad", "out=cells.h5ad exists and is no HTML page"),
    ("shards info path=shards html=shards/manifest.json", "html=shards/manifest.json exists and is no HTML page"),
    ("shards info path=shards html=/proc/new", "html=/proc/new: /proc can't be written to"),
    ("checkpoint convert at=vae which=5 out=vae/config.json", "out=vae/config.json exists already"),
    ("shards write source.paths=cells.h5ad out=/proc/new", "out=/proc/new: /proc can't be written to"),
    ("soma write h5ad=cells.h5ad out=/proc/new", "out=/proc/new: /proc can't be written to"),
    ("train vae vae/tiny data.shards=shards run_dir=/proc/new", "run_dir=/proc/new: /proc can't be written to"),
    ("generate model=vae n=3 out=o.h5ad", "vae is not a model folder: its config.json is no model's"),
    ("generate model=part n=3 out=o.h5ad", ALONE),
    (GENERATE, "give exactly one of conditions, like, shards and n. Given: none"),
    ("generate model=model n=3 out=o.csv", "out=o.csv must end in .h5ad, .zarr, .soma"),
    (GENERATE + "conditions=none.csv", "conditions=none.csv: no such file"),
    (GENERATE + "conditions=wanted.csv", "condition 'type' has no label 'NK'. It has 'B', 'T'"),
    (GENERATE + "conditions=cells.h5ad", "conditions=cells.h5ad: not a readable CSV file"),
    (GENERATE + "conditions=marked.csv", "condition 'type' has no label 'NK'"),
    (GENERATE + "conditions=other.csv", "condition 'typ' is unknown. The model knows type"),
    (GENERATE + "like=cells.h5ad", "like needs by"),
    (GENERATE + "like=cells.h5ad by=typ", "cells.h5ad: obs has no column 'typ'. It has type, batch"),
    (GENERATE + "like=cells.h5ad by=batch", "condition 'batch' is unknown. The model knows type"),
    *(
        (f"{verb} device=gpu", "device=gpu: torch knows cpu, cuda, cuda:1")
        for verb in (GENERATE + "n=3", "embed " + A_MODEL)
    ),
    ("reconstruct device=cuda1 " + A_MODEL, "device=cuda1: torch knows cpu, cuda, cuda:1"),
    ("transform to=type=B device=CPU " + A_MODEL, "device=CPU: torch knows cpu, cuda, cuda:1"),
    (JUDGE + "shards=shards model=model device=cuda:", "device=cuda:: torch knows cpu, cuda, cuda:1"),
    (GENERATE + "n=3 genes=g9", "gene 'g9' is not among the model's 2"),
    (GENERATE + "n=3 sampler.guidance_from=0.8 sampler.guidance_to=0.2", "must be 0 <= from < to <= 1"),
    ("transform to=type " + A_MODEL, "to=type must be CONDITION=LABEL"),
    ("transform to=type=NK " + A_MODEL, "condition 'type' has no label 'NK'"),
    ("transform to=typ=B " + A_MODEL, "condition 'typ' is unknown. The model knows type"),
    ("transform to=type=B genes=g9 " + A_MODEL, "gene 'g9' is not among the model's 2"),
    ("embed out=cells.h5ad model=model h5ad=cells.h5ad", "out=cells.h5ad is h5ad=cells.h5ad, which would be lost"),
    ("embed model=model h5ad=wanted.csv out=o.h5ad", "wanted.csv: a table, no AnnData file"),
    ("embed layer=raw " + A_MODEL, "cells.h5ad: layer='raw' is not in the file. It has X, layers/counts"),
    ("reconstruct layer=umis " + A_MODEL, "cells.h5ad: layer='umis' is not in the file"),
    ("transform to=type=B layer=umis " + A_MODEL, "cells.h5ad: layer='umis' is not in the file"),
    ("reconstruct genes=g9 " + A_MODEL, "gene 'g9' is not among the model's 2"),
    ("plan vae/tiny", "n_genes=0: give it, or data.shards"),
    ("plan vae/tiny data.shards=none", NO_SET),
    ("status none", "none: no job was submitted for it"),
    ("logs none", "none: no job was submitted for it"),
    ("report none", NO_RUN),
    ("track replay none", "none: no run there is followed in MLflow"),
    ("completion fish", "shell=fish: Invalid value 'fish'"),
]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """What each command line ended with, in a folder that has what is right in it."""
    at = tmp_path_factory.mktemp("refused")
    model = {"format_version": 4, "ldm": {"width": 8}, "conditions": ["type"]}
    of_set = {"conditions": {"type": ["B", "T"]}}
    for name, document in {
        **{f"{run}/config.json": {} for run in ("vae", "ldm")},
        "vae/checkpoints/step-00000005/state.json": {},
        "ldm/latents.json": {},
        **{f"followed/{file}.json": {} for file in ("config", "latents")},
        "followed/tracked.json": new_note("", "scldm", "ldm"),
        "shards/manifest.json": {**of_set, "kind": "cells"},
        "latents/manifest.json": {**of_set, "kind": "latents"},
        "model/config.json": model,
        "model/conditions.json": of_set["conditions"],
        "part/config.json": {**model, "ldm": None},
    }.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_text(json.dumps(document))
    GeneVocab(("g0", "g1"), "symbol").save(at / "model" / "genes.json")
    (at / "wanted.csv").write_text("type,n_cells\nB,2\nNK,3\n")
    (at / "marked.csv").write_text("\ufefftype\nNK\n")  # as a spreadsheet marks UTF-8
    (at / "other.csv").write_text("typ\nB\n")
    with h5py.File(at / "cells.h5ad", "w") as file:
        obs = file.create_group("obs")
        obs.attrs["column-order"] = ["type", "batch"]
        obs["type"], obs["batch"] = [0], [0]
        file["obsm/X_scldm"] = file["X"] = file["layers/counts"] = [[0.0]]
        var = file.create_group("var")
        var.attrs["column-order"] = ["name"]
        var["name"] = [0]
    words = [line.split() for line, _ in CASES]
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=at, input=json.dumps(words), capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": str(at), "HOME": str(at)},
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(CASES), done.stderr
    return {line: tuple(answer) for (line, _), answer in zip(CASES, answers, strict=True)}


@pytest.mark.parametrize("line, message", CASES)
def test_it_is_refused_without_a_package(said: dict, line: str, message: str) -> None:
    code, words, imported = said[line]
    assert code == (1 if line.startswith("track") else 2)
    assert message in words[0]
    assert imported == []


def test_every_verb_is_among_them() -> None:
    assert {verb for verb in VERBS if not any(f"{line} ".startswith(f"{verb} ") for line, _ in CASES)} == set()


def test_the_endings_are_those_of_what_writes() -> None:
    from data_pipeline.write_cells import FORMATS

    assert tuple(FORMATS) == WRITES["generate"]
