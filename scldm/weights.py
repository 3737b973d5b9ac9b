"""Weights: read from a file or written to one, put into a network that they fit, named by a hash."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from scldm.errors import InputError

Network = TypeVar("Network", bound=torch.nn.Module)
MAKE = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)  # what layers are made of
SLACK = 100_000  # numbers: what is made and not kept
DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Raises: InputError for a file that is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}). Export the model again") from None


def write_weights(
    path: Path, tensors: Mapping[str, Tensor], empty: Mapping[str, Tensor], noted: dict[str, str]
) -> None:
    """A safetensors file, durable when this returns. One tensor at a time is in memory where `tensors` reads them so.

    empty: the same tensors on the meta device, which say what there is
    noted: metadata of the file
    Source: the format of https://github.com/huggingface/safetensors, whose own writer takes all at once.
    """
    order = sorted(empty, key=lambda name: (-empty[name].element_size(), name))  # each at a multiple of its size
    with path.open("wb") as file:
        file.write(header_of(((name, empty[name].dtype, empty[name].shape) for name in order), noted))
        for name in order:
            file.write(bytes_of(tensors[name]))
        file.flush()
        os.fsync(file.fileno())


def header_of(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]], noted: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file that holds tensors of these names, types and shapes, in this order."""
    header, at = dict[str, Any](__metadata__=dict(noted)), 0
    for name, dtype, shape in tensors:
        ends = [at, at + math.prod(shape) * dtype.itemsize]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": ends}
        at = ends[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def network_of(make: Callable[[], Network], tensors: Mapping[str, Tensor], where: str) -> Network:
    """What `make` makes, with these tensors in it. Raises: InputError, as `fitting`."""
    network = fitting(make, tensors, tensors, where)
    network.load_state_dict(dict(tensors))
    return network


def fitting(
    make: Callable[[], Network], tensors: Mapping[str, Tensor], empty: Mapping[str, Tensor], where: str
) -> Network:
    """What `make` makes, which these tensors fit into. It may take little more memory than they do.

    empty: the same tensors, for what they are alone. They may be on the meta device
    where: the file of the tensors
    Raises: InputError where they are another network's, or a number of them is not finite.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{where}: {name} has numbers that are not finite: the training failed, or it is damaged")
    try:
        with _Room(2 * sum(value.numel() for value in empty.values()) + SLACK):
            network = make()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    expected = network.state_dict()
    for name in sorted(expected.keys() | empty.keys()):
        ours, theirs = (_kind(of.get(name)) for of in (expected, empty))
        if ours != theirs:
            raise InputError(
                f"{where}: weights, config and vocabularies do not belong together: {name} is {theirs}, the network "
                f"has {ours}"
            )
    return network


class _Room(TorchFunctionMode):
    """Within, tensors of at most so many numbers in all are made. A config of others may ask for any width and depth.

    Raises: InputError before the first one that goes beyond.
    """

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = self.left = numbers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKE:
            size = kwargs.get("size", args)
            size = size if size and isinstance(size[0], int) else size[0]
            self.left -= math.prod(size)
            if self.left < 0:
                raise InputError(
                    "weights and config do not belong together: a network of this config has more numbers than the "
                    f"weights ({(self.numbers - SLACK) // 2:,})"
                )
        return func(*args, **kwargs)


def _kind(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values of all weights."""
    return _hash_of(tensors, tensors.__getitem__)


def hash_of_file(path: Path) -> str:
    """The same of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return _hash_of(file.keys(), file.get_tensor)


def _hash_of(names: Iterable[str], tensor_of: Callable[[str], Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(bytes_of(tensor_of(name)))
    return digest.hexdigest()
