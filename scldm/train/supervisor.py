"""What surrounds a step: the watch over other ranks, requests from outside, the checkpoint that is being written, and
a profile.

The loop tells it where it is. Once a step, and once a validation batch, all ranks agree on what was asked and on how
far the checkpoint is: one message carries both. Many ranks agree once a second (requests.py).
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from scldm.parallel.watch import Watch
from scldm.train.profile import StepProfile
from scldm.train.requests import Asked, Requests
from scldm.train.saver import Saver


class Supervisor:
    """All methods but `mark` are collective.

    asked: what all ranks agreed on last
    """

    def __init__(self, watch: Watch, requests: Requests, saver: Saver, profile: StepProfile) -> None:
        self.watch, self.requests, self.saver, self.profile = watch, requests, saver, profile
        self.asked = Asked()

    def __enter__(self) -> Supervisor:
        self.saver.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.profile.close(written=kind is None)
        self.saver.__exit__(kind, error, tb)

    def mark(self, doing: str) -> None:
        """This rank is still alive, and does this."""
        self.watch.mark(doing)
        self.profile.mark(doing)

    def begin(self, step: int) -> None:
        """A step begins."""
        self._send()
        self.profile.step(step, self.requests.profile)

    def _send(self) -> None:
        """Send the other ranks what this one knows. It travels while they compute."""
        self.requests.begin(self.saver.failed, self.saver.unfinished)

    def agree(self, when: str, at_once: bool = False) -> None:
        """Set `asked` to what any rank knew at `begin`. A checkpoint that all ranks have written is made whole.

        at_once: wait for what is still on its way

        Raises: InputError on all ranks where one could not write its part.
        """
        self.mark(f"agrees on requests after {when}")
        self.asked = self.requests.end(at_once)
        self.saver.advance(self.asked.save_failed, self.asked.save_unfinished)

    def is_stopped(self, when: str) -> bool:
        """Whether the ranks agree, between two steps, that the run was asked to stop."""
        self._send()
        self.agree(when, at_once=True)
        return self.asked.stop > 0

    @property
    def wants_save(self) -> bool:
        return bool(self.asked.save or self.asked.stop)

    def save(self, state: dict[str, Any], is_best: bool) -> None:
        """Begin a checkpoint. Training waits while this rank's part is copied to host memory, and no longer."""
        self.mark(f"saves step {state['step']}")
        self.saver.begin(state, is_best)
        self.requests.save_begins()

    def answer(self, step: int, more: bool) -> None:
        """Where a save was asked for, wait for it, say so, and take the request away.

        more: whether steps are left to train

        Raises: Stopped where the run was asked to stop before its end.
        """
        if self.wants_save:
            self.saver.finish()
            if self.watch.world.is_first:
                print(f"scldm: saved step {step}, asked by {self.asked.reason}", file=sys.stderr, flush=True)
            self.requests.done(self.asked, more)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises: InputError, as `agree`."""
        self.saver.finish()
