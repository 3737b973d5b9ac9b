"""The pages build without a warning, tutorials are executed, and the recipes of containers pass their linter."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import scldm
from launch.config import PLACES
from launch.keys import keys_of
from launch.verbs import VERBS

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(tmp_path)]
    command += ["-D", f"nb_execution_cache_path={tmp_path / 'cache'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / f"{page.stem}.html").is_file()
    for tutorial in TUTORIALS:
        html = (tmp_path / "tutorials" / f"{tutorial.stem}.html").read_text()
        assert html.count("<img") >= 2, f"{tutorial.name} has no figures"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_are_kept_without_their_output(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def rows_of(page: str) -> list[list[str]]:
    """The cells of every row of the page's tables, without their heads."""
    lines = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if "|---" not in line][1:]


def test_the_table_of_the_api_has_every_public_name() -> None:
    told = {re.match(r"`([\w.]+)", row[0])[1] for row in rows_of("api.md")}  # pyright: ignore[reportOptionalSubscript]
    methods = {name for name, of in vars(scldm.Pretrained).items() if inspect.isfunction(of) and name[0] != "_"}
    assert told == {f"scldm.{name}" for name in scldm.__all__} | {f"model.{name}" for name in methods}
    for name in told:
        assert name.startswith("model.") or hasattr(scldm, name.removeprefix("scldm."))


def test_the_table_of_keys_has_every_verb_that_takes_them() -> None:
    told = {
        key: set(re.findall("`([^`]+)`", verbs))
        for names, verbs, _ in rows_of("commands.md")
        for key in re.findall("`([^`]+)`", names)
    }
    takes = {key: {verb for verb in VERBS if key in keys_of(verb)} for key in PLACES}
    assert told == takes


def test_there_are_two_tutorials() -> None:
    assert len(TUTORIALS) == 2


def test_hadolint_passes_the_container_recipe() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", ROOT / "container" / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shellcheck_passes_the_sections_of_the_apptainer_recipe(tmp_path: Path) -> None:
    """Apptainer's own check needs Apptainer. Its sections are shell."""
    text = (ROOT / "container" / "scldm.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", text, re.DOTALL | re.MULTILINE))
    assert list(sections) == ["files", "post", "runscript", "test"]
    assert re.search(r"^Bootstrap: docker\nFrom: \S+:\S+$", text, re.MULTILINE)
    for name in ("post", "runscript", "test"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{inspect.cleandoc(sections[name])}\n")
    shellcheck = Path(sys.executable).with_name("shellcheck")
    command = [shellcheck, "--norc", "--exclude=SC2164", *(tmp_path / name for name in ("post", "runscript", "test"))]
    done = subprocess.run(command, capture_output=True, text=True)  # SC2164: Apptainer runs them with `set -e`
    assert done.returncode == 0, done.stdout


def test_the_container_recipes_copy_what_exists() -> None:
    """Of both: every folder of the wheel, and every file that its build reads."""
    wanted = {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    wanted |= {"configs", "data_pipeline", "launch", "scldm", "slurm"}
    docker, apptainer = ((ROOT / "container" / name).read_text() for name in ("Dockerfile", "scldm.def"))
    copied = {word for line in docker.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert wanted <= copied
    section = apptainer.split("%files")[1].split("%post")[0]
    assert {line.split()[0] for line in section.splitlines() if line.strip()} == wanted
    assert all((ROOT / name).exists() for name in wanted)
