"""Which stage of training `scldm plan` is asked about, by the words of its command line alone: known before packages
are imported, which takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from scldm.errors import InputError

# keys of PlannedHardware. 25 us: a small step of 1,267 kernels takes 39 ms (benchmarks/train-cpu.json). 0.5 GB/s: gloo
# between two ranks of a host took 0.18 s at least, and 0.32 s at the median, for an all-reduce of 95 MB on two shared
# cores
CPU = {"gpu": "CPU", "memory_gb": 16, "context_gb": 0, "launch_us": 25, "node_link_gb_s": 0.5}
# preset -> the machine that it is for, as words of a plan
MACHINES = {
    "hardware/cpu": ("hardware.gpus_per_node=1", *(f"hardware.{key}={value}" for key, value in CPU.items())),
    "hardware/one_gpu": ("hardware.gpus_per_node=1",),
    "hardware/many_nodes": ("hardware.nodes=4",),
    "hardware/many_nodes_zero3": ("hardware.nodes=4",),
}
# stage -> the sizes that its plan needs, given or of data.shards. How many cells validation has may be unknown
SIZES = {"vae": ("n_genes", "n_cells"), "ldm": ("n_latents", "latent_width", "n_cells")}


def stage_of(words: Sequence[str]) -> tuple[Literal["vae", "ldm"], list[str]]:
    """The stage, which is the first word or that of the presets, and the presets and keys of its plan.

    Raises: InputError where neither tells it.
    """
    if words and words[0] in ("vae", "ldm"):
        stages, words = {words[0]}, words[1:]
    else:
        stages = {word.split("/")[0] for word in words if re.match(r"(vae|ldm)/[^=]+$", word)}
    if len(stages) != 1:
        why = "the presets are of both" if stages else "no preset tells it"
        raise InputError(f"say what is trained, `scldm plan vae ...` or `scldm plan ldm ...`: {why}")
    machine = [key for word in words for key in MACHINES.get(word, ())]
    # what is given goes before the preset's machine, wherever it stands
    return "vae" if "vae" in stages else "ldm", [*machine, *words]


def needs_shards(config: Any, stage: Literal["vae", "ldm"]) -> bool:
    """Whether a plan reads data.shards, where there are any."""
    return not all(getattr(config, name) for name in (*SIZES[stage], "n_validation"))


def check_sizes(config: Any, stage: Literal["vae", "ldm"]) -> None:
    """Raises: InputError for a size that nothing says."""
    for name in SIZES[stage]:
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)}: give it, or data.shards")
