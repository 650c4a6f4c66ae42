"""A hub on this machine that hands out the files of repositories, whole or by ranges of bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fake_hub import listening

COMMIT = "c" * 40


@dataclass
class Served:
    """Repositories by name, and what was asked for and how many bytes of files were sent."""

    endpoint: str
    repositories: dict[str, Path]
    requests: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)


@contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[Served]:
    """Serve directories as repositories."""
    served = Served("", repositories)
    with listening(type("Handler", (_Handler,), {"served": served})) as served.endpoint:
        yield served


class _Handler(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.served.requests.append(path)
        if path.startswith("/api/models/"):
            self._about(path.removeprefix("/api/models/"))
        else:
            self._file(body=True)

    def _about(self, path: str) -> None:
        name, _, rest = path.partition("/revision/")
        name = name.partition("/tree/")[0]
        if name not in self.served.repositories or (rest and rest not in ("main", "v1", COMMIT)):
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        folder = self.served.repositories[name]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if "/tree/" in path:
            self._json(200, [_entry(file, folder) for file in files])
            return
        siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
        self._json(200, {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False})

    def _file(self, *, body: bool) -> None:
        name, _, rest = unquote(self.path.partition("?")[0]).removeprefix("/").partition("/resolve/")
        revision, _, path = rest.partition("/")
        file = self.served.repositories.get(name, Path("/nowhere")) / path
        if not file.is_file() or revision not in ("main", "v1", COMMIT):
            self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}, body=body)
            return
        size, asked = file.stat().st_size, self.headers.get("range", "")
        first, last = 0, size - 1
        if asked.startswith("bytes="):
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end), last) if end else last
        self.send_response(206 if asked else 200)
        self.send_header("etag", f'"{_etag(file)}"')
        self.send_header("x-repo-commit", COMMIT)
        self.send_header("accept-ranges", "bytes")
        self.send_header("content-length", str(last - first + 1))
        if asked:
            self.send_header("content-range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if body:
            with file.open("rb") as opened:
                opened.seek(first)
                self.wfile.write(opened.read(last - first + 1))
            self.served.sent[path] = self.served.sent.get(path, 0) + last - first + 1

    def _json(self, status: int, content: Any, headers: dict[str, str] | None = None, *, body: bool = True) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()[:4096] + str(file.stat().st_size).encode()).hexdigest()


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    return {
        "type": "file",
        "path": file.relative_to(folder).as_posix(),
        "size": file.stat().st_size,
        "oid": _etag(file),
    }
