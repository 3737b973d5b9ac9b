"""What the model makes of held-out cells while it trains, at validations: figures, and metrics of the split `preview`.

    RUN/previews/step-N.png

The first rank makes a preview with the EMA of the weights, while the others wait. It changes nothing of the training:
random states stay as they were. Where one fails, or two take too long, a line says why, and the run goes on without.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scldm.errors import InputError
from scldm.files import write_bytes
from scldm.train.run_folder import PREVIEWS
from scldm.train.tracking import Tracker

SPLIT = "preview"
FIRST_S = 20.0  # what the first preview is taken to cost: packages are imported, cells read, a map fitted
MOST_S = 300.0  # of one preview, while the other ranks wait


class LeftOut(Exception):
    """The run was asked to stop while a preview was made."""


@dataclass(frozen=True)
class Preview:
    """metrics: by name, as they are tracked. image: a PNG file"""

    metrics: Mapping[str, float]
    image: bytes


Check = Callable[[], None]  # raises TimeoutError where the preview has taken too long
Make = Callable[[int, Check], Preview]  # of a step


class Previews:
    """Makes previews, as long as all of them take a small share of the run's time.

    share: of the time since this start, as train.preview_share has it. 1 is a preview at each validation
    make: what makes one, with the weights as they are then. None on all ranks but the first, and where there are none
    limit_s: of one preview, where that is less than MOST_S: others must not take it for a hang
    is_asked_to_stop: whether the run is to end soon. Then a preview is left out
    """

    def __init__(
        self,
        run_dir: Path,
        tracker: Tracker,
        make: Make | None,
        share: float,
        limit_s: float = MOST_S,
        device: torch.device | None = None,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run_dir, self.tracker, self.share = run_dir, tracker, share
        self.limit_s, self.is_asked_to_stop = min(MOST_S, limit_s), is_asked_to_stop
        self.device = device or torch.device("cpu")
        self._make = make if share else None
        self._began, self._spent_s, self._last_s = time.monotonic(), 0.0, FIRST_S
        self._was_late = False

    @property
    def is_due(self) -> bool:
        """Whether one more fits into the share of the time."""
        if self._make is None:
            return False
        allowed_s = self.share * (time.monotonic() - self._began)
        return self.share == 1 or self._spent_s + self._last_s <= allowed_s

    def at(self, step: int, cells_seen: int) -> None:
        """A validation is done, and the EMA is still applied: make a preview if one is due."""
        if self._make is None or not self.is_due:
            return
        began = time.monotonic()

        def check() -> None:
            if self.is_asked_to_stop():
                raise LeftOut
            if time.monotonic() - began > self.limit_s:
                raise TimeoutError(f"it took more than {self.limit_s:g} s")

        path = self.run_dir / PREVIEWS / f"step-{step:08d}.png"
        try:
            with apart(self.device):
                made = self._make(step, check)
            path.parent.mkdir(exist_ok=True)
            write_bytes(path, made.image)
        except LeftOut:
            return
        except TimeoutError as error:
            self._spent_s, self._last_s = self._spent_s + self.limit_s, self.limit_s
            self._make, self._was_late = None if self._was_late else self._make, True
            then = "The next one waits longer" if self._make else "There are no more previews"
            print(f"scldm: no preview of step {step}: {error}. {then}", file=sys.stderr, flush=True)
            return
        except Exception as error:  # whatever it is: no preview is worth a run
            self._make = None
            told = f"{error}" if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            why = " ".join(told.split()).removesuffix(":")
            print(f"scldm: no more previews, as that of step {step} failed: {why}", file=sys.stderr, flush=True)
            return
        self._last_s = time.monotonic() - began
        self._spent_s += self._last_s
        metrics = {**made.metrics, "seconds": self._last_s}
        self.tracker.log(step, metrics, split=SPLIT, cells_seen=cells_seen)
        self.tracker.log_artifact(path, PREVIEWS)


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Within, random numbers may be drawn and networks run at other sizes. Afterwards training finds all as it was."""
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    # a compiled block that meets other sizes would be compiled anew, and its sums would have another order
    stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            stance("force_eager") if stance else nullcontext(),
        ):
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numpys)  # noqa: NPY002
