"""A small Hugging Face hub on loopback: the requests that huggingface_hub makes, for real.

It keeps repositories with their commits in memory, records every request, and misbehaves as
it is told to: errors, connections cut, ranges ignored, other bytes.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from helpers import contents

_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
LARGE = (".safetensors", ".bin")
"""Files with these endings are stored as LFS objects."""


class Request(NamedTuple):
    """One request, and how many bytes of a file it was answered with."""

    method: str
    path: str
    asked: str
    sent: int
    authorised: bool
    host: str


class Refusal(NamedTuple):
    """An answer other than the right one."""

    status: int
    code: str = ""
    message: str = ""
    headers: Mapping[str, str] = {}


class Hub:
    """The state of the server; a test changes it before and during a run.

    Attributes:
        requests: Every request that was answered.
        refuse: Asked before every answer, with method and path; a refusal is sent instead.
        ignore_range: Answer every range with the whole file.
        shift: Bytes by which every range begins too late.
        redirect: Send who asks for a large file to another host, as to a content network.
        cut: Connections to close half-way through a file, so many times.
        altered: Content to send instead, by file name.
        listing: The answer to every question for a listing, instead of the right one.
        moves: Called after every answer to a question for a listing.
    """

    def __init__(self) -> None:
        """Start empty and well-behaved."""
        self.requests: list[Request] = []
        self.refuse: Callable[[str, str], Refusal | None] = lambda method, path: None
        self.ignore_range = False
        self.shift = 0
        self.redirect = False
        self.cut = 0
        self.altered: dict[str, bytes] = {}
        self.listing: bytes | None = None
        self.moves: Callable[[], None] = lambda: None
        self._files: dict[tuple[str, str], dict[str, bytes]] = {}
        self._branches: dict[tuple[str, str], str] = {}
        self._url = ""

    @property
    def url(self) -> str:
        """The endpoint."""
        return self._url

    def push(self, repo: str, source: Path | dict[str, bytes], branch: str = "main") -> str:
        """Make a commit of a directory or of files, move the branch to it, return its hash."""
        files = contents(source) if isinstance(source, Path) else source
        tree = sorted((name, hashlib.sha256(body).hexdigest()) for name, body in files.items())
        commit = hashlib.sha1(json.dumps([repo, tree]).encode()).hexdigest()  # noqa: S324
        self._files[repo, commit] = dict(files)
        self._branches[repo, branch] = commit
        return commit

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision is, and its files."""
        commit = self._branches.get((repo, revision), revision)
        files = self._files.get((repo, commit))
        return None if files is None else (commit, files)

    def knows(self, repo: str) -> bool:
        """Whether there is such a repository."""
        return any(name == repo for name, _ in self._files)

    def sent(self, ending: str = "") -> int:
        """Bytes of files with this ending that were sent."""
        return sum(each.sent for each in self.requests if each.path.endswith(ending))

    def serve(self, url: str) -> None:
        """Say where it is served."""
        self._url = url


def identity(name: str, body: bytes) -> str:
    """What the hub calls a content: SHA-256 for large files, git's hash for others."""
    if name.endswith(LARGE):
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()  # noqa: S324 - as git does


@contextmanager
def served() -> Iterator[Hub]:
    """Serve a hub on a free port of loopback."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.serve(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        refusal = self.hub.refuse(self.command, path)
        if refusal is not None:
            self._refuse(path, refusal)
        elif match := _API.fullmatch(urlsplit(self.path).path):
            self._list(path, match[1], unquote(match[2] or "main"))
        elif match := _FILE.fullmatch(urlsplit(self.path).path):
            self._send_file(path, match[1], unquote(match[2]), unquote(match[3]))
        else:
            self._refuse(path, Refusal(404))

    def _list(self, path: str, repo: str, revision: str) -> None:
        found = self.hub.find(repo, revision)
        if found is None:
            code = "RevisionNotFound" if self.hub.knows(repo) else "RepoNotFound"
            self._refuse(path, Refusal(404, code))
            return
        commit, files = found
        siblings = [
            {
                "rfilename": name,
                "size": len(body),
                "blobId": identity("", body),
                **(
                    {"lfs": {"size": len(body), "sha256": identity(name, body), "pointerSize": 134}}
                    if name.endswith(LARGE)
                    else {}
                ),
            }
            for name, body in files.items()
        ]
        listing = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
        answer = json.dumps(listing).encode() if self.hub.listing is None else self.hub.listing
        self._send(path, 200, answer, {"Content-Type": "application/json"}, counted=False)
        self.hub.moves()

    def _send_file(self, path: str, repo: str, revision: str, name: str) -> None:
        found = self.hub.find(repo, revision)
        if found is None or name not in found[1]:
            self._refuse(path, Refusal(404, "EntryNotFound"))
            return
        commit, files = found
        body = self.hub.altered.get(name, files[name])
        tag = identity(name, files[name])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if name.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(files[name]))}
        if self.hub.redirect and name.endswith(LARGE) and "localhost" not in self.headers["Host"]:
            headers["Location"] = self.hub.url.replace("127.0.0.1", "localhost") + self.path
            self._send(path, 302, b"", headers)
            return
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is None or self.hub.ignore_range:
            self._send(path, 200, body, headers)
            return
        first = int(asked[1]) + self.hub.shift
        last = min(int(asked[2] or len(body)), len(body) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        self._send(path, 206, body[first : last + 1], headers)

    def _refuse(self, path: str, refusal: Refusal) -> None:
        headers = {"Content-Type": "application/json", **refusal.headers}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        if refusal.message:
            headers["X-Error-Message"] = refusal.message
        body = json.dumps({"error": refusal.message}).encode()
        self._send(path, refusal.status, body, headers, counted=False)

    def _send(
        self,
        path: str,
        status: int,
        body: bytes,
        headers: Mapping[str, str],
        *,
        counted: bool = True,
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = 0
        if self.command == "GET":
            whole = not (counted and self.hub.cut and len(body) > 1000)
            if not whole:
                self.hub.cut -= 1
                body = body[: len(body) // 2]
                self.close_connection = True
            try:
                for start in range(0, len(body), 2**16):
                    self.wfile.write(body[start : start + 2**16])
                    sent += len(body[start : start + 2**16])
            except OSError:  # the client has what it wanted
                self.close_connection = True
        self.hub.requests.append(
            Request(
                self.command,
                path,
                self.headers.get("Range", ""),
                sent if counted else 0,
                "authorization" in self.headers,
                self.headers.get("Host", "").partition(":")[0],
            )
        )
