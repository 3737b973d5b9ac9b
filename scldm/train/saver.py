"""Writes checkpoints while training goes on. The format is in checkpoint.py.

    begin     copy what this rank holds to host memory: all that training waits for
    a thread  write it as this rank's stretch of its node's part (parts.py), aside, hash and sync it
    advance   every stretch is on disk (told with the step's requests): on the first rank, a thread writes
              state.json, renames the folder, moves `best`, then `latest`, and removes what is not kept
    finish    wait for what is under way

No rank gathers another's tensors. Before the first save all hear once which numbers each holds. After that no message
but the step's own is sent. A failure on any rank is raised on all.

Reading order: Saver, own_share, complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from scldm.errors import InputError
from scldm.files import PARTIAL, put_in_place, sha256_of, write_bytes
from scldm.given_json import sorted_json
from scldm.parallel.dist import World
from scldm.parallel.surface import Engine
from scldm.train import steps
from scldm.train.checkpoint import BUFFERS, FORMAT
from scldm.train.ema import EMA
from scldm.train.parts import Layout, layouts, node
from scldm.weights import write_weights


class Saver(contextlib.AbstractContextManager["Saver"]):
    """Saves into `run_dir/checkpoints`, one checkpoint at a time. All methods but the properties are collective.

    keep, keep_every: see steps.retain
    """

    def __init__(self, run_dir: Path, engine: Engine, ema: EMA, world: World, keep: int, keep_every: int = 0) -> None:
        self.run_dir, self.folder = run_dir, run_dir / "checkpoints"
        self.engine, self.ema, self.world = engine, ema, world
        self.keep, self.keep_every = keep, keep_every
        self._host: dict[str, Tensor] = {}
        self._own: tuple[Layout, int] | None = None
        self._parts: list[Layout] = []
        self._phase: Literal["idle", "parts", "commit"] = "idle"
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._state: dict[str, Any] = {}
        self._is_best = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """After a failure a lone rank still ends what it began. Many could not agree that they have."""
        if self.world.size == 1 and error is not None and not self.failed:
            with contextlib.suppress(InputError):
                self.finish()

    @property
    def failed(self) -> bool:
        """Whether this rank could not write."""
        return self._error is not None

    @property
    def unfinished(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, state: dict[str, Any], is_best: bool = False) -> None:
        """Begin to save. Returns when nothing that training changes is needed any more.

        is_best: point `best` at it too, before `latest`, since a run that resumes from here takes its metric for best
        """
        self.finish()
        self._copy()
        self._state = {**state, "n_updates": self.ema.n_updates}
        self._is_best, self._phase = is_best, "parts"
        if self._own is None:
            ranges = {piece.name: (piece.start, piece.stop) for piece in self.engine.pieces}
            parts = layouts(*zip(*self.world.gather((node(), ranges)), strict=True))
            self._own = [(part, k) for part in parts for k in range(len(part.ranges))][self.world.rank]
            part, k = self._own
            outlines = self.world.gather(part.outline if k == 0 else None)  # each made once, where it is written
            self._parts = parts if self.world.is_first else []  # of a thousand ranks they take 30 MB
            for part, outline in zip(self._parts, (of for of in outlines if of), strict=False):
                part.take_outline(outline)
        part, k = self._own
        self._start(lambda: part.write(self._aside, k, lambda kind, name: self._host[f"{kind}/{name}"]))

    def advance(self, failed: bool, unfinished: bool) -> None:
        """Go on where all ranks are through with what is under way. Takes what `failed` and `unfinished` are on any.

        Raises: InputError on all ranks where one could not write.
        """
        if failed:
            self._raise()
        if unfinished or self._phase == "idle":
            return
        self._thread = None
        if self._phase == "commit":
            self._phase = "idle"
            return
        self._phase = "commit"
        if self.world.is_first:
            self._start(self._commit)

    def finish(self) -> None:
        """Wait until the checkpoint under way, if any, is durable. Raises: InputError, as `advance`."""
        while self._phase != "idle":
            if self._thread is not None:
                self._thread.join()
            self.advance(bool(self.world.begin_max([int(self.failed)])()[0]), False)

    @property
    def _aside(self) -> Path:
        return self._target.with_suffix(PARTIAL)

    @property
    def _target(self) -> Path:
        return self.folder / f"step-{self._state['step']:08d}"

    def _copy(self) -> None:
        """What this rank holds into host memory, which is kept for the next time: fresh pages cost more than a copy."""
        on_gpu = self.world.device.type == "cuda"
        for key, value in own_share(self.engine, self.ema, self.world).items():
            if key not in self._host:
                self._host[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=on_gpu)
            self._host[key].copy_(value, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize(self.world.device)

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised on all ranks by `advance`
                self._error = error

        self._thread = threading.Thread(target=run, name="save")
        self._thread.start()

    def _commit(self) -> None:
        shapes = {name: list(shape) for name, shape in self.engine.shapes.items()}
        buffers = {name: self._host[f"buffer/{name}"] for name, _ in self.engine.module.named_buffers()}
        complete(self._aside, self._parts, buffers, {**self._state, "shapes": shapes}, self.run_dir)
        put_in_place(self._aside, self._target)  # which may be there, of a run that went on from an earlier step
        if self._is_best:
            steps.point(self.folder / "best", self._target)
        steps.point(self.folder / "latest", self._target)
        for error in steps.retain(self.folder, self.keep, self.keep_every):  # the one that was saved is durable
            print(f"scldm: an old checkpoint can't be removed: {error}", file=sys.stderr, flush=True)

    def _raise(self) -> None:
        if self._thread is not None:
            self._thread.join()
        told = self.world.gather(f"{type(self._error).__name__}: {self._error}" if self._error else "")
        if self.world.is_first:
            shutil.rmtree(self._aside, ignore_errors=True)  # it may be what fills the disk
        last = steps.pointed(self.folder / "latest")
        where = "; ".join(f"rank {rank}: {' '.join(text.split())}" for rank, text in enumerate(told) if text)
        self._phase, self._thread, self._error = "idle", None, None
        raise InputError(
            f"{self._target} could not be written ({where}). "
            f"The last whole checkpoint is {last.name if last else 'none'}. The same command resumes from it"
        )


def own_share(engine: Engine, ema: EMA, world: World) -> dict[str, Tensor]:
    """What this rank writes: its pieces, and on the first rank the buffers."""
    share: dict[str, Tensor] = {}
    for piece, ema_weight in zip(engine.pieces, ema.weights, strict=True):
        for kind, value in {"weight": piece.weight, "ema": ema_weight, **piece.moments}.items():
            share[f"{kind}/{piece.name}"] = value.detach()
    if world.is_first:
        share |= {f"buffer/{name}": buffer.detach() for name, buffer in engine.module.named_buffers()}
    return share


def complete(
    aside: Path, parts: Sequence[Layout], buffers: Mapping[str, Tensor], state: dict[str, Any], run_dir: Path
) -> None:
    """Make a checkpoint of a folder in which the parts lie. It is one, once it has its name.

    run_dir: where the config and the vocabularies are
    """
    noted, files = {part.name: part.noted(aside) for part in parts}, {}
    write_weights(aside / BUFFERS, buffers, buffers, {"format": "pt"})
    for name in steps.BESIDE:
        with contextlib.suppress(FileNotFoundError):
            write_bytes(aside / name, (run_dir / name).read_bytes())
    for name in (BUFFERS, *steps.BESIDE):
        if (aside / name).is_file():
            n_bytes, sha256 = sha256_of(aside / name)
            files[name] = {"sha256": sha256, "bytes": n_bytes}
    state = json.loads(json.dumps({"format": FORMAT, **state}, allow_nan=False))
    text = sorted_json({**state, "parts": noted, "files": files})  # once: training waits for the interpreter meanwhile
    sealed = f'{{"sha256": "{hashlib.sha256(text).hexdigest()}", "state": '.encode() + text + b"}"
    write_bytes(aside / steps.STATE, sealed)
