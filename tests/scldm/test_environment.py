"""The description of where something ran: plain JSON, true of this checkout, and cheap to make."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from scldm import environment

ROOT = Path(__file__).resolve().parent.parent.parent


def test_it_is_json_and_names_the_versions_that_are_installed() -> None:
    described = environment.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["versions"]["numpy"] == metadata.version("numpy")
    assert described["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_the_commit_is_that_of_the_checkout() -> None:
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (environment.git_commit() or "").removesuffix("-dirty") == head


def test_outside_of_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "scldm" / "environment.py"))
    assert environment.git_commit() is None


def test_describing_imports_nothing_heavy() -> None:
    code = "import sys, scldm.environment as e; e.describe(); sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that has scldm/environment.py and a file, committed."""
    (tmp_path / "scldm").mkdir()
    (tmp_path / "file.py").write_text("first = 1\n")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "scldm" / "environment.py"))
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    return tmp_path


def test_a_diff_shows_what_changed_and_no_secret(checkout: Path) -> None:
    assert environment.git_diff() == ""
    secrets = ["url = 'https://me:hidden1@place/x'", 'api_key = "hidden2"', "MLFLOW_TRACKING_PASSWORD=hidden3"]
    secrets += ['{"hf_token": "hidden4"}', "client_secret: hidden5", 'password: str = "hidden6"']
    secrets += [
        'os.environ["API_KEY"] = "hidden7"',
        'os.environ.setdefault("HF_TOKEN", "hidden8")',
        "--password hidden9",
    ]
    secrets += [
        'login(token="hidden10")',
        "Authorization: Bearer hidden11",
        "https://hidden12@place/y",
        "x = 'hf_hidden'",
        *(f"x = '{begin}hidden-of-sixteen'" for begin in ("gho_", "glpat-", "xoxb-", "sk-proj-")),
        'password = "hidden words of several"',
        "-----BEGIN RSA PRIVATE KEY-----\nhidden\nhidden\n-----END RSA PRIVATE KEY-----",
        'token: str = "hidden13"',
        'n_tokens = latent_tokens + 3; "sk-learn"',
    ]
    (checkout / "file.py").write_text("\n".join(["first = 2", "model.token=linear", *secrets, ""]))
    diff = environment.git_diff()
    assert "-first = 1\n+first = 2\n+model.token=linear\n" in diff
    assert "hidden" not in diff
    assert diff.startswith("diff --git a/file.py b/file.py\n")
    assert 'latent_tokens + 3; "sk-learn"' in diff
    assert diff.count("...") == 18
    assert "https://place/x" in diff


def test_a_line_that_looks_like_a_head_has_no_secret_either(checkout: Path) -> None:
    lines = [
        'PASSWORD = "hidden1"',
        *(f"    x = {k}" for k in range(9)),
        "-- password: hidden2",
        "++ password: hidden3",
    ]
    (checkout / "tokens.py").write_text("\n".join(lines))
    for words in (["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "second"]):
        subprocess.run(["git", "-C", str(checkout), *words], check=True)
    (checkout / "tokens.py").write_text("\n".join([*lines[:7], "    x = 0", *lines[8:10], "++ password: hidden4"]))
    diff = environment.git_diff()
    assert "\n@@ -5,8 +5,7 @@\n" in diff, "git would show the password behind it"
    assert "hidden" not in diff
    assert "+++ b/tokens.py\n" in diff


def test_a_large_diff_is_cut(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "MOST_OF_A_DIFF", 1_000)
    (checkout / "file.py").write_text("x = 1\n" * 1_000_000)
    diff = environment.git_diff()
    assert diff.endswith("\n# cut at 1,000 bytes\n")
    assert len(diff) < 1_100


def test_a_long_line_is_read_as_fast_as_many_short_ones(checkout: Path) -> None:
    """Hours for a megabyte, where the time grows with the square of a line."""
    (checkout / "file.py").write_text("tokenACGTx" * 100_000)
    assert "tokenACGTx" * 90_000 in environment.git_diff()
