"""One of two ranks that watches each other and does nothing else; what it meets is its one argument.

python -m tests.scldm.parallel.two_ranks nothing
"""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
import sys
import time

from scldm.parallel import links, watch
from scldm.parallel.dist import close_world, world_of_environment

HANG_S = 1.0


def main(meets: str) -> None:
    world = world_of_environment()
    world.join()
    watch.ANSWER_S, watch.END_S = 0.5, 1.0
    if meets == "strangers" and not world.is_first:
        links.socket = AmongStrangers()  # pyright: ignore[reportAttributeAccessIssue]
    with watch.Watch(world, 0.0 if meets == "an end of its host" else HANG_S) as watching:
        print("watches", flush=True)
        if meets in ("strangers", "nothing"):
            return
        watching.mark("sleeps")
        if not world.is_first and meets == "an interpreter that is stuck":
            ctypes.PyDLL(None).sleep(600)  # holds the lock of the interpreter
        if not world.is_first and meets == "an end that never comes":
            atexit.register(time.sleep, 600)
            raise ValueError("in vain")
        time.sleep(600)


class AmongStrangers:
    """The socket module, for a rank that comes last to the first one's port."""

    def __getattr__(self, name: str) -> object:
        return getattr(socket, name)

    def create_connection(self, address: tuple[str, int], timeout: float) -> socket.socket:
        self.kept = [socket.create_connection(address, timeout) for _ in range(5)]
        for stranger, said in zip(self.kept, (b"", b"5\n", b"[" * 200_000, b"GET / HTTP/1.1\r\n\r\n", b"\0" * 20)):
            stranger.setblocking(False)
            stranger.send(said)
        return socket.create_connection(address, timeout)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
    close_world()
    print("ends as it should", os.getpid(), flush=True)
