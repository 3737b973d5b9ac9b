"""The container that a job's ranks run in, by pyxis, Apptainer, Singularity or Podman. The site file names it.

pyxis is a part of srun, and adds options to it. The others are commands that srun starts once for each rank. In all
of them the rank has its environment, gets the signals that srun passes on, and its exit code comes back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from scldm.errors import InputError

RUNTIMES = ("pyxis", "apptainer", "singularity", "podman")
# The whole environment but the host's own search paths. `--env-host` would put them in the place of the image's
PODMAN = 'exec podman run $(compgen -e | sed "/^PATH$/d; /^LD_LIBRARY_PATH$/d; s/^/--env=/") "$@"'
PODMAN_OPTIONS = (
    *("--rm", "--log-driver=none", "--entrypoint="),
    # ranks find each other by the node's names and ports, and share its memory and limits
    *("--network=host", "--uts=host", "--ipc=host", "--ulimit=host"),
    "--cgroups=disabled",  # it stays in Slurm's, which then limits and ends what runs in it
    "--init",  # the first process of a container ignores the signals that it does not catch. So Python is the second
    # files are made by the user, who is 0 within where Podman runs without root, and with all of the user's groups
    *("--user=0:0", "--group-add=keep-groups", "--security-opt=label=disable"),
)


class Container(NamedTuple):
    """mounts: source, target and flags (as ro, or ro+rprivate, mostly none)"""

    runtime: str
    image: str
    mounts: list[tuple[str, str, str]]

    def shows(self, folder: str | Path) -> bool:
        """Whether a mount shows the folder under its own path."""
        return any(source == target and Path(folder).is_relative_to(source) for source, target, _ in self.mounts)

    @property
    def is_archive(self) -> bool:
        """A file that each node has to load before it has the image."""
        return self.runtime == "podman" and self.image.startswith("/")

    def before_python(self, name: str, gpus: bool) -> list[str]:
        """The words between srun's own and a rank's Python.

        name: pyxis unpacks the image once on a node under this name, and later steps of the job reuse it
        """
        here, joint = os.getcwd(), "+" if self.runtime == "pyxis" else ","
        mounts = [":".join(filter(None, (*place, flags.replace("+", joint)))) for *place, flags in self.mounts]
        if self.runtime == "pyxis":
            words = [f"--container-image={self.image}", f"--container-name={name}"]
            words += [f"--container-mounts={','.join(mounts)}"] if mounts else []
            return [*words, *([f"--container-workdir={here}"] if self.shows(here) else [])]
        if self.runtime == "podman":
            words = [*PODMAN_OPTIONS, *(["--device=nvidia.com/gpu=all"] if gpus else [])]
            words += [f"--volume={mount}" for mount in mounts]
            words += [f"--workdir={here}"] if self.shows(here) else []
            return ["bash", "-c", PODMAN, "podman", *words, self.image]
        words = [*(["--nv"] if gpus else []), *(f"--bind={mount}" for mount in mounts)]
        return [self.runtime, "exec", *words, self.image]


def container_of(site: Mapping[str, str]) -> Container | None:
    """None where the site has none. Raises: InputError with the key, its value, and what would be right."""
    image, runtime = site.get("SCLDM_CONTAINER", ""), site.get("SCLDM_CONTAINER_RUNTIME", "")
    if runtime and runtime not in RUNTIMES:
        raise InputError(f"SCLDM_CONTAINER_RUNTIME={runtime}: give one of {', '.join(RUNTIMES)}")
    if not image:
        if runtime:
            raise InputError(f"SCLDM_CONTAINER_RUNTIME={runtime} needs SCLDM_CONTAINER, an image")
        return None
    runtime, mounts = runtime or "pyxis", []
    for text in filter(None, site.get("SCLDM_CONTAINER_MOUNTS", "").split(",")):
        # pyxis also mounts what is no folder, as tmpfs:/tmp
        match = re.fullmatch(rf"({'[^:]+' if runtime == 'pyxis' else '/[^:]*'})(?::(/[^:]*)(?::([\w+=-]+))?)?", text)
        if not match:
            told = f"SCLDM_CONTAINER_MOUNTS: {text!r} is no mount of {runtime}"
            raise InputError(f"{told}. Give /data, /data:/inside or /data:/inside:ro, separated by commas")
        mounts.append((match[1], match[2] or match[1], match[3] or ""))
    return Container(runtime, image, mounts)
