"""A real S3 endpoint on this machine (moto's server), and a proxy before it that fails requests on purpose."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

from tests.services import free_port, require

BUCKET = "bucket"
_START_SECONDS = 60


@dataclass
class Faults:
    """What the proxy does to a request: answer 503 instead of passing it on, or after it was carried out."""

    refuse: Callable[[str, str], bool] = lambda method, path: False
    forget: Callable[[str, str], bool] = lambda method, path: False
    seen: list[tuple[str, str]] = field(default_factory=list)


def environment(port: int) -> dict[str, str]:
    """What a user sets to reach the endpoint."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
    }


@contextmanager
def moto_server() -> Iterator[int]:
    """Run moto's server with an empty bucket; yields its port. Skips the test where moto is not installed."""
    there = find_spec("moto") is not None and find_spec("flask") is not None
    require(there, "the S3 tests need moto[s3,server]: pip install 'latentline[test]'")
    port = free_port()
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                urllib.request.urlopen(request, timeout=10).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


@contextmanager
def faulty_proxy(port: int) -> Iterator[tuple[int, Faults]]:
    """Pass requests on to `port`, except as `Faults` says; yields the proxy's port and its faults."""
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            faults.seen.append((self.command, self.path))
            if faults.refuse(self.command, self.path):
                self._answer(503, [], b"")
                return
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            data = response.read()
            connection.close()
            if faults.forget(self.command, self.path):
                self._answer(503, [], b"")
                return
            hop_by_hop = {"connection", "transfer-encoding", "content-length", "server", "date"}
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in hop_by_hop]
            length = response.getheader("Content-Length") if self.command == "HEAD" else None
            self._answer(response.status, headers, data, length)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port, faults
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def in_environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
