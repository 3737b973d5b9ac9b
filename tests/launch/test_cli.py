"""The `scldm` command: verbs, exit codes, one line for a mistake, and help that is true of every verb."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pytest

import scldm
from launch import cli, keys
from launch.completion import script
from launch.config import compose, flatten
from launch.verbs import VERBS
from scldm.errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class TryConfig:
    """A verb's config.

    mode: what to do
    """

    mode: str = "pass"


@pytest.fixture
def a_verb(monkeypatch: pytest.MonkeyPatch) -> list[TryConfig]:
    """The verb `try it`, which notes the configs that it ran with."""
    ran: list[TryConfig] = []

    def main(config: TryConfig) -> None:
        ran.append(config)
        if config.mode == "mistake":
            raise InputError("mode: 'mistake' can't be; use pass")
        if config.mode == "missing":
            raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")
        if config.mode == "ours":
            raise ModuleNotFoundError("No module named 'scldm.gone'", name="scldm.gone")
        if config.mode == "bug":
            raise ZeroDivisionError

    module = types.ModuleType("launch.try_it")
    vars(module).update(PURPOSE="Tries.", EXAMPLE="scldm try it mode=pass", CONFIG=TryConfig, main=main)
    monkeypatch.setitem(sys.modules, "launch.try_it", module)
    monkeypatch.setitem(VERBS, "try it", ("launch.try_it", "try"))
    return ran


def test_a_verb_runs_with_its_config(a_verb: list[TryConfig]) -> None:
    assert cli.main(["try", "it", "mode=x"]) == 0
    assert a_verb == [TryConfig("x")]


@pytest.mark.parametrize(
    "words, said",
    [
        (["try", "it", "mode=mistake"], "scldm try it: error: mode: 'mistake' can't be; use pass"),
        (["try", "it", "mod=x"], "scldm try it: error: mod=x: unknown key 'mod'. Did you mean mode?"),
        (["try", "it", "vae/none"], "scldm try it: error: preset 'vae/none' is unknown"),
        (["try", "it", "mode=missing"], "scldm try it: error: the package deepspeed is missing"),
        (["nothing"], "scldm: error: unknown verb 'nothing'. There are: "),
        (["try"], "scldm: error: unknown verb 'try'. There are: try it"),
        (["train", "gan"], "scldm: error: unknown verb 'train gan'. There are: train vae, train ldm"),
        (["train", "vea"], "scldm: error: unknown verb 'train vea'. Did you mean train vae? There are: train vae,"),
        (["genrate"], "scldm: error: unknown verb 'genrate'. Did you mean generate? There are: "),
        (["trainvae"], "scldm: error: unknown verb 'trainvae'. Did you mean train vae? There are: "),
        (["embed", "vae/tiny"], "scldm embed: error: preset 'vae/tiny' is not for scldm embed. It takes none"),
        (
            ["train", "ldm", "vae/tiny"],
            "scldm train ldm: error: preset 'vae/tiny' is not for scldm train ldm. It takes",
        ),
    ],
)
def test_a_mistake_exits_2_with_one_line(a_verb, capsys: pytest.CaptureFixture, words: list[str], said: str) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith(said)
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("mode, error", [("bug", ZeroDivisionError), ("ours", ModuleNotFoundError)])
def test_a_bug_of_ours_keeps_its_traceback(a_verb: list[TryConfig], mode: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        cli.main(["try", "it", f"mode={mode}"])


def test_help_runs_nothing(a_verb: list[TryConfig], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["try", "it", "mode=x", "--help"]) == 0
    assert "mode  [str; pass]\n      what to do" in capsys.readouterr().out
    assert cli.main([]) == cli.main(["--help"]) == 0
    assert capsys.readouterr().out.count("train vae") == 2
    assert cli.main(["help", "try", "it"]) == cli.main(["help"]) == 0
    out = capsys.readouterr().out
    assert "usage: scldm try it [key=value ...]" in out
    assert "verbs (scldm help VERB" in out
    assert a_verb == []


def test_the_version_is_that_of_the_library(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"scldm {scldm.__version__}\n"


@pytest.mark.heavy
def test_what_the_words_alone_say_is_refused_before_torch_is_imported() -> None:
    code = "import sys; from launch.cli import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    for words in (
        *(["trian"], ["train", "vae", "vae/tinny"], ["embed", "vae/tiny"], ["generate", "model=m", "word"]),
        *(["status", "nothing"], ["logs", "nothing"], ["--version"]),
    ):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"{0 if words == ['--version'] else 2} False", done.stderr


def test_the_keys_that_matter_most_are_ten_at_most() -> None:
    for module_name, _ in VERBS.values():
        module = importlib.import_module(module_name)
        first = getattr(module, "FIRST", ())
        assert len(first) == len(set(first)) <= 10, module_name
        assert first or len(flatten(module.CONFIG)) <= 10, (
            f"{module_name} has many keys, and says of none that it matters"
        )


def test_presets_are_listed_where_they_are_for(capsys: pytest.CaptureFixture) -> None:
    assert cli.run_verb("train vae", ["--help"]) == cli.run_verb("embed", ["--help"]) == 0
    train, embed = capsys.readouterr().out.split("usage: ")[1:]
    assert re.search(r"^  vae/tiny +A small autoencoder for a CPU", train, re.MULTILINE)
    assert "ldm/tiny" not in train
    assert "presets" not in embed


@pytest.mark.parametrize(
    "words, found",
    [
        (["tr"], ["train", "transform", "track"]),
        (["train", ""], ["vae", "ldm"]),
        (["train", "vae", "vae/t"], ["vae/tiny"]),
        (["train", "vae", "vae/tiny", "train.ste"], ["train.steps="]),
        (["generate", "ldm/"], []),
        (["completion", "z"], ["zsh"]),
    ],
)
def test_bash_completes(completion: Path, words: list[str], found: list[str]) -> None:
    code = 'source "$1"; shift; COMP_WORDS=(scldm "$@"); COMP_CWORD=$#; _scldm; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", code, "-", str(completion), *words], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (found, "")


@pytest.fixture(scope="module")
def completion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "scldm.bash"
    path.write_text(script("bash"))
    return path


def test_zsh_runs_the_same_function() -> None:
    assert script("zsh") == "autoload -U +X bashcompinit && bashcompinit\n" + script("bash")


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_says_what_it_is(verb: str, capsys: pytest.CaptureFixture) -> None:
    module = importlib.import_module(VERBS[verb][0])
    assert cli.run_verb(verb, ["--help"]) == 0
    text = capsys.readouterr().out
    for key, kind, default, meaning in flatten(module.CONFIG):
        assert meaning, f"{verb}: {key} has no line in its config's docstring"
        assert f"{key}  [{kind}; {default}]" in text
    example = module.EXAMPLE.replace("bash launch/quickstart.sh", "scldm quickstart").replace("\\\n", " ")
    commands = [shlex.split(line) for line in example.splitlines() if line.strip().startswith("scldm ")]
    verbs = []
    for command in commands:
        named, rest = cli.find_verb(command[1:])
        assert named is not None
        verbs.append(named)
        cli.config_of(importlib.import_module(VERBS[named][0]), rest)
    assert verb in verbs, f"{verb}: its example does not show it"


@pytest.mark.parametrize("verb", ["train vae", "train ldm", "plan", "generate"])
def test_help_shows_the_defaults_that_are_taken(verb: str) -> None:
    """A verb's group of keys may have other defaults than the group by itself."""
    schema = importlib.import_module(VERBS[verb][0]).CONFIG
    rows = flatten(schema)
    given = [f"{key}=1" for key, _, default, _ in rows if default == "required"]
    config = compose(schema, [*given, *(["n=1"] if verb == "generate" else [])])
    shown = {key: default for key, _, default, _ in rows if default != "required" and key != "n"}
    taken = {key: functools.reduce(getattr, key.split("."), config) for key in shown}
    assert {
        key: text for key, text in shown.items() if text not in (str(taken[key]) or "empty", repr(taken[key]))
    } == {}
    assert verb != "train ldm" or shown["optim.lr"] == "0.0005"


