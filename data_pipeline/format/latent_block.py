"""A block of latents as bytes: 64 bytes of header, then sections. ../write_latents.py says what is in them."""

from __future__ import annotations

import threading

import numpy as np

from data_pipeline.format.block import ALIGN
from data_pipeline.format.schema import Manifest
from scldm.errors import InputError

LATENT_MAGIC = b"SCLDMLAT"
LATENT_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u2"),
        ("split", "<u1"),
        ("zero", "<u1"),
        ("n_cells", "<u2"),
        ("n_conditions", "<u2"),
        ("n_tokens", "<u4"),
        ("width", "<u4"),
        ("reserved", "S40"),
    ]
)
assert LATENT_HEADER.itemsize == 64


def encode_latent_block(
    latent_BLZ: np.ndarray,
    *,
    split: int,
    total_counts: np.ndarray,
    sources: np.ndarray,
    rows: np.ndarray,
    conditions: list[np.ndarray],
) -> bytes:
    """The bytes of a block. `conditions` have their stored dtype."""
    header = np.zeros((), LATENT_HEADER)
    header["magic"], header["version"], header["split"] = LATENT_MAGIC, 1, split
    header["n_cells"], header["n_conditions"] = len(latent_BLZ), len(conditions)
    header["n_tokens"], header["width"] = latent_BLZ.shape[1:]
    widths = np.array([c.dtype.itemsize for c in conditions], "u1")
    parts = [total_counts.astype("<u8"), sources.astype("<u2"), rows.astype("<i8"), widths, *conditions]
    sections = [*parts, latent_BLZ.astype("<f4")]
    return header.tobytes() + b"".join(s.tobytes() + bytes(-s.nbytes % ALIGN) for s in sections)


class LatentSlots:
    """Memory for `n_slots` blocks of latents. Different slots may be filled from different threads at once.

    latent: (n_slots, block_cells, L, Z) float32. The other arrays are CellSlots'
    """

    def __init__(self, manifest: Manifest, n_slots: int) -> None:
        self.n_slots, self.shape = n_slots, tuple(manifest.extra["shape"])
        self.names, self.scratch = manifest.conditions.names, threading.local()
        self.n_labels = [manifest.conditions.n_labels(name) for name in self.names]
        cells = min(manifest.block_cells, manifest.n_cells)
        self.latent = np.empty((n_slots, cells, *self.shape), np.float32)
        self.about = np.zeros((n_slots, cells, 3 + len(self.names)), np.int64)
        self.identity, self.total_counts, self.labels = self.about[..., :2], self.about[..., 2], self.about[..., 3:]
        self.n_cells = np.zeros(n_slots, np.int64)

    def buffer(self, slot: int, n_bytes: int) -> np.ndarray:
        """Memory to read a block into: the thread's."""
        if len(getattr(self.scratch, "buffer", ())) < n_bytes:
            self.scratch.buffer = np.empty(n_bytes + n_bytes // 8, np.uint8)
        return self.scratch.buffer[:n_bytes]

    def fill(self, slot: int, data: np.ndarray, where: str) -> None:
        """Puts a block's bytes, uint8, into a slot.

        Raises: InputError for bytes that are no sound block of this set.
        """
        if len(data) < LATENT_HEADER.itemsize or bytes(data[:8]) != LATENT_MAGIC:
            raise InputError(f"{where}: not a block of latents")
        header = np.frombuffer(data, LATENT_HEADER, count=1)[0]
        n, at = int(header["n_cells"]), LATENT_HEADER.itemsize
        if header["version"] != 1 or (header["n_tokens"], header["width"]) != self.shape:
            raise InputError(f"{where}: version {header['version']}, latents {header['n_tokens']} x {header['width']}")
        block_cells, n_conditions = self.latent.shape[1], int(header["n_conditions"])
        if n > block_cells or n_conditions != len(self.names):
            raise InputError(f"{where}: {n} cells, {n_conditions} conditions do not fit the manifest")

        def section(dtype: str, length: int) -> np.ndarray:
            nonlocal at
            values = np.frombuffer(data, dtype, count=length, offset=at) if length else np.empty(0, dtype)
            at += values.nbytes + -values.nbytes % ALIGN
            return values

        try:
            self.n_cells[slot] = 0
            self.total_counts[slot, :n] = section("<u8", n)
            self.identity[slot, :n, 0] = section("<u2", n)
            self.identity[slot, :n, 1] = section("<i8", n)
            widths = section("<u1", n_conditions).tolist()
            if not set(widths) <= {1, 2, 4}:
                raise ValueError(f"condition widths {widths}")
            for c, width in enumerate(widths):
                self.labels[slot, :n, c] = ids = section(f"<u{width}", n)
                if n and ids.max() >= self.n_labels[c]:
                    raise ValueError(f"a label id of {self.names[c]!r} is beyond its {self.n_labels[c]} labels")
            self.latent[slot, :n] = section("<f4", n * self.shape[0] * self.shape[1]).reshape(n, *self.shape)
            if at != len(data):
                raise ValueError(f"{len(data)} bytes, its sections are {at}")
        except ValueError as error:
            raise InputError(f"{where}: damaged: {error}") from None
        self.n_cells[slot] = n
