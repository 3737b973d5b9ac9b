"""Where and with what something was run: kept in run folders, evaluations and benchmarks."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from scldm.errors import InputError

PACKAGES = (
    *("scldm", "torch", "deepspeed", "mlflow", "tiledbsoma", "cellxgene-census", "anndata", "scanpy"),
    *("numpy", "scipy", "pandas", "omegaconf", "safetensors"),
)


def describe() -> dict[str, Any]:
    """Versions, git commit, host and command line, in JSON types. Imports none of the packages that it names."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(map(without_passwords, sys.argv)),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "git": git_commit(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def made_with(inputs: Mapping[str, Any], packages: Sequence[str] = ()) -> dict[str, Any]:
    """The same for a person, of an evaluation. packages: whose versions are named too"""
    here = describe()
    versions = {**here["versions"], **{name: metadata.version(name) for name in packages}}
    return {
        "created": here["time"].replace("T", " ").removesuffix("+00:00") + " UTC",
        "command": here["command"],
        "commit": here["git"],
        "python": here["python"],
        **inputs,
        "versions": dict(sorted(versions.items())),
    }


# of URLs: who logs in, up to the last `@`, since a password may hold any character, and what signs a query.
# 4,096: a search to the end of the text for each of many URLs would take for ever
_LOGIN = re.compile(
    r"(?<=[\w+.-]://)(?:"
    r"(?!\[[\da-fA-F:.]*\])[^\s/?#:]*:(?!\d*[/?#])\S{0,4096}@"  # user:password. No [::1]:5000
    r"|[^\s/?#:\[]*:\d*[/?#][^\s'\",]{0,4096}@"  # host:port/a@b, or a password that begins as a port does
    # a user may be a token. Elsewhere a name without a password says where something lies
    r"|(?:(?<=(?i:http://))|(?<=(?i:https://)))[^\s/?#@]+@(?:\S{0,4096}@)?)"
)
_SIGNED = re.compile(
    r"(?<=[?&;#])([\w-]*(?:password|passwd|pwd|secret|token|signature|credential"
    r"|(?:api|access|account|secret|private|signing)[-_]?key(?:[-_]?id)?)|key|sig|odbc_connect)="
    r"[^\s&#]+?(?=['\"]?(?:[\s&#]|$))",
    re.IGNORECASE,
)


def without_passwords(text: str) -> str:
    """Text as it may stand in files and messages: without who logs in, and by what, in the URLs of it."""
    if "://" not in text:
        return text
    return _SIGNED.sub(r"\1=...", _LOGIN.sub("", text))


def check_uri(what: str, uri: str) -> None:
    """Raises: InputError for a URI of a server in which an `@` stands after the first `/`, `?`, `#` or space.

    It may end a password that holds such a character. Nobody can tell, so it would be kept. The message has no part of
    the URI.
    """
    if re.match(r"[\w+.-]+://[^\s/?#]+[\s/?#].*@", uri, re.DOTALL):
        raise InputError(
            f"{what}: an `@` stands after a `/`, `?`, `#` or space, so that it can't be told what is a password. Write "
            "these characters percent-encoded, but for those that part host, path and query: / as %2F, ? as %3F, # as "
            "%23, @ as %40, a space as %20"
        )


def cpu_maker() -> str:
    """As a processor names it, such as GenuineIntel or AuthenticAMD. Its architecture where it names none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return named[0] if named else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, `-dirty` where tracked files differ. None outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


MOST_OF_A_DIFF = 1_000_000  # bytes
# what follows one of these in its line is not kept. `token` alone is a word of this project: model.token=linear
_SECRET = re.compile(
    r"((?i:password|passwd|passphrase|\bpwd\b|secret|api[-_]?key|access[-_]?key|credential|authorization|bearer)"
    r"|TOKEN|_KEY[\"']|token[\"']?\s?[=:]\s?(?:str\s?=\s?)?[\"']|\b(?:hf_|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|sk-(?=[\w-]{16})|AKIA|eyJ)).*"
)
_HUNK = re.compile(r"(@@ -\S+ \+\S+ @@).*")  # after which git shows a line of the file, whatever it holds
_KEY = re.compile(r"-----BEGIN[A-Z ]*PRIVATE KEY-----.*?(?:-----END[A-Z ]*-----|\Z)", re.DOTALL)


def git_diff() -> str:
    """How tracked files of the checkout differ from its commit, at most a megabyte. Empty where they don't.

    Users and passwords in URLs are left out, and so is the rest of a line after a word such as `api_key` or `PASSWORD`.
    A secret without any such word beside it stays: what is not to be seen belongs in no tracked file.
    """
    if not (git_commit() or "").endswith("-dirty"):
        return ""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as git:
        assert git.stdout is not None
        overdue = threading.Timer(10, git.kill)
        overdue.start()
        data = git.stdout.read(MOST_OF_A_DIFF + 1)
        late = overdue.finished.is_set()
        overdue.cancel()
        git.kill()  # of a larger one the rest is not wanted
    text = _KEY.sub("...", without_passwords(data[:MOST_OF_A_DIFF].decode(errors="replace")))
    lines, in_head = list[str](), True
    for line in text.splitlines(keepends=True):
        in_head = (in_head or line.startswith("diff --git ")) and not line.startswith("@@ ")
        # names of files stand in a head, such as tokens.py
        lines.append(line if in_head else _SECRET.sub(r"\1...", _HUNK.sub(r"\1", line)))
    cut = f"{MOST_OF_A_DIFF:,} bytes" if len(data) > MOST_OF_A_DIFF else "10 s" if late else ""
    return "".join(lines) + (f"\n# cut at {cut}\n" if cut else "")


# of those that bring a package, the first is named
EXTRAS = ("shards", "data", "mlflow", "train", "evaluate", "ode", "cell-eval", "tensorboard")
DISTRIBUTIONS = {"sklearn": "scikit-learn", "ot": "pot", "umap": "umap-learn", "skmisc": "scikit-misc"}


def install_hint(package: str) -> str:
    """What brings a package, as scldm's own metadata has it."""
    name, found = DISTRIBUTIONS.get(package, package).replace("_", "-"), set[str]()
    try:
        requirements = metadata.requires("scldm") or []
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        requirements = []
    for requirement in requirements:
        wanted, _, marker = requirement.partition(";")
        if re.split(r"[^\w.-]", wanted, maxsplit=1)[0].lower() == name:
            found |= set(re.findall(r"extra == ['\"]([\w-]+)", marker)) or {""}
    extra = next((e for e in EXTRAS if e in found), "")
    if not found:
        return f"pip install {name} may bring it"
    what = f'".[{extra}]"' if extra else "."
    brings = f"scldm's extra {extra!r} brings it" if extra else "scldm needs it"
    return f"{brings}: pip install -c constraints.txt -e {what}, in scldm's folder"