def test_a_set_below_the_home_folder_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").touch()
    keys.check_words("shards info", ["path=~/set"])
    with pytest.raises(InputError, match="^~/none: no manifest.json"):
        keys.check_words("shards info", ["path=~/none"])


def test_every_kind_of_a_key_is_known() -> None:
    kinds = {kind.partition(keys.BOUNDS)[0] for verb in VERBS for kind, *_ in keys.kinds_of(verb).values()}
    unknown = {kind for kind in kinds if keys._kind(kind) is Any}
    assert unknown == {"tuple[float, float]", "dict[str, Any]"}


@pytest.mark.heavy
def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "launch.cli", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")


# --- words, before anything is imported ---

A_RUN = "data.shards=there run_dir=r"


def test_the_keys_of_the_file_are_those_of_the_configs() -> None:
    assert json.loads(keys.PATH.read_text()) == keys.found(), "python -m launch.keys writes them anew"


@pytest.mark.parametrize(
    "verb, word, said",
    [
        ("train vae", "train.stepz=1", "train.stepz=1: unknown key 'train.stepz'. Did you mean train.steps"),
        ("evaluate", "contrl.treatment=ctrl", "unknown key 'contrl.treatment'"),
        ("train ldm", "model.width.x=1", "unknown key 'model.width.x'"),
        ("generate", "path=model", "Files and folders are named by model=, shards=, like=, out= here"),
        ("checkpoint verify", "run_dir=runs/vae", "unknown key 'run_dir'. Files and folders are named by at= here"),
        ("shards info", "shards=x", "Files and folders are named by path= here"),
        ("train vae", "shards=x", "Did you mean data.shards?"),
        ("plan", "vae nonsense=1", "nonsense=1: unknown key 'nonsense'"),
        ("plan", "n_genes=3", "say what is trained, `scldm plan vae ...` or `scldm plan ldm ...`: no preset tells it"),
        ("plan", "vae/tiny n_genes=3 ldm/tiny", "the presets are of both"),
        ("plan", "ldm/tiny data.given.n_genes=3", "unknown key 'data.given.n_genes'"),
        ("plan", "vae vae/tiny hardware/cpu n_genes=many", "n_genes=many: Value 'many'"),
        ("plan", "vae/20m hardware.mfu=2", "hardware.mfu=2.0 must be above 0 and at most 1"),
        ("plan", "vae/tiny data.shards=on/the/cluster n_genes=3 n_cells=9 n_validation=1", ""),
        ("plan", "ldm hardware/cpu n_latents=3 latent_width=2 n_cells=9 hardware.nodes=4 compare=false", ""),
        ("evaluate", "generated=c.h5ad shards=there out=o control.treatment=ctrl", ""),
        ("evaluate", "generated=g.h5ad shards=there out=o", "error: g.h5ad: no such file"),
        ("evaluate", "generated=c.h5ad shards=there out=o 'control={treatment: ctrl}'", ""),
        ("train vae", f"--train '{{steps: 1}}' {A_RUN}", ""),
        ("train vae", f"vae/tiny hardware/cpu train.steps=1_000 --train.save-every 5 {A_RUN}", ""),
        ("train vae", f"data.select.tissue=lung,gut data.balance=[a,b] model.token=bins {A_RUN}", ""),
        ("train vae", "train.steps=1", "data.shards must be given, as data.shards=VALUE"),
        (
            "train vae",
            f"train.steps=many {A_RUN}",
            "train.steps=many: Value 'many' of type 'str' could not be converted",
        ),
        ("train vae", f"model.token=bin {A_RUN}", "Invalid value 'bin', expected one of ['bins', 'linear']"),
        ("train vae", f"cells.h5ad {A_RUN}", "'cells.h5ad' is no preset. There are hardware/cpu, "),
        ("embed", "cells.h5ad", "'cells.h5ad' is no preset. Files and folders are named by model=, h5ad=, out= here"),
        ("embed", "--model", "--model needs a value"),
        ("embed", "model=there h5ad=none.h5ad out=o.h5ad", "error: none.h5ad: no such file"),
        (
            "embed",
            "model=none h5ad=c.h5ad out=o.h5ad",
            "error: none is not a model folder: it has no config.json. `scldm export`",
        ),
        ("train vae", "data.shards=none run_dir=r", "error: none: no manifest.json: not a shard set"),
        ("train vae", "data.shards=s3://bucket/none run_dir=r", ""),
        ("train ldm", f"vae=none {A_RUN}", "error: none is not a run folder: it has no config.json"),
        ("embed", "--model there --h5ad c.h5ad --out o.h5ad --drop-empty", ""),
        ("embed", "--model there --h5ad data/none.h5ad --out o.h5ad", "error: data/none.h5ad: no such file"),
        ("train ldm", "--init-from ldm/first data.shards=there run_dir=r", ""),
        ("transform", "model=there h5ad=c.h5ad out=o.h5ad --to treatment=stim", ""),
        ("shards write", "--source.obs-filter \"tissue == 'blood'\" source.paths=c.h5ad --out a=b", ""),
        ("train vae", f"'data.select.age=>65' {A_RUN}", ""),
        ("status", "vae/run1", ""),
        ("train vae", f"train.steps=-1 {A_RUN}", "train.steps=-1 must be at least 1"),
        ("train vae", f"optim.lr=nan {A_RUN}", "optim.lr=nan must be a finite number, above 0"),
        ("train vae", f"hardware.zero_stage=4 {A_RUN}", "hardware.zero_stage=4 must be from 1 to 3"),
        ("evaluate", "shards=set", "give what is to be judged: generated=FILE"),
        ("evaluate", "generated=g.h5ad", "generated needs out=FOLDER"),
        ("evaluate", "vae=runs/vae", "give shards=FOLDER"),
        ("report", "there", ""),
        ("report", "there there/none", "error: there/none is not a run folder: it has no config.json"),
        ("report", "there run=there", "unknown key 'run'. Files and folders are named by runs=, out= here"),
        ("report", "", "runs must be given"),
        ("submit", "train vae vae/tinny", "preset 'vae/tinny' is unknown"),
        ("quickstart", f"--h5ad {__file__} --condition a --condition b --fresh", ""),
        ("transform", "model=there h5ad=c.h5ad out=o.h5ad to=drug=x,dose=1 alphas=0,1", ""),
    ],
)
def test_what_the_words_say_wrong_is_refused_before_anything_is_imported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    word: str,
    said: str,
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text('{"format_version": 4, "ldm": {"width": 1}}')
    (tmp_path / "there" / "conditions.json").write_text('{"treatment": ["stim"], "drug": ["x"], "dose": ["1"]}')
    conditions = {"treatment": [], "tissue": ["lung", "gut"], "age": [">65"], "a": [], "b": []}
    (tmp_path / "there" / "manifest.json").write_text(json.dumps({"conditions": conditions}))
    (tmp_path / "ldm" / "first").mkdir(parents=True)
    (tmp_path / "ldm" / "first" / "config.json").touch()
    with h5py.File(tmp_path / "c.h5ad", "w") as file:
        for name in ("treatment", "drug", "dose"):
            file[f"obs/{name}"] = [0]
    monkeypatch.chdir(tmp_path)

    class Begun(Exception):
        pass

    def begin(name: str) -> None:
        raise Begun

    monkeypatch.setattr(cli, "importlib", types.SimpleNamespace(import_module=begin))
    if not said:
        with pytest.raises(Begun):
            cli.run_verb(verb, shlex.split(word))
        return
    assert cli.run_verb(verb, shlex.split(word)) == 2
    assert said in capsys.readouterr().err


