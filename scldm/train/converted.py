"""A checkpoint as other tools, or fewer files, want it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from scldm.files import PARTIAL, made_aside, write_json
from scldm.train.checkpoint import KINDS, Checkpoint
from scldm.train.saver import commit, write_part


def write_weights(checkpoint: Checkpoint, out: Path, to: str, kind: str, file_bytes: int) -> None:
    """Weights and buffers by name, float32, whole or not at all.

    to: safetensors, torch or dcp
    kind: ema or weight
    file_bytes: of safetensors, what a file holds at most. 0 is one file
    """
    weights = Weights(checkpoint, kind)
    noted = {"format": "pt", "step": str(checkpoint.step), "weights": "ema" if kind == "ema" else "raw"}
    with made_aside(out) as part:
        if file_bytes:
            save_files(weights, part, file_bytes, noted)
        elif to == "safetensors":
            save_file(dict(weights), part, noted)
        elif to == "dcp":
            save_distributed(weights, part)
        else:
            with part.open("wb") as file:  # by a path, torch does not say why it failed
                torch.save(dict(weights), file)


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
