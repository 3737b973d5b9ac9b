"""The wheel: what is in it, and that it finds its presets from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scldm.version import VERSION

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with spaces that holds the wheel's content, without its dependencies."""
    folder = tmp_path_factory.mktemp("a wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], folder)
    (wheel,) = folder.glob("scldm-*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    run([*pip, "--disable-pip-version-check", "--target", str(folder / "site"), str(wheel)], folder)
    return folder / "site"


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_presets_and_scripts_travel_inside_launch_and_tests_do_not(installed: Path) -> None:
    (wheel,) = installed.parent.glob("scldm-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("configs", "slurm"):
        ours = {f"launch/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*") if p.is_file()}
        assert ours == {name for name in names if name.startswith(f"launch/{folder}/")}
        assert ours
    assert {name.split("/")[0] for name in names} == {"data_pipeline", "launch", "scldm", f"scldm-{VERSION}.dist-info"}
    assert "scldm/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_command_finds_its_presets_from_another_folder(installed: Path, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(installed)}
    where = run([sys.executable, "-c", "import launch; print(launch.__file__)"], tmp_path, **environment)
    assert where.startswith(str(installed))
    command = str(installed / "bin" / "scldm")
    assert "train vae" in run([command, "--help"], tmp_path, **environment)
    text = run([command, "train", "vae", "--help"], tmp_path, **environment)
    for path in (ROOT / "configs").glob("vae/*.yaml"):
        assert f"vae/{path.stem}" in text
