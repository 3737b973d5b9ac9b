"""`scldm checkpoint convert`: a checkpoint as other tools, or fewer files, want it.

Resuming needs none of it: training reads any checkpoint at any number of ranks and ZeRO stage.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from launch.checkpoints import found_checkpoint
from launch.cli import run_verb
from scldm.checked import Checked, checked
from scldm.errors import InputError
from scldm.files import PARTIAL, made_aside, write_json
from scldm.train.checkpoint import KINDS, Checkpoint
from scldm.train.saver import commit, write_part

PURPOSE = """Write a checkpoint as plain weights, for any tool (safetensors, a state_dict for torch.load, or torch's
distributed checkpoint), or as a checkpoint again in another number of parts. No GPU is needed. To resume on other ranks
or ZeRO stages, nothing has to be converted; for a model folder that scldm.load reads, there is `scldm export`."""
EXAMPLE = """
scldm checkpoint convert at=runs/vae which=best out=weights.safetensors
scldm checkpoint convert at=runs/vae file_gb=5 out=weights
scldm checkpoint convert at=runs/vae to=dcp out=weights.dcp
scldm checkpoint convert at=runs/vae to=torch weights=raw out=weights.pt
scldm checkpoint convert at=runs/vae to=checkpoint parts=1 out=archive/step-00001500
"""


@dataclass(frozen=True)
class CheckpointConvertConfig(Checked):
    """Which checkpoint, and what to make of it.

    at: folder of a run, or of one checkpoint
    out: file to write. With file_gb, and for to=dcp, a folder; for to=checkpoint, one that does not exist yet
    which: in a run's folder: latest, best, or the number of a step
    to: weights and buffers by name, float32, as safetensors, torch (one file) or dcp (torch.distributed.checkpoint); or
        checkpoint. With dcp one tensor at a time is in memory
    file_gb: safetensors in files of at most so many 1e9 bytes (or one larger tensor), one in memory at a time, and an
        index, as Hugging Face has them. 0 is one file
    weights: ema, which are validated and exported, or raw, which are trained
    parts: files of a checkpoint
    """

    at: str
    out: str
    which: str = "latest"
    to: Literal["safetensors", "torch", "dcp", "checkpoint"] = "safetensors"
    file_gb: float = checked(0.0, at_least=0)
    weights: Literal["ema", "raw"] = "ema"
    parts: int = checked(1, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file_gb and self.to != "safetensors":
            raise InputError(f"file_gb={self.file_gb:g} is for to=safetensors, not for to={self.to}")

    @property
    def makes_folder(self) -> bool:
        return self.to in ("dcp", "checkpoint") or self.file_gb > 0


CONFIG = CheckpointConvertConfig


def main(config: CheckpointConvertConfig) -> Path:
    """Write it, whole or not at all. Returns where. Raises: InputError for a damaged checkpoint."""
    checkpoint, out = Checkpoint(found_checkpoint(config.at, config.which)), Path(config.out)
    if out.is_dir() or (out.exists() and config.makes_folder):  # which may be anybody's
        raise InputError(f"out={out} exists already")
    checkpoint.check()
    if config.to == "checkpoint":
        repartition(checkpoint, out, config.parts)
    else:
        weights = Weights(checkpoint, "ema" if config.weights == "ema" else "weight")
        noted = {"format": "pt", "step": str(checkpoint.step), "weights": config.weights}
        with made_aside(out) as part:
            if config.file_gb:
                save_files(weights, part, int(1e9 * config.file_gb), noted)
            elif config.to == "safetensors":
                save_file(dict(weights), part, noted)
            elif config.to == "dcp":
                save_distributed(weights, part)
            else:
                with part.open("wb") as file:  # by a path, torch does not say why it failed
                    torch.save(dict(weights), file)
    print(f"{checkpoint.folder.name} -> {out}")
    return out


class Weights(Mapping[str, Tensor]):
    """The weights of a checkpoint, each read when it is asked for, and its buffers."""

    def __init__(self, checkpoint: Checkpoint, kind: str) -> None:
        self.checkpoint, self.kind, self.buffers = checkpoint, kind, dict(checkpoint.buffers())
        self.empty = {name: torch.empty(shape, device="meta") for name, shape in checkpoint.shapes.items()}
        self.empty |= {name: torch.empty_like(buffer, device="meta") for name, buffer in self.buffers.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name] if name in self.buffers else self.checkpoint.whole(self.kind, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.empty)

    def __len__(self) -> int:
        return len(self.empty)


def save_files(weights: Weights, folder: Path, most_bytes: int, noted: dict[str, str]) -> None:
    """Source: sharded checkpoints with their index, https://huggingface.co/docs/transformers/big_models."""
    groups, filled = [[]], 0
    for name, empty in weights.empty.items():
        if groups[-1] and filled + empty.nbytes > most_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += empty.nbytes
    folder.mkdir()
    where: dict[str, str] = {}
    for k, names in enumerate(groups, 1):
        file = f"model-{k:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: weights[name] for name in names}, folder / file, noted)
        where |= dict.fromkeys(names, file)
    total = sum(empty.nbytes for empty in weights.empty.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def save_distributed(weights: Weights, folder: Path) -> None:
    """What torch.distributed.checkpoint loads, on any number of ranks."""

    class Planner(DefaultSavePlanner):
        def lookup_object(self, index: MetadataIndex) -> Tensor:
            return weights[index.fqn]

    writer = FileSystemWriter(folder, single_file_per_rank=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is meant
        try:
            dcp.save(weights.empty, storage_writer=writer, planner=Planner(), no_dist=True)
        except CheckpointException as error:  # a BaseException around those of the ranks, of which there is one
            raise next(iter(error.failures.values()))[0] from None


def repartition(checkpoint: Checkpoint, out: Path, parts: int) -> None:
    """The same checkpoint in this many parts, of which each has an equal stretch of every parameter."""
    for k in range(parts):
        tensors: dict[str, Tensor] = {}
        ranges: dict[str, tuple[int, int]] = {}
        for name, shape in checkpoint.shapes.items():
            n = torch.Size(shape).numel()
            start, stop = n * k // parts, n * (k + 1) // parts
            if start < stop:
                ranges[name] = (start, stop)
                tensors |= {f"{kind}/{name}": checkpoint.read(kind, name, start, stop) for kind in KINDS}
        if k == 0:
            tensors |= {f"buffer/{name}": buffer for name, buffer in checkpoint.buffers()}
        write_part(out.with_suffix(PARTIAL) / f"part-{k}-of-{parts}.safetensors", tensors, ranges)
    state = {key: value for key, value in checkpoint.state.items() if key not in ("format", "parts", "files")}
    commit(out, parts, state, checkpoint.folder)


if __name__ == "__main__":
    sys.exit(run_verb("checkpoint convert", sys.argv[1:]))
