"""A real S3 server in a process of its own, and a proxy in front of it that misbehaves."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SECRET = "very-secret-access-key"  # noqa: S105 - of a server that takes any

# Says on which port it listens, and ends when its standard input does: with its parent.
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


class Bucket:
    """One bucket of the server, seen past every proxy."""

    def __init__(self, port: int, name: str) -> None:
        import boto3

        self.port = port
        self.name = name
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id="tester",
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        self._client.create_bucket(Bucket=name)

    def url(self, prefix: str) -> str:
        return f"s3://{self.name}/{prefix}"

    def put(self, key: str, content: bytes) -> None:
        self._client.put_object(Bucket=self.name, Key=key, Body=content)

    def get(self, key: str) -> bytes:
        content = self._client.get_object(Bucket=self.name, Key=key)["Body"].read()
        assert isinstance(content, bytes)
        return content

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self.name, Key=key)

    def objects(self, prefix: str = "") -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.name, Prefix=prefix
        )
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def put_tree(self, directory: Path, prefix: str) -> str:
        """Upload a directory; return its URL."""
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(directory).as_posix()}", path.read_bytes())
        return self.url(prefix)

    def contents(self, prefix: str) -> dict[str, bytes]:
        """All objects under a prefix, by relative name."""
        return {key.removeprefix(f"{prefix}/"): self.get(key) for key in self.objects(f"{prefix}/")}

    def environment(self, root: Path, port: int | None = None) -> dict[str, str]:
        """What the program needs to find the server, or a proxy in front of it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "XDG_CACHE_HOME": str(root / "cache"),
            "no_proxy": "127.0.0.1",
        }


@contextmanager
def s3_server() -> Iterator[int]:
    """Run the server; yield its port."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Proxy:
    """Passes requests on to the server, and answers back, each as a function changes it.

    ``request`` gets a whole request and returns what to pass on; with ``None`` the client is told
    to come again later. ``response`` gets the head of a request and the whole answer to it.
    Each connection serves one request and is closed.
    """

    def __init__(
        self,
        port: int,
        request: Callable[[bytes], bytes | None] = lambda data: data,
        response: Callable[[bytes, bytes], bytes] = lambda head, data: data,
    ) -> None:
        self._port = port
        self._request = request
        self._response = response
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.heads: list[bytes] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError, ValueError):
            client.settimeout(30)
            head, body = _read_request(client)
            self.heads.append(head)
            passed = self._request(head + body)
            if passed is None:
                client.sendall(refusal(503, "SlowDown"))
                return
            with socket.create_connection(("127.0.0.1", self._port), timeout=30) as server:
                server.sendall(_closing(passed))
                answer = bytearray()
                while piece := server.recv(2**16):
                    answer += piece
            client.sendall(self._response(head, bytes(answer)))


def refusal(status: int, code: str) -> bytes:
    """What S3 answers when it does not do something."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
    head = f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def _read_request(stream: socket.socket) -> tuple[bytes, bytes]:
    """The head of a request with its empty line, and the body of the length that it says."""
    data = bytearray()
    while b"\r\n\r\n" not in data:
        piece = stream.recv(2**16)
        if not piece:
            raise ConnectionError
        data += piece
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    if fields.get(b"expect") == b"100-continue":
        stream.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    length = int(fields.get(b"content-length", b"0"))
    received = bytearray(body)
    while len(received) < length:
        piece = stream.recv(2**20)
        if not piece:
            raise ConnectionError
        received += piece
    return head + b"\r\n\r\n", bytes(received)


def _closing(request: bytes) -> bytes:
    """The request, with the connection to be closed after it and no waiting for a go-ahead."""
    head, _, body = request.partition(b"\r\n\r\n")
    lines = [
        line
        for line in head.split(b"\r\n")
        if not line.lower().startswith((b"connection:", b"expect:"))
    ]
    return b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body


@contextmanager
def proxy(*arguments: Any, **named: Any) -> Iterator[Proxy]:
    """A proxy while the body runs."""
    running = Proxy(*arguments, **named)
    try:
        yield running
    finally:
        running.close()
