"""A training in Podman on a real Slurm. Its image comes as a file. A signal stops it, and it resumes."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cluster import commands as slurm
from tests.slurm.runs import ROOT, Cluster, Run

MISSING = [name for name in ("podman", "crun") if not shutil.which(name)]
pytestmark = [
    pytest.mark.exhaustive,  # tests/launch/test_containers.py has a stand-in
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]

# Limits as they are: without CAP_SYS_RESOURCE even root can't raise them. crun refuses cgroups of both versions at once
CONFIG = """[containers]
default_ulimits = ["nofile={files}:{files}", "nproc=4096:4096"]
[engine.runtimes]
crun = ["{crun}"]
"""
CRUN = """#!/bin/sh
exec unshare --mount sh -c 'umount /sys/fs/cgroup/unified 2>/dev/null; exec crun "$@"' crun "$@"
"""
STORE = '[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
SAID = """import os
if os.path.exists("/the image"):
    print("in the image", os.environ.get("SLURM_PROCID"), flush=True)
"""


def podman(*words: str) -> str:
    done = subprocess.run(["podman", *words], capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"needs a Podman that works: podman {words[0]}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An archive of an image that has little: the host's programs are mounted into it."""
    (tmp_path / "crun").write_text(CRUN)
    (tmp_path / "crun").chmod(0o755)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    (tmp_path / "containers.conf").write_text(CONFIG.format(files=files, crun=tmp_path / "crun"))
    (tmp_path / "storage.conf").write_text(STORE.format(folder=tmp_path / "store"))
    monkeypatch.setenv("CONTAINERS_CONF", str(tmp_path / "containers.conf"))
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(tmp_path / "storage.conf"))
    root = tmp_path / "root"
    for name in ("etc", "tmp", "usr", "proc", "sys", "dev", "run", "the image"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    subprocess.run(["tar", "-C", root, "-cf", tmp_path / "root.tar", "."], check=True)
    # as container/Dockerfile has them
    podman("import", "--change=ENTRYPOINT scldm", "--change=USER 1000", f"{tmp_path}/root.tar", "localhost/scldm:test")
    podman("save", "--quiet", f"--output={tmp_path}/scldm.tar", "localhost/scldm:test")
    podman("rmi", "--all", "--force")
    yield tmp_path / "scldm.tar"
    podman("rm", "--all", "--force")
    podman("rmi", "--all", "--force")


def test_a_training_in_podman_stops_by_a_signal_and_resumes(
    cluster: Cluster, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Path
) -> None:
    site = tmp_path / "site.sh"
    own = [f"{path}:{path}:ro" for path in ("/usr", sys.base_prefix, sys.prefix, ROOT, tmp_path)]
    lines = {
        "": image,
        "_RUNTIME": "podman",
        "_MOUNTS": f"'{','.join([*own, str(cluster.runs), str(cluster.folder / 'disk')])}'",
    }
    text = "".join(f"SCLDM_CONTAINER{key}={value}\n" for key, value in lines.items())
    site.write_text(f"{(cluster.folder / 'site.sh').read_text()}{text}SCLDM_PYTHON={sys.executable}\n")
    (tmp_path / "sitecustomize.py").write_text(SAID)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("SCLDM_SITE", str(site))
    run = Run(cluster, "podman", shards, "--nodes", "2", "--preflight-s", "300", "--stage")
    run.reaches(5, 500)
    slurm.call("scancel", "--signal=USR1", run.job)
    assert run.ends(500) == "DONE", run.log
    first, stop, second = run.events()
    assert (first[0], stop[0], second[0]) == ("start", "stop", "start")
    assert 0 < stop[2] == second[2] < 40
    assert f"image {image} (podman) is there after " in run.log
    for rank in range(2):
        assert run.log.count(f"{rank}: in the image {rank}\n") == 4  # preflight and verb, twice
    assert not (run.notes / "bad_nodes").read_text()
    assert podman("ps", "--all", "--quiet") == ""
