"""A hub on this machine: it answers what `HfApi` asks on an upload, and keeps what it was given."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


@dataclass
class Hub:
    """What was asked, in order, and what the commit brought."""

    endpoint: str = ""
    token: str = "hf_right"
    exists: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)
    created: dict[str, Any] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on a free port of the loopback interface; the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """Serve a hub that is uploaded to."""
    hub = Hub()
    with listening(type("Handler", (_Handler,), {"hub": hub})) as hub.endpoint:
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = self._asked()
        if self.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._answer(401, {"error": "Invalid username or password."})
        elif "/api/models/" in path:
            self._answer(200, {"id": path.split("/api/models/")[1], "siblings": [], "sha": "0" * 40})
        else:
            self._answer(404, {"error": "not here"})

    def do_PUT(self) -> None:
        path = self._asked()
        self.hub.uploads[path.rpartition("/")[2]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        hub, path, body = self.hub, self._asked(), self._body()
        if path.endswith("/api/validate-yaml"):
            self._answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("authorization") != f"Bearer {hub.token}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path.endswith("/api/repos/create"):
            hub.created = json.loads(body)
            name = f"{hub.created['organization']}/{hub.created['name']}"
            self._answer(409 if hub.exists else 200, {"url": f"{hub.endpoint}/{name}"})
        elif "/branch/" in path:
            hub.branches.append(path.rpartition("/")[2])
            self._answer(200, {})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(path.rpartition("/")[2], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, {"error": f"{path} is not answered here"})

    def _commit(self, branch: str, lines: list[dict[str, Any]]) -> None:
        hub = self.hub
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                hub.commits[branch] = value
            elif line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            else:
                stored = hub.uploads[value["oid"]]
                assert hashlib.sha256(stored).hexdigest() == value["oid"] and len(stored) == value["size"]
                hub.files[value["path"]] = stored
        address = f"{hub.endpoint}/{'/'.join(self.path.split('/')[3:5])}/commit/{'1' * 40}"
        self._answer(200, {"commitUrl": address, "commitOid": "1" * 40, "hookOutput": "", "success": True})

    def _asked(self) -> str:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((self.command, path))
        return path

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
