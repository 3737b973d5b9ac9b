"""The `scldm` command: verbs, exit codes, one line for a mistake, and help that is true of every verb."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import cli
from launch.config import flatten
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
    monkeypatch.setitem(cli.VERBS, "try it", ("launch.try_it", "try"))
    return ran


def test_a_verb_runs_with_its_config(a_verb: list[TryConfig]) -> None:
    assert cli.main(["try", "it", "mode=x"]) == 0
    assert a_verb == [TryConfig("x")]


@pytest.mark.parametrize(
    "words, said",
    [
        (["try", "it", "mode=mistake"], "scldm try it: error: mode: 'mistake' can't be; use pass"),
        (["try", "it", "mod=x"], "scldm try it: error: mod=x: unknown key 'mod'; did you mean mode?"),
        (["try", "it", "vae/none"], "scldm try it: error: preset 'vae/none' is unknown"),
        (["try", "it", "mode=missing"], "scldm try it: error: the package deepspeed is missing"),
        (["nothing"], "scldm: error: unknown verb 'nothing'; there are: "),
        (["try"], "scldm: error: unknown verb 'try'; there are: try it"),
        (["train", "gan"], "scldm: error: unknown verb 'train gan'; there are: train vae, train ldm"),
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
    assert a_verb == []


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_says_what_it_is(verb: str, capsys: pytest.CaptureFixture) -> None:
    module = importlib.import_module(cli.VERBS[verb][0])
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
        cli.config_of(importlib.import_module(cli.VERBS[named][0]), rest)
    assert verb in verbs, f"{verb}: its example does not show it"


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "launch.cli", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
