"""Weights: read from a file, put into a network that they fit, named by a hash."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from scldm.errors import InputError

Network = TypeVar("Network", bound=torch.nn.Module)
MAKE = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)  # what layers are made of
SLACK = 100_000  # numbers: what is made and not kept


def read_weights(path: Path) -> dict[str, Tensor]:
    """Raises: InputError for a file that is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}). Export the model again") from None


def network_of(make: Callable[[], Network], tensors: Mapping[str, Tensor], where: str) -> Network:
    """What `make` makes, with these tensors in it. It may take little more memory than they do.

    where: the file of the tensors
    Raises: InputError where they are another network's, or a number of them is not finite.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{where}: {name} has numbers that are not finite: the training failed, or it is damaged")
    try:
        with _Room(2 * sum(value.numel() for value in tensors.values()) + SLACK):
            network = make()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    expected = network.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        ours, theirs = (_kind(of.get(name)) for of in (expected, tensors))
        if ours != theirs:
            raise InputError(
                f"{where}: weights, config and vocabularies do not belong together: {name} is {theirs}, the network "
                f"has {ours}"
            )
    network.load_state_dict(dict(tensors))
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
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
