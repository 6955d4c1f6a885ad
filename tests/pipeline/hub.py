"""The part of the Hugging Face Hub's HTTP interface that an upload of small files uses, on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """url: of the endpoint. files: what was committed, by path. repos: bodies of the requests to create one."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    repos: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    refuse: bool = False


@contextmanager
def fake_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.tokens.add(self.headers.get("Authorization", ""))
            if hub.refuse:
                self.answer({"error": "no right to write here"}, 403)
            elif self.path == "/api/repos/create":
                hub.repos.append(json.loads(body))
                owner, name = hub.repos[-1]["organization"], hub.repos[-1]["name"]
                self.answer({"url": f"{hub.url}/{owner}/{name}", "id": "1"})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                plain = {"uploadMode": "regular", "shouldIgnore": False}
                self.answer({"files": [{"path": name} | plain for name in names]})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer({"commitUrl": f"{hub.url}/someone/name/commit/{'0' * 40}", "commitOid": "0" * 40})
            else:
                self.answer({"error": self.path}, 404)

        def do_GET(self) -> None:
            self.answer({"id": "someone/name", "sha": "0" * 40, "siblings": []})

        def answer(self, value: Any, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