# --- what a disk or a reader does ---


NO_SPACE = "no space left (No space left on device). Make room, then run the same command again"


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(28, "No space left on device", "out.h5ad"), f"out.h5ad: {NO_SPACE}"),
        (OSError(28, "No space left on device"), f"made, or a temporary file: {NO_SPACE}"),
        (
            type("SafetensorError", (Exception,), {})("I/O error: (os error 28)"),
            f"made, or a temporary file: {NO_SPACE}",
        ),
        (OSError(30, "Read-only file system", "runs/vae"), "runs/vae: Read-only file system"),
        (PermissionError(13, "Permission denied", "out"), "out: Permission denied"),
        (IsADirectoryError(21, "Is a directory", "run/metrics.jsonl"), "run/metrics.jsonl: Is a directory"),
        (NotADirectoryError(20, "Not a directory", "a.h5ad/x"), "a.h5ad/x: Not a directory"),
        (OSError(36, "File name too long", "x" * 300), f"{'x' * 300}: File name too long"),
    ],
)
def test_a_disk_that_takes_nothing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError, said: str
) -> None:
    def fail(config: object) -> None:
        raise error

    module = types.SimpleNamespace(CONFIG=TryConfig, main=fail, read=lambda words: types.SimpleNamespace(out="made"))
    monkeypatch.setattr(cli, "importlib", types.SimpleNamespace(import_module=lambda name: module))
    assert cli.run("scldm try it", "launch.try_it", []) == 2
    assert capsys.readouterr().err == f"scldm try it: error: {said}\n"


@pytest.mark.heavy
def test_help_that_nobody_reads_to_the_end_is_no_error() -> None:
    code = f"{sys.executable} -m launch.cli help train vae | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
