"""No rank waits in vain: when one is gone, has failed or hangs, the others are told which, and stop.

A collective operation waits for all ranks. Without this, a rank that dies leaves the others waiting for minutes or for
ever, and what they report in the end is not the cause.

A thread of each rank reads its link (links.py). It ends the process when told to, since the main thread may be within
an operation that never returns. Messages:

    either way               stop, code: why all end, and with which exit code. left: nothing more to wait for
    the first to a rank      where: say where you are
    a rank to the first      at: where it is

A hang: `mark` notes how far the main thread came. All ranks make the same marks in the same order. Of those that stand
still, the one with the fewest is waited for. A stuck interpreter runs no thread of ours: then a timer of the C library
(faulthandler) writes the stacks and ends the process.

Reading order: Watch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import selectors
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from scldm.errors import LOST, InputError
from scldm.parallel import START_S, dist
from scldm.parallel.dist import World
from scldm.parallel.links import Link, meet

TICK_S = 0.5
ANSWER_S = 5.0  # in which a rank whose threads run says where it is
END_S = 60.0  # in which a process that failed ends. An operation that others left may not let it
SOONER_S = 60.0  # by which a hang is to be found before an exchange gives up, which would not say whose fault it is


class Watch:
    """Within `with Watch(world) as watch:`, on every rank, a failure on one ends all. Entering it is collective.

    folder: where `errors/rank-K.txt` and `stacks/rank-K.txt` are written, once there is one
    hang_s: seconds without a mark after which all stop. 0 for never. START_S more until the first
    on_end: is told why and with which exit code this process is about to be ended. It takes seconds at most
    """

    def __init__(self, world: World, hang_s: float = 0.0) -> None:
        self.world, self.hang_s = world, hang_s
        self.folder: Path | None = None
        self.on_end: Callable[[str, int], None] = lambda reason, code: None
        self.n_marks, self.doing, self.marked_at = 0, "starts", time.monotonic() + START_S
        self._timer_at = 0.0
        self._names: list[str] = []  # of every rank, as a person looks for it
        self._links: dict[int, Link] = {}
        self._left: set[int] = set()
        self._asked_at, self._answers = 0.0, dict[int, dict[str, Any]]()
        self._closing, self._ending, self._deciding = threading.Event(), False, threading.Lock()
        self._thread: threading.Thread | None = None
        self._main = threading.main_thread().ident

    def mark(self, doing: str) -> None:
        """The main thread goes on, with this."""
        now = time.monotonic()
        self.n_marks, self.doing, self.marked_at = self.n_marks + 1, doing, now
        if self.hang_s and now - self._timer_at > min(1.0, self.hang_s / 4):
            self._timer_at = now
            # the thread below acts first, if it can. File descriptor 2, since sys.stderr may be a test's
            faulthandler.dump_traceback_later(self.hang_s + 6 * ANSWER_S, exit=True, file=2)

    def let_first(self, work: Callable[[], None]) -> None:
        """The first rank alone does this, however long it takes. The others wait until it leaves, and end if it is
        gone. No hang is looked for any more: it is the last thing to do within."""
        self.marked_at = math.inf
        faulthandler.cancel_dump_traceback_later()
        if self.world.is_first:
            work()
        while not self.world.is_first and 0 not in self._left:
            time.sleep(TICK_S / 5)

    def __enter__(self) -> Watch:
        if self.world.size > 1:
            self._names, self._links = meet(self.world)
        if self.world.size > 1 or self.hang_s:
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        if error is not None and not isinstance(error, SystemExit):
            self._fail(error, tb)
        self._tell(left=True)
        with self._deciding:
            if not self._ending:
                self._closing.set()
        if self._thread is not None:
            self._thread.join(None if self._ending else ANSWER_S)  # which ends the process, if it has begun to

    def _fail(self, error: BaseException, tb: TracebackType | None) -> None:
        """Tell the others why this rank ends."""
        code = error.exit_code if isinstance(error, InputError) else 1
        what, why = ("refuses", f"{error}") if code != 1 else ("failed", f"{type(error).__name__}: {error}")
        own = not isinstance(error, Exception) or isinstance(error, torch.OutOfMemoryError)  # FSDP2 allocates there too
        in_collective = not own and _in_collective(traceback.walk_tb(tb))
        if in_vain := code == 1 and in_collective and self.world.size > 1:
            # most likely the consequence of what happened elsewhere: the thread hears of it, and ends the process
            time.sleep(2 * ANSWER_S)
            # nobody says why: a network that failed, or a rank that hangs longer than an exchange waits
            what, why, code = "waited in vain for another", why + self._where_stacks_are(), LOST
        reason = f"{self._named(self.world.rank)} {what}: {' '.join(why.split())}"
        self._note("".join(traceback.format_exception(error)))
        self._tell(stop=reason, code=code)
        if in_vain:
            self._dump()
            self._end(reason, LOST)
        elif self.world.size > 1:
            faulthandler.dump_traceback_later(END_S, exit=True, file=2)

    def _tell(self, **message: Any) -> None:
        for link in self._links.values():
            link.send(**message)

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, link in self._links.items():
                selector.register(link.socket, selectors.EVENT_READ, rank)
            while not self._closing.is_set():
                for key, _ in selector.select(TICK_S):
                    rank = key.data
                    messages = self._links[rank].receive()
                    if messages is None:
                        selector.unregister(key.fileobj)
                        if rank not in self._left:
                            self._stop_all(f"{self._named(rank)} is gone: its connection ended", LOST)
                    for message in messages or ():
                        self._hear(rank, message)
                if self.hang_s:
                    self._look_for_a_hang()

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        if "stop" in message:
            self._left.add(rank)  # it ends by itself
            if message["code"] == LOST:
                self._dump()  # this may be the rank that the others waited for
            self._stop_all(message["stop"], message["code"])
        elif "left" in message:
            self._left.add(rank)
        elif "where" in message:
            self._links[0].send(**self._whereabouts())
            self._dump()
        elif "at" in message:
            self._answers[rank] = message

    def _look_for_a_hang(self) -> None:
        still_s = time.monotonic() - self.marked_at
        if not self.world.is_first:
            if still_s > self.hang_s + 4 * ANSWER_S:  # the first would have asked
                self._dump()
                first = f"{self._named(0)} hangs: it does not ask why nothing goes on"
                own = f"{self._named(self.world.rank)} hangs, after rank 0 ended: it {self.doing} since {still_s:.0f} s"
                self._end(own if 0 in self._left else first, LOST)
        elif still_s < self.hang_s:
            self._asked_at = 0.0  # it went on by itself
        elif not self._asked_at:
            self._asked_at, self._answers = time.monotonic(), {0: self._whereabouts()}
            self._tell(where=True)
            self._dump()
        else:
            silent = set(range(self.world.size)) - self._answers.keys() - self._left
            if not silent or time.monotonic() - self._asked_at > ANSWER_S:
                self._stop_all(self._who_hangs(silent), LOST)

    def _whereabouts(self) -> dict[str, Any]:
        frame = sys._current_frames().get(self._main or 0)
        waits = frame is not None and _in_collective(traceback.walk_stack(frame))
        still_s = time.monotonic() - self.marked_at
        return {"at": self.n_marks, "doing": self.doing, "still_s": round(still_s, 1), "waits": waits}

    def _who_hangs(self, silent: set[int]) -> str:
        told = [f"{self._named(rank)} hangs: it does not answer" for rank in sorted(silent)]
        if not told:
            first = min(answer["at"] for answer in self._answers.values())
            behind = {rank: answer for rank, answer in sorted(self._answers.items()) if answer["at"] == first}
            # one that itself waits for the others, within a collective operation, is not the one
            culprits = {rank: answer for rank, answer in behind.items() if not answer["waits"]} or behind
            told = [
                f"{self._named(rank)} hangs: it {answer['doing']} since {answer['still_s']:.0f} s"
                for rank, answer in culprits.items()
            ]
        return "; ".join(told[:4]) + self._where_stacks_are()

    def _stop_all(self, reason: str, code: int) -> None:
        """On the first rank: tell the others, then end. On another: end."""
        if self.world.is_first:
            for rank, link in self._links.items():
                if rank not in self._left:
                    link.send(stop=reason, code=code)
        self._end(reason, code)

    def _end(self, reason: str, code: int) -> None:
        with self._deciding:
            if self._closing.is_set() or self._ending:
                return
            self._ending = True
        text = f"scldm: rank {self.world.rank} stops: {reason}"
        self._note(text + "\n")
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())
        with contextlib.suppress(Exception):  # whatever it is, this process ends
            self.on_end(reason, code)
        time.sleep(TICK_S)  # a connection that ends at once may lose what was just sent
        os._exit(code)  # the main thread may never come back

    # --- the folder ------------------------------------------------------------------------------------------------

    def _named(self, rank: int) -> str:
        return f"rank {rank} ({self._names[rank]})" if self._names else f"rank {rank}"

    def _where_stacks_are(self) -> str:
        return f". Stacks of all ranks: {self.folder / 'stacks'}" if self.folder else ""

    def _note(self, text: str) -> None:
        """Why this rank ended, into the run's folder."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                path = self.folder / "errors" / f"rank-{self.world.rank}.txt"
                path.parent.mkdir(exist_ok=True)
                path.write_text(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._named(self.world.rank)}\n{text}")

    def _dump(self) -> None:
        """The stacks of all threads, into the run's folder."""
        if self.folder is None:
            faulthandler.dump_traceback(2)
            return
        with contextlib.suppress(OSError):
            path = self.folder / "stacks" / f"rank-{self.world.rank}.txt"
            path.parent.mkdir(exist_ok=True)
            with path.open("w") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._named(self.world.rank)}: {self.doing}\n")
                file.flush()
                faulthandler.dump_traceback(file)


def _in_collective(frames: Iterable[tuple[FrameType, int]]) -> bool:
    """Whether a stack passes through torch.distributed, DeepSpeed's layer over it, or ours. So does one that waits in
    DeepSpeed for a parameter's parts, under ZeRO-3: torch's own code brings them, and has no frames here."""
    places = (os.path.join("torch", "distributed", ""), os.path.join("deepspeed", "comm", ""), dist.__file__)
    zero = os.path.join("deepspeed", "runtime", "zero", "")
    for frame, _ in frames:
        code = frame.f_code
        if any(place in code.co_filename for place in places) or (zero in code.co_filename and code.co_name == "wait"):
            return True
    return False
