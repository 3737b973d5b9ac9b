"""A checkpoint as other tools, or fewer files, want it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from scldm.files import made_aside, write_json
from scldm.train.checkpoint import Checkpoint, Weights
from scldm.train.parts import layouts
from scldm.train.saver import complete
from scldm.weights import write_weights


def write_plain(checkpoint: Checkpoint, out: Path, to: str, kind: str, file_bytes: int) -> None:
    """Weights and buffers by name, float32, whole or not at all. One tensor at a time is in memory.

    to: safetensors or dcp
    kind: ema or weight
    file_bytes: of safetensors, what a file holds at most. 0 is one file
    """
    weights = Weights(checkpoint, kind)
    noted = {"format": "pt", "step": str(checkpoint.step), "weights": "ema" if kind == "ema" else "raw"}
    with made_aside(out) as part:
        if to == "dcp":
            save_distributed(weights, part)
        elif file_bytes:
            save_files(weights, part, file_bytes, noted)
        else:
            write_weights(part, weights, weights.empty, noted)


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
        write_weights(folder / file, weights, {name: weights.empty[name] for name in names}, noted)
        where |= dict.fromkeys(names, file)
    total = sum(empty.nbytes for empty in weights.empty.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def save_distributed(weights: Weights, folder: Path) -> None:
    """What torch.distributed.checkpoint loads, on any number of ranks."""

    class Planner(DefaultSavePlanner):
        def lookup_object(self, index: MetadataIndex) -> Tensor:
            return weights[index.fqn]

    # torch keeps all tensors of a file until it is written: here each has its own
    writer = FileSystemWriter(folder, single_file_per_rank=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is meant
        try:
            dcp.save(weights.empty, storage_writer=writer, planner=Planner(), no_dist=True)
        except CheckpointException as error:  # a BaseException around those of the ranks, of which there is one
            raise next(iter(error.failures.values()))[0] from None


def repartition(checkpoint: Checkpoint, out: Path, n_parts: int) -> None:
    """The same checkpoint in this many parts, of which each has an equal stretch of every parameter. One stretch of a
    parameter at a time is in memory."""
    sizes = {name: torch.Size(shape).numel() for name, shape in checkpoint.shapes.items()}
    bounds = {name: [n * k // n_parts for k in range(n_parts + 1)] for name, n in sizes.items()}
    held = [{name: of for name, at in bounds.items() if (of := (at[k], at[k + 1]))[0] < of[1]} for k in range(n_parts)]
    parts = layouts([str(k) for k in range(n_parts)], held)
    state = {key: value for key, value in checkpoint.state.items() if key not in ("format", "parts", "files")}
    with made_aside(out) as folder:
        for part in parts:
            part.write(folder, 0, lambda kind, name, of=part.ranges[0]: checkpoint.read(kind, name, *of[name]))
        complete(folder, parts, checkpoint.buffers(), state, checkpoint.folder)
