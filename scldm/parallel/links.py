"""A connection of every rank to the first one, over which ranks say why they stop.

The kernel closes it when the process at the other end dies, and its keep-alive finds a host that is gone. So a busy
interpreter is never taken for a dead one, as a heartbeat of ours would. torch's TCPStore can't stand in for it. The
store tells nobody whose connection ended, and it listens on every interface.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
from typing import Any

from scldm.parallel.dist import World

MEET_S = 60.0  # in which all ranks connect: they come from a collective, so all are there
TOKEN, RANK = 16, 4  # bytes of what a rank says first
STRANGERS = 64  # connections that may wait to say it, besides those of the ranks
LONGEST = 1 << 16  # bytes of a message
# a host that is gone is found after 15 s + 3 x 5 s
KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}


def meet(world: World) -> tuple[list[str], dict[int, Link]]:
    """(a name for every rank, links by rank): the first rank has one to every other, another one to the first.
    Collective.

    The first rank listens until all are there, on one interface, at a port that the system chooses. Address and token
    reach the others through the process group, which met in the launcher's store.

    Raises: OSError where the first rank can't listen, or another can't reach it.
    """
    host = socket.gethostname()
    of_first = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_STREAM)
    addresses = [str(address[0]) for *_, address in of_first]
    seen = world.gather((host, f"{host}, process {os.getpid()}", addresses))
    server = listen([(host, addresses) for host, _, addresses in seen]) if world.is_first else None
    address, token = world.of_first(server and (server.getsockname()[:2], secrets.token_bytes(TOKEN)))
    if server is not None:
        with server:
            links = admit(server, token, world.size - 1)
    else:
        link = socket.create_connection(address, timeout=MEET_S)
        link.sendall(token + world.rank.to_bytes(RANK, "big"))
        links = {0: Link(link)}
    return [name for _, name, _ in seen], links


def listen(seen: list[tuple[str, list[str]]]) -> socket.socket:
    """On the interface by which ranks of other hosts see the first rank's host, or by which it sees itself.

    seen: of every rank, its host and the addresses that MASTER_ADDR has there
    """
    (own_host, own), *others = seen
    elsewhere = [address for host, addresses in others if host != own_host for address in addresses]
    candidates = list(dict.fromkeys(elsewhere or own))
    for address in candidates:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError):
            return socket.create_server((address, 0), family=family, backlog=len(seen) + STRANGERS)
    raise OSError(f"MASTER_ADDR must be rank 0's host, {own_host}. Its addresses {candidates} are not of this host")


def admit(server: socket.socket, token: bytes, n: int, within_s: float = MEET_S) -> dict[int, Link]:
    """Links to n ranks, by rank: to those that show the token. Strangers hold up nobody, whatever they send or don't.

    Raises: TimeoutError where not all are there in time.
    """
    links, waiting, end = dict[int, Link](), dict[socket.socket, bytes](), time.monotonic() + within_s
    with selectors.DefaultSelector() as selector:

        def dismiss(link: socket.socket) -> None:
            selector.unregister(link)
            waiting.pop(link)
            link.close()

        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)
        while len(links) < n and (left_s := end - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                link: Any = key.fileobj
                if link is server:
                    with contextlib.suppress(OSError):
                        link, _ = server.accept()
                        link.setblocking(False)
                        waiting[link] = b""
                        selector.register(link, selectors.EVENT_READ)
                    if len(waiting) > n + STRANGERS:  # a rank speaks at once, so the oldest is none
                        dismiss(next(iter(waiting)))
                elif link in waiting:
                    try:
                        data = link.recv(TOKEN + RANK - len(waiting[link]))
                    except OSError:
                        data = b""
                    waiting[link] += data
                    if len(waiting[link]) == TOKEN + RANK and hmac.compare_digest(waiting[link][:TOKEN], token):
                        selector.unregister(link)
                        links[int.from_bytes(waiting.pop(link)[TOKEN:], "big")] = Link(link)
                    elif not data or len(waiting[link]) == TOKEN + RANK:
                        dismiss(link)
        for link in list(waiting):
            dismiss(link)
    if len(links) < n:
        for link in links.values():
            link.socket.close()
        raise TimeoutError(f"{n - len(links)} of {n} ranks did not connect to rank 0 within {within_s:g} s")
    return links


class Link:
    """Messages to and from another rank: JSON, a line each."""

    def __init__(self, link: socket.socket) -> None:
        self.socket, self._rest, self._sending = link, b"", threading.Lock()
        link.settimeout(MEET_S)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # Linux has all of them
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """A connection that ended is noticed by who reads it."""
        with self._sending, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that are whole by now. None where the connection has ended."""
        try:
            data = self.socket.recv(LONGEST)
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines] if data and len(self._rest) < LONGEST else None
