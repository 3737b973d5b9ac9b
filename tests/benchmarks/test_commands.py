"""`python -m benchmarks.NAME`: help that says all, and examples that are taken."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest

import benchmarks
from launch import cli
from launch.config import flatten

FOLDER = Path(benchmarks.__file__).parent
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if 'run_benchmark("' in p.read_text())


def test_there_are_some() -> None:
    assert {"mcab", "vae_step", "loader", "train"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_says_what_it_is(name: str, capsys: pytest.CaptureFixture) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    command = f"python -m benchmarks.{name}"
    assert cli.run(command, module.__name__, ["--help"]) == 0
    text = capsys.readouterr().out
    for key, kind, default, meaning in flatten(module.CONFIG):
        assert meaning, f"{name}: {key} has no line in its config's docstring"
        assert f"{key}  [{kind}; {default}]" in text
    examples = [line for line in module.EXAMPLE.replace("\\\n", " ").splitlines() if line.startswith(command)]
    assert examples, f"{name}: its example does not show it"
    for example in examples:
        cli.config_of(module, shlex.split(example)[3:])
