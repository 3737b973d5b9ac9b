"""Latent shard sets: every cell of a cell set encoded once, in the same blocks, shards, splits and order.

A set of kind `latents` has the layout of README.md, with the index of cells and genes, vocabularies, splits and
statistics of the cell set that it comes from. Its manifest's `extra` has

    cells        hash of that set
    vae          hash of the model
    shape        (L, Z)
    precision    float32 or bfloat16, in which the model computed. Latents are float32 whatever that was
    mean, std    over the training cells, each (L, Z)

A block is 64 bytes of header (LATENT_HEADER), then sections, each filled up with zero bytes to a multiple of 8. They
are total counts u8, source u2, row i8, condition widths u1, label ids of each condition, latents f4 (n_cells, L, Z).
Blocks are not compressed: floats hardly shrink.

Any number of processes write shards side by side. A shard counts as written once its note under `parts/` is there.
`finish` writes index and manifest last. Every file gets its name when it is whole, and on the disk.

Its block is in format/latent_block.py.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from data_pipeline.format import schema
from data_pipeline.format.latent_block import encode_latent_block
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.format.schema import OfLatents, ShardEntry
from data_pipeline.stream.gene_set_config import GeneSetConfig
from scldm.errors import InputError
from scldm.files import disk_explained, locked, remove_left, remove_marked, sha256_of, write_bytes, written_aside
from scldm.given_json import Count, read_sealed, sealed


@dataclass(frozen=True)
class _Block:
    length: Annotated[int, range(1 << 32)]
    crc32: Annotated[int, range(1 << 32)]


@dataclass(frozen=True)
class _Written:
    """What is noted of a shard. sum, sum_of_squares: over its latents, (L, Z)"""

    blocks: list[_Block]
    bytes: Count
    tar_sha256: str
    sum: list[list[float]]
    sum_of_squares: list[list[float]]


def noted(out: Path) -> dict[str, Any] | None:
    """The identity of the latents that a folder holds, finished or not. None where there are none."""
    note = out / "parts" / "set.json"
    if (out / schema.MANIFEST).is_file():
        return schema.read_manifest(str(out)).extra
    return read_sealed(dict[str, Any], note) if note.is_file() else None


def precision_of(out: str) -> str:
    """In which the latents of a folder were computed. Empty where there are none, or where that is not told."""
    told = (noted(Path(out)) or {}).get("precision")
    return told if told in ("float32", "bfloat16") else ""


class LatentWriter:
    """Writes the latents of a cell set shard by shard. After an interruption, the next one writes what is missing.

    out: a local folder
    cells: the set that is encoded
    vae_hash: of the model that encodes
    shape: (L, Z)
    genes: gene set that the encoder is given
    precision: in which the model computes

    Raises: InputError where the folder holds other latents. Writes nothing.
    """

    def __init__(
        self,
        out: str | Path,
        cells: ShardSet,
        vae_hash: str,
        shape: tuple[int, int],
        genes: GeneSetConfig | None = None,
        precision: str = OfLatents.precision,
    ) -> None:
        self.out, self.cells, self.shape = Path(out), cells, shape
        of_genes = asdict(genes or GeneSetConfig())
        self.identity: dict[str, Any] = {
            "cells": cells.hash, "vae": vae_hash, "shape": list(shape), "genes": of_genes, "precision": precision
        }  # fmt: skip
        self.parts = self.out / "parts"
        self.finished = (self.out / schema.MANIFEST).is_file()
        there = noted(self.out) or self.identity
        for key, value in self.identity.items():
            if there.get(key) != value:
                go_on = f"precision={there[key]}" if key == "precision" and key in there else "another folder"
                raise InputError(
                    f"{self.out}: holds latents of another run: {key} is {there.get(key)!r}, not {value!r}. "
                    f"Give {go_on}, or remove this one"
                )

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Make the folders, and within let no other command write there: for one process, before any writes. What a
        killed command left half-written is removed.

        Raises: InputError where a folder is refused, or another command writes these latents.
        """
        if self.finished:
            remove_marked(self.parts, "set.json")  # a kill may have left them
            yield
            return
        with disk_explained(str(self.out)):
            for folder in (self.parts, self.out / "shards"):
                folder.mkdir(parents=True, exist_ok=True)
        busy = f"{self.out}: another process is writing these latents. Wait for it, or end it"
        with locked(self.parts / "lock", busy):
            for folder in (self.out, self.parts, self.out / "shards", self.out / "index"):
                remove_left(folder)
            self._write(self.parts / "set.json", json.dumps(sealed(self.identity)).encode())
            yield

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are not written yet."""
        if self.finished:
            return []
        shards = self.cells.manifest.shards
        return [
            k for k, shard in enumerate(shards) if not (self._note(k).is_file() and (self.out / shard.path).is_file())
        ]

    def write_shard(self, shard: int, latents: np.ndarray | Iterable[np.ndarray]) -> None:
        """The latents (n, L, Z) of every cell of a shard in set order, at once or in pieces of any length."""
        entry, cells = self.cells.manifest.shards[shard], self.cells
        pieces = iter([latents] if isinstance(latents, np.ndarray) else latents)
        held = np.empty((0, *self.shape), np.float32)
        total, total_of_squares = np.zeros(self.shape), np.zeros(self.shape)
        columns = {name: cells.cell_column(name) for name in ("source", "row", "total_counts")}
        conditions = [cells.cell_column(f"condition.{name}") for name in cells.manifest.conditions.names]
        path, blocks = self.out / entry.path, list[_Block]()
        with (
            disk_explained(str(self.out)),
            written_aside(path) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for block in range(entry.first_block, entry.first_block + entry.n_blocks):
                record = cells.blocks[block]
                n, first = int(record["n_cells"]), int(record["first_cell"])
                while len(held) < n:
                    piece = next(pieces, None)
                    assert piece is not None, f"shard {shard}: fewer latents than its {entry.n_cells} cells"
                    assert piece.shape[1:] == self.shape, (piece.shape, self.shape)
                    held = np.concatenate([held, piece.astype(np.float32)])
                own, held = held[:n], held[n:]
                if not np.isfinite(own).all():
                    raise InputError(f"latents of {entry.path}, block {block}: not finite. The model is not usable")
                total += own.sum(0, dtype=np.float64)
                total_of_squares += np.square(own, dtype=np.float64).sum(0)
                here = slice(first, first + n)
                data = encode_latent_block(
                    own,
                    split=int(record["split"]),
                    total_counts=columns["total_counts"][here],
                    sources=columns["source"][here],
                    rows=columns["row"][here],
                    conditions=[c[here] for c in conditions],
                )
                member = tarfile.TarInfo(schema.member_name(block))
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                blocks.append(_Block(len(data), zlib.crc32(data)))
            assert not len(held), f"shard {shard}: more latents than its {entry.n_cells} cells"
            assert next(pieces, None) is None, f"shard {shard}: more latents than its {entry.n_cells} cells"
        size, sha = sha256_of(path)
        note = _Written(blocks, size, sha, total.tolist(), total_of_squares.tolist())
        self._write(self._note(shard), json.dumps(sealed(asdict(note))).encode())

    def finish(self) -> None:
        """Writes index and manifest, once every shard is there. Does nothing where they are."""
        if self.finished:
            return
        missing = self.missing_shards()
        assert not missing, f"{len(missing)} shards are missing, the first is {missing[0]}"
        source = self.cells.manifest
        notes = [self.written(k) for k in range(len(source.shards))]
        shards: list[ShardEntry] = []
        index = np.array(self.cells.blocks)
        for entry, note in zip(source.shards, notes):
            shards.append(replace(entry, bytes=note.bytes, sha256=note.tar_sha256))
            at = 0
            for block, made in enumerate(note.blocks, entry.first_block):
                record = index[block]
                record["offset"], record["length"], record["crc32"] = at + 512, made.length, made.crc32
                index[block] = record
                at += 512 + -(-made.length // 512) * 512
        files = []
        for path in [e.path for e in source.index]:
            kind, _, name = Path(path).stem.partition(".")
            values = index
            if path != schema.BLOCK_INDEX_PATH:
                values = self.cells.cell_column(name) if kind == "cells" else self.cells.gene_column(name)
            (self.out / path).parent.mkdir(parents=True, exist_ok=True)
            entry, data = schema.array_file(path, values)
            self._write(self.out / path, data)
            files.append(entry)
        extra = {**self.identity, **self._moments(notes)}
        manifest = replace(
            source, kind="latents", shards=tuple(shards), index=tuple(files), codec="none", codec_level=0, extra=extra
        )
        self._write(self.out / schema.MANIFEST, manifest.file())
        self.finished = True
        remove_marked(self.parts, "set.json")

    def _moments(self, notes: list[_Written]) -> dict[str, Any]:
        """Mean and standard deviation over the training cells, float64 (L, Z)."""
        manifest = self.cells.manifest
        train = [note for note, entry in zip(notes, manifest.shards) if manifest.splits[entry.split].name == "train"]
        n = sum(e.n_cells for e in manifest.shards if manifest.splits[e.split].name == "train")
        if not n:
            return {}
        mean = np.sum([note.sum for note in train], axis=0) / n
        variance = np.sum([note.sum_of_squares for note in train], axis=0) / n - mean**2
        return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 0)).tolist()}

    def _note(self, shard: int) -> Path:
        return self.parts / f"{shard:06d}.json"

    def written(self, shard: int) -> _Written:
        """What is noted of a shard that is written. Raises: InputError for a note that is damaged or changed."""
        try:
            return read_sealed(_Written, self._note(shard))
        except InputError as error:
            raise InputError(
                f"{error}. Remove this file and run the same command again: it encodes the shard anew"
            ) from None

    def _write(self, path: Path, data: bytes | memoryview) -> None:
        with disk_explained(str(self.out)):
            write_bytes(path, data)
