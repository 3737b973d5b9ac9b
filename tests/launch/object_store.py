"""An S3 of this machine (moto's), behind faults that a test asks for.

Reading order: ObjectStore, its faults.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

KEY = "known"  # the access key that the store knows
BUCKET = "atlas"
Answer = Callable[..., Any]  # WSGI's start_response


@dataclass
class ObjectStore:
    """kind: the next fault, a method's name below; it befalls each `every`-th request that `concerns` a method and a
    part of the path, `left` times at most. `requests`: all that came, `faults`: those that met one."""

    kind: str = ""
    every: int = 1
    left: int = 0
    concerns: tuple[str, str] = ("", "")
    requests: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.lock, self.matching = threading.Lock(), 0
        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def meet(self, kind: str, *, every: int = 1, times: int = 10**9, method: str = "GET", path: str = "") -> None:
        """From now on this fault. Without a kind: none."""
        self.kind, self.every, self.left, self.concerns = kind, every, times, (method, path)
        self.matching, self.faults = 0, []

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def __call__(self, environ: dict[str, Any], start: Answer) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        method, path = self.concerns
        with self.lock:
            self.requests.append(request)
            mine = bool(self.kind) and request.startswith(method) and path in request
            self.matching += mine
            met = mine and self.left > 0 and self.matching % self.every == 0
            if met:
                self.left -= 1
                self.faults.append(request)
        given = environ.get("HTTP_AUTHORIZATION", "")
        if f"Credential={KEY}/" not in given:
            return self.refusal(
                environ, start, "403 Forbidden", "InvalidAccessKeyId", "The AWS Access Key Id does not exist."
            )
        return getattr(self, self.kind)(environ, start) if met else self.app(environ, start)

    def refusal(self, environ: dict[str, Any], start: Answer, status: str, code: str, message: str) -> list[bytes]:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else text]

    # --- faults

    def busy(self, environ: dict[str, Any], start: Answer) -> Iterable[bytes]:
        """As S3 answers who asks too often."""
        return self.refusal(environ, start, "503 Slow Down", "SlowDown", "Please reduce your request rate.")

    def forbidden(self, environ: dict[str, Any], start: Answer) -> Iterable[bytes]:
        return self.refusal(environ, start, "403 Forbidden", "AccessDenied", "Access Denied")

    def slow(self, environ: dict[str, Any], start: Answer) -> Iterable[bytes]:
        time.sleep(0.3)
        return self.app(environ, start)

    def cut(self, environ: dict[str, Any], start: Answer) -> Iterator[bytes]:
        """The connection ends in the middle of what its header announced."""
        data = b"".join(self.app(environ, start))
        yield data[: len(data) // 2]

    def damaged(self, environ: dict[str, Any], start: Answer) -> Iterator[bytes]:
        """As many bytes as announced, and one of them another."""
        data = bytearray(b"".join(self.app(environ, start)))
        if data:
            data[len(data) // 2] ^= 1
        yield bytes(data)


def credentials(store: ObjectStore, key: str = KEY) -> dict[str, str]:
    """The variables with which clients reach the store, those of TileDB too."""
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": store.url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "TILEDB_VFS_S3_ENDPOINT_OVERRIDE": store.url.removeprefix("http://"),
        "TILEDB_VFS_S3_SCHEME": "http",
        "TILEDB_VFS_S3_USE_VIRTUAL_ADDRESSING": "false",
        "TILEDB_VFS_S3_REGION": "us-east-1",
    }
