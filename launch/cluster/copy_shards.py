"""Copy a shard set to a node's own disk, every byte checked against the manifest. A job's steps run it once a node.

What jobs that no longer run left there is removed first: folders with their name that hold their mark, and no others. A
copy that is whole already, as after a requeue to the same node, is kept. The job's ranks then read it where it lies.

launch/staged.py finds it.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.format.schema import MANIFEST, read_manifest
from launch.config import compose
from scldm.errors import REFUSED, InputError
from scldm.files import disk_explained, remove_marked, sha256_of, written_aside

PIECE = 16 << 20
MARK = ".scldm-staged"  # made first and removed last: whoever finds it may remove the folder


@dataclass(frozen=True)
class StageConfig:
    """What to copy where.

    source: the shard set, a folder that all nodes see
    out: folder on this node's own disk, named scldm-JOB
    running: ids of this user's jobs, separated by commas: the folders of others are removed
    """

    source: str
    out: str
    running: str


def main(config: StageConfig) -> Path:
    """Copy. Returns the folder. Raises: InputError for a full disk, or a file that is not as the manifest says."""
    began, out = time.monotonic(), Path(config.out)
    running = config.running.strip(",").split(",")
    if (
        out.name.removeprefix("scldm-") not in running
    ):  # Slurm did not answer: what others stage can't be told from rests
        raise InputError(f"running={config.running!r} does not name this job, whose folder is {out.name}")
    for left in out.parent.glob("scldm-*"):
        job = re.fullmatch(r"scldm-(\d+)", left.name)
        if job and job[1] not in running:
            remove_marked(left, MARK)
    manifest = read_manifest(config.source)
    n_copied = 0
    with disk_explained(str(out)):
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).touch()
        for entry in (*manifest.shards, *manifest.index):
            n_copied += copy(Path(config.source) / entry.path, out / entry.path, entry)
        with written_aside(out / MANIFEST) as file:
            file.write((Path(config.source) / MANIFEST).read_bytes())
    seconds = time.monotonic() - began
    print(
        f"{os.uname().nodename}: staged {config.source} ({n_copied / 1e9:.3f} GB copied) in {seconds:.1f} s", flush=True
    )
    return out


def copy(source: Path, target: Path, entry: Any) -> int:
    """Copy one file, checking it on the way. Returns the bytes copied, 0 where it is there already."""
    if target.is_file() and sha256_of(target)[1] == entry.sha256:
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, n = hashlib.sha256(), 0
    with source.open("rb") as read, written_aside(target) as written:
        while data := read.read(PIECE):
            digest.update(data)
            written.write(data)
            n += len(data)
        if digest.hexdigest() != entry.sha256:
            raise InputError(f"{source} is not as the manifest says: its SHA-256 is {digest.hexdigest()[:12]}...")
    return n


def run(words: Sequence[str]) -> int:
    try:
        main(compose(StageConfig, words))
    except InputError as error:
        print(f"scldm: staging: error: {error}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
