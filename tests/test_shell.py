"""Shell scripts: shellcheck passes all of them, and the set-up installs when it has to and not otherwise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def scripts() -> list[Path]:
    """Every file of the checkout that bash runs."""
    found = [ROOT / ".ci" / "run"]
    for folder in ("benchmarks", "launch", "slurm", "tests"):
        found += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".sh", ".sbatch")]
    return sorted(found)


def test_shellcheck_passes_every_script() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("shellcheck")), "--norc", *map(str, scripts())],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_every_start_of_a_module_of_ours_leaves_the_current_folder_out() -> None:
    """Python's -P. Without it, a user's launch.py there is run in place of ours."""
    start = re.compile(r"""(?<=[\s"'])-m["']?,?\s+f?["']?(launch|scldm|data_pipeline|torch)\b""")
    kinds = [ROOT / "launch", ROOT / "scldm", ROOT / "data_pipeline", ROOT / "slurm", ROOT / "container"]
    files = [path for folder in kinds for path in folder.rglob("*") if path.suffix in (".py", ".sh", ".sbatch", ".def")]
    n_found, wrong = 0, []
    for path in files:
        for line in path.read_text().splitlines():
            code = re.sub(r"`[^`]*`|^\s*#.*|^    python .*", "", line)  # text about them
            for found in start.finditer(code):
                n_found += 1
                # JobSteps.python puts it there
                if not re.search(r"""(?:-P["']?,?\s+["']?|self\.python\(["'])$""", code[: found.start()]):
                    wrong.append(f"{path.relative_to(ROOT)}: {line.strip()}")
    assert not wrong
    assert n_found >= 9


@pytest.mark.parametrize(
    "missing, root, installs, code",
    [
        ("sbatch is not installed", 0, 1, 1),
        ("sbatch is not installed", 0, 0, 0),
        ("sbatch is not installed", 7, 1, 0),
        ("this host gives no name spaces", 0, 1, 0),
        ("", 0, 1, 0),
    ],
)
def test_ci_fails_where_slurm_can_be_installed_and_is_not(
    tmp_path: Path, missing: str, root: int, installs: int, code: int
) -> None:
    (text,) = re.findall(r"^slurm\(\) \{.*?^\}", (ROOT / ".ci" / "run").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "tests" / "slurm").mkdir(parents=True)
    cluster = f'case $1 in why-not) echo "{missing}" ;; install) touch tried; exit {installs} ;; esac'
    (tmp_path / "tests" / "slurm" / "cluster.sh").write_text(cluster)
    for name, does in (("id", f"echo {root}"), ("apt-get", "true")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"set -e\n{text}\nslurm"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == code
    assert (tmp_path / "tried").exists() == (root == 0 and "installed" in missing)
    assert (missing in done.stdout) == (code == 0)


FAKE_PYTHON = """#!/usr/bin/env bash
# A Python that notes what pip is asked for, and is otherwise the real one, or too old.
if [ "$1 $2" = "-m pip" ]; then echo "$PWD: $*" >>"{log}"; exit "$(cat "{status}")"; fi
if [ -f "{old}" ]; then exit 1; fi
exec "{python}" "$@"
"""


class Checkout:
    """A checkout and an active virtual environment, both in folders with spaces, whose pip only takes notes."""

    def __init__(self, folder: Path) -> None:
        self.root, self.venv = folder / "my checkout", folder / "my venv"
        self.log, self.status, self.old = folder / "log", folder / "status", folder / "old"
        (self.root / "launch").mkdir(parents=True)
        (self.venv / "bin").mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "setup.sh", self.root / "launch")
        (self.root / "pyproject.toml").write_text("[project]\n")
        (self.root / "constraints.txt").write_text("torch==2.13.0\n")
        self.log.touch()
        self.status.write_text("0")
        python = self.venv / "bin" / "python"
        python.write_text(FAKE_PYTHON.format(log=self.log, status=self.status, old=self.old, python=sys.executable))
        python.chmod(0o755)

    def setup(self, *extras: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.root / "launch" / "setup.sh"), *extras],
            cwd=self.venv,
            env=os.environ | {"VIRTUAL_ENV": str(self.venv)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def installs(self) -> list[str]:
        """What pip was asked for since the last call."""
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_set_up_installs_once_and_prints_the_python(checkout: Checkout) -> None:
    done = checkout.setup()
    assert (done.returncode, done.stdout) == (0, f"{checkout.venv}/bin/python\n")
    (call,) = checkout.installs()
    assert call.startswith(f"{checkout.root}: -m pip install ")
    assert call.endswith("-c constraints.txt -e .[all,test]")
    assert checkout.setup().stdout == done.stdout
    assert checkout.setup("test").returncode == 0
    assert checkout.installs() == []


def test_it_removes_no_environment_of_others(checkout: Checkout) -> None:
    (checkout.root / ".venv").mkdir()
    (checkout.root / ".venv" / "mine").touch()
    (checkout.root / ".venv" / ".scldm-setup").touch()  # scldm was installed into it once
    script = ["bash", str(checkout.root / "launch" / "setup.sh")]
    done = subprocess.run(script, env=os.environ | {"VIRTUAL_ENV": ""}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "was not made by this script: rename it, or remove it" in done.stderr
    assert (checkout.root / ".venv" / "mine").exists()


def test_it_installs_again_for_what_changed(checkout: Checkout) -> None:
    checkout.setup("all")
    assert len(checkout.installs()) == 1
    checkout.setup("all,dev")
    assert checkout.installs()[0].endswith(".[all,all,dev]")
    (checkout.root / "constraints.txt").write_text("torch==2.14.0\n")
    checkout.setup("all")
    assert checkout.installs()[0].endswith(".[all]")
    checkout.setup("all")
    assert checkout.installs() == []


def test_a_failed_install_fails_and_is_tried_again(checkout: Checkout) -> None:
    checkout.status.write_text("1")
    done = checkout.setup()
    assert done.returncode != 0
    assert done.stdout == ""
    checkout.status.write_text("0")
    assert checkout.setup().returncode == 0
    assert len(checkout.installs()) == 2


def test_an_old_python_is_refused_before_anything_is_installed(checkout: Checkout) -> None:
    checkout.old.touch()
    done = checkout.setup()
    assert done.returncode == 2
    assert "has no Python >= 3.11" in done.stderr
    assert checkout.installs() == []
