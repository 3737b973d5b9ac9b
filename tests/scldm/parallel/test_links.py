"""The first rank lets in its ranks and nobody else, and no stranger holds it up."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from scldm.parallel.links import LONGEST, STRANGERS, Link, admit, listen

TOKEN = bytes(range(16))
STRANGE = {
    "says nothing": b"",
    "a number": b"5\n",
    "nested lists": b"[" * 200_000,
    "another token": bytes(20),
    "a part of the token": TOKEN[:9],
    "a web client": b"GET / HTTP/1.1\r\nHost: gpu03\r\n\r\n",
}


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with listen([("here", ["127.0.0.1"])]) as server:
        yield server


@pytest.fixture
def come(server: socket.socket) -> Iterator[Callable[[bytes], socket.socket]]:
    """Connects and says something."""
    with contextlib.ExitStack() as opened:

        def connect(said: bytes) -> socket.socket:
            link = opened.enter_context(socket.create_connection(server.getsockname(), timeout=5))
            with contextlib.suppress(OSError):  # it may be turned away before it has said all
                link.setblocking(False)
                link.send(said)
            link.settimeout(5)
            return link

        yield connect


def of_rank(number: int) -> bytes:
    return TOKEN + number.to_bytes(4, "big")


@contextlib.contextmanager
def admitted(server: socket.socket, n: int, within_s: float = 20.0) -> Iterator[dict[int, Link]]:
    found = admit(server, TOKEN, n, within_s)
    yield found
    for link in found.values():
        link.socket.close()


@pytest.mark.parametrize("said", STRANGE.values(), ids=STRANGE.keys())
def test_strangers_hold_up_nobody(server: socket.socket, come: Any, said: bytes) -> None:
    strangers = [come(said) for _ in range(3)]
    ranks = {number: come(of_rank(number)) for number in (2, 1)}
    began = time.monotonic()
    with admitted(server, 2) as found:
        assert time.monotonic() - began < 5
        assert found.keys() == {1, 2}
        for number, link in found.items():
            ranks[number].sendall(b'{"left": true}\n')
            assert link.receive() == [{"left": True}]
            link.send(where=True)
            assert ranks[number].recv(100) == b'{"where": true}\n'
    for stranger in strangers:  # all are turned away by then
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(1) == b""


def test_more_strangers_than_may_wait_do_not_keep_a_rank_out(server: socket.socket, come: Any) -> None:
    """The ones that came first are dropped: else each would hold a file for as long as it likes."""
    found = list[Any]()
    thread = threading.Thread(target=lambda: found.append(admit(server, TOKEN, 1)))
    thread.start()
    first, *_ = [come(b"") for _ in range(STRANGERS + 30)]
    assert first.recv(1) == b""
    come(of_rank(1))
    thread.join(20)
    assert found[0].keys() == {1}
    found[0][1].socket.close()


@pytest.mark.heavy
def test_a_rank_that_does_not_come_is_waited_for_no_longer_whatever_strangers_do(
    server: socket.socket, come: Any
) -> None:
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.2):
            come(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    come(of_rank(1))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"1 of 2 ranks did not connect to rank 0 within 2 s"):
        admit(server, TOKEN, 2, within_s=2.0)
    assert time.monotonic() - began < 10
    over.set()
    thread.join()


def test_one_interface_alone_is_listened_on(server: socket.socket) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.getsockname()[1]), timeout=5)


def test_the_interface_is_the_one_that_other_hosts_see() -> None:
    """A host may know itself by an address of its loopback, at which no other reaches it: Debian's 127.0.1.1."""
    with listen([("a", ["127.0.1.1"]), ("a", ["127.0.1.1"]), ("b", ["127.0.0.3"])]) as server:
        assert server.getsockname()[0] == "127.0.0.3"
    with listen([("a", ["127.0.1.1"]), ("a", ["127.0.1.1"])]) as server:
        assert server.getsockname()[0] == "127.0.1.1"


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(OSError, match=r"MASTER_ADDR must be rank 0's host, a. Its .*\['192.0.2.1'\]"):
        listen([("a", ["127.0.0.1"]), ("b", ["192.0.2.1"])])


def test_a_message_without_end_ends_the_link(server: socket.socket, come: Any) -> None:
    sender = come(of_rank(1))
    with admitted(server, 1) as found:
        thread = threading.Thread(target=sender.sendall, args=(b"[" * 2 * LONGEST,))
        thread.start()
        began = time.monotonic()
        while (messages := found[1].receive()) is not None:
            assert messages == []
        assert time.monotonic() - began < 20
        thread.join()
