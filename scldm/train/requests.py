"""What a run is asked from outside while it trains, and how all ranks come to know it at the same step.

    a signal (SIGTERM, SIGUSR1 by default), to any rank    save, then exit with code 85: to be started again
    a file `stop` in the run folder                        save, then exit with code 86
    a file `save` in the run folder                        save, and go on
    a file `profile` in the run folder                     the first rank profiles some steps, see profile.py

Ranks see a signal at different times, and the first rank alone looks for the files. So a step begins with one
all-reduce of a few integers over gloo, on the CPU. It is on its way while the step is computed, and the step ends with
its result: what any rank knew when it began the step, all know when they end it. A validation pass asks after every
batch. Gloo's all-reduce is a ring of all ranks. Many ranks give it as many steps as take a second, and all act at one
step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from scldm.errors import REQUEUE, STOPPED, InputError, Stopped
from scldm.parallel.dist import World

STOP_FILE, SAVE_FILE, PROFILE_FILE = "stop", "save", "profile"
LOOK_EVERY_S = 1.0  # on a shared file system, looking is a request to its server
PATIENCE_S = 1.0  # within which one Ctrl-C may come twice: from the terminal, and from torchrun
RANKS = 1 << 24  # signal and rank are told in one integer
# from so many ranks on, an all-reduce may be on its way for so long, and for so many steps, should these become slower
MANY, WITHIN_S, MOST_STEPS = 128, 1.0, 20


@dataclass(frozen=True)
class Asked:
    """stop: the exit code to stop with, 0 to go on
    reason: who asked
    save: whether to save at this step
    save_failed, save_unfinished: on any rank
    """

    stop: int = 0
    reason: str = ""
    save: bool = False
    save_failed: bool = False
    save_unfinished: bool = False


class Requests:
    """Within it the signals are caught. Afterwards they are what they were. A second Ctrl-C, a second or more after
    the first signal, ends the process at once.

    signals: names, such as SIGTERM
    """

    def __init__(self, run_dir: Path, signals: tuple[str, ...], world: World) -> None:
        self.run_dir, self.world = run_dir, world
        self.signals = [signal_named(name) for name in signals]
        self.caught, self._caught_at = 0, 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._looked_at, self._files = 0.0, (0, 0)
        self.profile = False  # known to the first rank alone, which needs no other for it
        self._wait: Callable[[], list[int]] | None = None
        self._steps, self._of, self._began = 0, 1, 0.0  # steps since what was told began, those that it has, and when
        self._saves = False  # whether a save began after what is on its way was told

    def __enter__(self) -> Requests:
        self._before = {number: signal.signal(number, self._catch) for number in self.signals}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self, save_failed: bool, save_unfinished: bool) -> None:
        """Tell the other ranks what this one knows, unless what it told before is still on its way. Collective."""
        if self._wait is not None:
            return
        now = time.monotonic()
        step_ms = int(1e3 * (now - self._began) / self._steps) if self._began else 0
        self._steps, self._began, self._saves = 0, now, False
        caught = self.caught * RANKS + self.world.rank if self.caught else 0
        told = [caught, *self._look(), int(save_failed), int(save_unfinished), step_ms]
        self._wait = self.world.begin_max(told)

    def save_begins(self) -> None:
        """What is on its way says nothing of this save."""
        self._saves = self._wait is not None

    def end(self, at_once: bool = False) -> Asked:
        """What any rank told when this step began. Nothing while that may still be on its way. Collective.

        at_once: wait for it, as after what is no step
        """
        assert self._wait is not None
        self._steps += 1
        if self._steps < self._of and not at_once:
            return Asked(save_unfinished=True)
        (caught, stop, save, save_failed, save_unfinished, step_ms), self._wait = self._wait(), None
        self._of = 1 if at_once else steps_between(self.world.size, step_ms)
        self._began = 0.0 if at_once else self._began  # its time says nothing of a step's
        code, reason = 0, ""
        if stop:
            code, reason = STOPPED, f"the file {self.run_dir / STOP_FILE}"
        elif caught:
            code, reason = REQUEUE, f"{signal.Signals(caught // RANKS).name} on rank {caught % RANKS}"
        elif save:
            reason = f"the file {self.run_dir / SAVE_FILE}"
        return Asked(code, reason, bool(save), bool(save_failed), bool(save_unfinished) or self._saves)

    def done(self, asked: Asked, more: bool) -> None:
        """The checkpoint that was asked for is durable: take the files away, so that they ask once.

        more: whether there is anything left to train

        Raises: Stopped where the run was asked to stop before its end.
        """
        if self.world.is_first:
            for wanted, name in ((asked.stop == STOPPED, STOP_FILE), (asked.save, SAVE_FILE)):
                if wanted:
                    (self.run_dir / name).unlink(missing_ok=True)
        self._looked_at = 0.0
        if asked.stop and more:
            raise Stopped(asked.stop, asked.reason)

    def _catch(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.caught and now - self._caught_at > PATIENCE_S:
            raise KeyboardInterrupt  # who presses Ctrl-C again does not wait for the save
        self.caught, self._caught_at = self.caught or number, now

    def _look(self) -> tuple[int, int]:
        if self.world.is_first and time.monotonic() - self._looked_at > LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            self._files = (int((self.run_dir / STOP_FILE).exists()), int((self.run_dir / SAVE_FILE).exists()))
            self.profile = (self.run_dir / PROFILE_FILE).exists()
        return self._files


def steps_between(n_ranks: int, step_ms: int) -> int:
    """Steps that an all-reduce has to come, where the slowest rank's step takes `step_ms`."""
    return min(MOST_STEPS, max(1, int(1e3 * WITHIN_S / step_ms))) if n_ranks >= MANY and step_ms else 1


def signal_named(name: str) -> signal.Signals:
    """Raises: InputError for a name that is no signal's, or one that no process can catch."""
    number = getattr(signal.Signals, name, None)
    if number is None or number in (signal.SIGKILL, signal.SIGSTOP):
        raise InputError(f"train.stop_signals: {name} is no signal that a process can catch. SIGTERM and SIGUSR1 are")
    return number
