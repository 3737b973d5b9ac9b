"""A part of a checkpoint: one safetensors file that neighbouring ranks of a node write together.

    header                    with a place for the SHA-256 of each stretch
    stretch 0, stretch 1, ..  K/{weight,ema,exp_avg,exp_avg_sq}/NAME: what rank K of the node holds, flat, float32

All ranks know the whole layout before they write, so each writes its own bytes alone. Where a node's ranks are numbered
in a row, a checkpoint has as many parts as there are nodes.

Reading order: Layout, layouts, node.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scldm.errors import InputError
from scldm.weights import bytes_of, header_of

KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
CHUNK = 8 << 20  # bytes hashed and written in turn
UNWRITTEN = "-" * 64  # where a SHA-256 goes
SUMS = "sha256"
SUMS_AT = 8 + len(f'{{"__metadata__": {{"{SUMS}": "')  # a safetensors file begins with its header's length, in 8 bytes
Ranges = Mapping[str, tuple[int, int]]  # parameter name -> start and stop of its flattened numbers


@dataclass(frozen=True)
class Layout:
    """Where in a part everything goes.

    ranges: what each of its ranks holds
    """

    name: str
    ranges: Sequence[Ranges]

    @property
    def header(self) -> bytes:
        """As it is before anybody has written his hash."""
        tensors = (
            (f"{k}/{kind}/{name}", torch.float32, (stop - start,))
            for k, ranges in enumerate(self.ranges)
            for name, (start, stop) in ranges.items()
            for kind in KINDS
        )
        return header_of(tensors, {SUMS: UNWRITTEN * len(self.ranges)})

    @cached_property
    def outline(self) -> tuple[int, str]:
        """Bytes of the header, and the SHA-256 of all of it but the hashes. The first rank keeps one for each node, and
        no header, which has a megabyte."""
        header = self.header
        return len(header), self._hash_but_sums(header)

    def take_outline(self, outline: tuple[int, str]) -> None:
        """From the rank that makes the header, which takes a tenth of a second."""
        vars(self)["outline"] = outline

    @cached_property
    def ends(self) -> list[int]:
        """Bytes from the file's start to the end of the header, and of each stretch."""
        sizes = (sum(stop - start for start, stop in ranges.values()) for ranges in self.ranges)
        return list(itertools.accumulate((4 * len(KINDS) * size for size in sizes), initial=self.outline[0]))

    @property
    def _sums(self) -> slice:
        return slice(SUMS_AT, SUMS_AT + len(UNWRITTEN) * len(self.ranges))

    def _hash_but_sums(self, header: bytes) -> str:
        return hashlib.sha256(header[: self._sums.start] + header[self._sums.stop :]).hexdigest()

    def write(self, folder: Path, k: int, tensor_of: Callable[[str, str], Tensor]) -> None:
        """Write stretch k, durable when this returns. The first rank writes the header around the hashes.

        tensor_of: kind and parameter name -> its numbers in this stretch, on the CPU
        """
        folder.mkdir(parents=True, exist_ok=True)
        digest, sums = hashlib.sha256(), self._sums
        with open(os.open(folder / self.name, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=1 << 20) as file:
            file.seek(self.ends[k])
            for name, kind in itertools.product(self.ranges[k], KINDS):
                block = bytes_of(tensor_of(kind, name))
                for first in range(0, len(block), CHUNK):
                    digest.update(block[first : first + CHUNK])
                    file.write(block[first : first + CHUNK])
            file.seek(sums.start + len(UNWRITTEN) * k)
            file.write(digest.hexdigest().encode())
            if k == 0:
                header = self.header
                file.seek(0)
                file.write(header[: sums.start])
                file.seek(sums.stop)
                file.write(header[sums.stop :])
            file.flush()
            os.fsync(file.fileno())

    def noted(self, folder: Path) -> dict[str, Any]:
        """What state.json says of the part, once all its ranks have written it into a folder that was new.

        Raises: InputError where a rank has not.
        """
        path, n = folder / self.name, len(UNWRITTEN)
        with path.open("rb") as file:
            header, n_bytes = file.read(self.outline[0]), os.fstat(file.fileno()).st_size
        if n_bytes != self.ends[-1] or self._hash_but_sums(header) != self.outline[1]:
            raise InputError(f"{path} is not as the {len(self.ranges)} ranks of its node were to write it")
        sums = [header[SUMS_AT + n * k :][:n].decode("ascii", "replace") for k in range(len(self.ranges))]
        if missing := [k for k, found in enumerate(sums) if not set(found) <= set("0123456789abcdef")]:
            raise InputError(f"{path}: rank {missing[0]} of its node has not written it")
        sums.insert(0, hashlib.sha256(header).hexdigest())
        return {"bytes": n_bytes, "ends": self.ends, "sha256": sums, "ranges": self._bounds()}

    def _bounds(self) -> dict[str, list[int]]:
        """Parameter name -> where the numbers of stretch 0, 1, .. begin, and where the last ones end."""
        bounds: dict[str, list[int]] = {}
        for k, ranges in enumerate(self.ranges):
            for name, (start, stop) in ranges.items():
                found = bounds.setdefault(name, [start] * (k + 1))
                found += [found[-1]] * (k + 1 - len(found))
                assert found[-1] == start, f"{name}: neighbouring ranks hold neighbouring numbers"
                found.append(stop)
        return {name: found + [found[-1]] * (len(self.ranges) + 1 - len(found)) for name, found in bounds.items()}


def layouts(nodes: Sequence[str], ranges: Sequence[Ranges]) -> list[Layout]:
    """The parts of a checkpoint: neighbouring ranks of one node share one. Of each rank, its node and its ranges."""
    groups = [
        [own for _, own in group] for _, group in itertools.groupby(zip(nodes, ranges, strict=True), lambda of: of[0])
    ]
    return [Layout(f"part-{k}-of-{len(groups)}.safetensors", group) for k, group in enumerate(groups)]


def node() -> str:
    """The same for all processes of a host, and for no other's: two may be named alike."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot}"
