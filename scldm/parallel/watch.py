"""No rank waits in vain: when one is gone, has failed or hangs, the others are told which, and stop.

A collective operation waits for all ranks. Without this, a rank that dies leaves the others waiting for minutes or for
ever, and what they report in the end is not the cause.

Each rank holds a TCP connection to the first. The kernel closes it when the process dies, and its keep-alive finds a
host that is gone: there is no heartbeat of ours, so that a busy interpreter is never taken for a dead one. A thread
reads it, and ends the process when told to, since the main thread may be within an operation that never returns.

    a rank to the first    hello; failed: what, exit code; left; at: where it is
    the first to a rank    stop: why, exit code; where: say where you are; left

A hang: `mark` notes how far the main thread came. All ranks make the same marks in the same order, so that of those
that stand still the one with the fewest is waited for. Should the interpreter itself be stuck, a timer of the C
library (faulthandler) still writes the stacks and ends the process.

Reading order: Watch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed

from scldm.errors import LOST, REFUSED, InputError
from scldm.parallel import dist
from scldm.parallel.dist import World

TICK_S = 0.5
START_S = 600.0  # data are opened, networks made and compiled
ANSWER_S = 5.0  # in which a rank whose threads run says where it is
SOONER_S = 60.0  # by which a hang is to be found before an exchange gives up, which would not say whose fault it is
# a host that is gone is found after 15 s + 3 x 5 s
KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}


class Watch:
    """Within `with Watch(world) as watch:`, on every rank, a failure on one ends all; collective to enter.

    folder: where `errors/rank-K.txt` and `stacks/rank-K.txt` are written, once there is one
    hang_s: seconds without a mark after which all stop; 0 for never. START_S more until the first
    on_end: is told why and with which exit code this process is about to be ended; takes seconds at most
    """

    def __init__(self, world: World, hang_s: float = 0.0) -> None:
        self.world, self.hang_s = world, hang_s
        self.folder: Path | None = None
        self.on_end: Callable[[str, int], None] = lambda reason, code: None
        self.n_marks, self.doing, self.marked_at = 0, "starts", time.monotonic() + START_S
        self._timer_at = 0.0
        self._names: dict[int, str] = {}  # of every rank, as a person looks for it: host and process
        self._lines: dict[int, _Lines] = {}  # to every other rank on the first, to the first on the others
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
            # the thread below acts first, if it can; file descriptor 2, since sys.stderr may be a test's
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
            self._connect()
        if self.world.size > 1 or self.hang_s:
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        if error is None or isinstance(error, SystemExit):
            self._leave()
            return
        code = error.exit_code if isinstance(error, InputError) else 1
        text = str(error) if code != 1 else " ".join(f"{type(error).__name__}: {error}".split())
        of_torch = code == 1 and isinstance(error, Exception) and _in_collective(traceback.walk_tb(tb))
        if in_vain := of_torch and self.world.size > 1:
            # most likely the consequence of what happened elsewhere: the thread hears of it, and ends the process
            time.sleep(2 * ANSWER_S)
            code = LOST  # nobody says why: a link, or a rank that hangs longer than an exchange waits
        self._note("".join(traceback.format_exception(error)))
        message = {"failed": text, "code": code, "in_vain": in_vain}
        stop = self._as_stop(message, self.world.rank)
        for line in self._lines.values():
            line.send(stop if self.world.is_first else message)
        if in_vain:
            self._dump()
            self._end(stop["stop"], LOST)
        self._leave()
        if self.world.size > 1:  # what is left to do is to end; an operation that others left may not let it
            faulthandler.dump_traceback_later(60, exit=True, file=2)

    # --- the connections -------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Raises: OSError where a rank can't reach the first one's host."""
        name = f"{socket.gethostname()}, process {os.getpid()}"
        server, offer = None, [None]
        if self.world.is_first:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", 0), family=family, backlog=self.world.size, dualstack_ipv6=both)
            server.settimeout(60)
            offer = [{"port": server.getsockname()[1], "token": secrets.token_hex(8)}]
        torch.distributed.broadcast_object_list(offer, src=0)
        assert offer[0] is not None
        if server is None:
            link = socket.create_connection((os.environ["MASTER_ADDR"], offer[0]["port"]), timeout=60)
            self._lines[0] = _Lines(link)
            self._lines[0].send({"hello": self.world.rank, "token": offer[0]["token"]})
        while server is not None and len(self._lines) < self.world.size - 1:
            line = _Lines(server.accept()[0])
            hello = line.receive_one()
            if hello.get("token") == offer[0]["token"]:
                self._lines[hello["hello"]] = line
        if server is not None:
            server.close()
        self._names = dict(enumerate(self.world.gather(name)))

    def _leave(self) -> None:
        """This rank has nothing more to wait for."""
        for line in self._lines.values():
            line.send({"left": self.world.rank})
        with self._deciding:
            if not self._ending:
                self._closing.set()
        if self._thread is not None:
            self._thread.join(None if self._ending else ANSWER_S)  # which ends the process, if it has begun to

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, line in self._lines.items():
                selector.register(line.link, selectors.EVENT_READ, rank)
            while not self._closing.is_set():
                for key, _ in selector.select(TICK_S):
                    rank = key.data
                    messages = self._lines[rank].receive()
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
            if message["code"] == LOST:
                self._dump()  # this may be the rank that the others waited for
            self._end(message["stop"], message["code"])
        elif "failed" in message:
            self._left.add(rank)
            stop = self._as_stop(message, rank)
            self._stop_all(stop["stop"], stop["code"])
        elif "left" in message:
            self._left.add(rank)
        elif "where" in message:
            self._lines[0].send(self._whereabouts())
            self._dump()
        elif "at" in message:
            self._answers[rank] = message

    def _as_stop(self, failed: dict[str, Any], rank: int) -> dict[str, Any]:
        what = "refuses" if failed["code"] in (REFUSED, LOST) else "failed"
        if failed["in_vain"]:
            where = f"; stacks of all ranks: {self.folder / 'stacks'}" if self.folder else ""
            return {"stop": f"{self._named(rank)} waited in vain for another: {failed['failed']}{where}", "code": LOST}
        return {"stop": f"{self._named(rank)} {what}: {failed['failed']}", "code": failed["code"]}

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
            for line in self._lines.values():
                line.send({"where": True})
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
        where = f"; stacks of all ranks: {self.folder / 'stacks'}" if self.folder else ""
        if silent:
            told = "; ".join(f"{self._named(rank)} hangs: it does not answer" for rank in sorted(silent)[:4])
            return told + where
        first = min(answer["at"] for answer in self._answers.values())
        behind = {rank: answer for rank, answer in self._answers.items() if answer["at"] == first}
        # one that itself waits for the others, within a collective operation, is not the one
        culprits = {rank: answer for rank, answer in behind.items() if not answer["waits"]} or behind
        told = "; ".join(
            f"{self._named(rank)} hangs: it {answer['doing']} since {answer['still_s']:.0f} s"
            for rank, answer in sorted(culprits.items())[:4]
        )
        return told + where

    def _stop_all(self, reason: str, code: int) -> None:
        """On the first rank: tell the others, then end. On another: end."""
        if self.world.is_first:
            for rank, line in self._lines.items():
                if rank not in self._left:
                    line.send({"stop": reason, "code": code})
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
        return f"rank {rank} ({self._names[rank]})" if rank in self._names else f"rank {rank}"

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


class _Lines:
    """JSON, a line a message, over a connection that the kernel watches."""

    def __init__(self, link: socket.socket) -> None:
        self.link, self.rest, self.sending = link, b"", threading.Lock()
        link.settimeout(60)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # Linux has all of them
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict[str, Any]) -> None:
        """A connection that ended is noticed by who reads it."""
        with self.sending, contextlib.suppress(OSError):
            self.link.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that are whole by now; None where the connection has ended."""
        try:
            data = self.link.recv(65_536)
        except OSError:
            return None
        if not data:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def receive_one(self) -> dict[str, Any]:
        """The first message; empty where none comes that is one."""
        try:
            while not (messages := self.receive()):
                if messages is None:
                    return {}
            return messages[0]
        except ValueError:
            return {}


def _in_collective(frames: Any) -> bool:
    """Whether a stack passes through torch.distributed, DeepSpeed's layer over it, or ours."""
    places = (os.path.join("torch", "distributed", ""), os.path.join("deepspeed", "comm", ""), dist.__file__)
    return any(place in frame.f_code.co_filename for frame, _ in frames for place in places)
