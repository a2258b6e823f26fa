"""A real S3-compatible server on loopback (moto's), and a proxy before it that counts, stalls, cuts off or refuses."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import boto3
from botocore.config import Config

BUCKET = "photos"
_EXPIRED = (
    b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>ExpiredToken</Code>"
    b"<Message>The provided token has expired.</Message></Error>"
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Proxy:
    """Pass connections on to a port; ``stalls`` of the next ones get no answer."""

    def __init__(self, target: int) -> None:
        self._target, self._server = target, socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.stalls = self.cuts = self.bytes = 0
        self.expired = False
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.stalls:
                self.stalls -= 1
                while client.recv(2**16):  # until the client has lost its patience
                    pass
                return
            if self.expired:
                client.recv(2**16)
                head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/xml\r\nContent-Length: {len(_EXPIRED)}"
                client.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode() + _EXPIRED)
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                threading.Thread(target=self._pass, args=(client, server), daemon=True).start()
                while data := server.recv(2**16):
                    self.bytes += len(data)
                    if self.cuts and len(data) > 2000:
                        self.cuts -= 1
                        client.sendall(data[:1000])
                        return
                    client.sendall(data)

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)


class ObjectStore:
    """The server, with one bucket."""

    def __init__(self, port: int, log: Path) -> None:
        self.port, self._log = port, log
        self.environment = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 0}),
        )

    def put(self, files: Mapping[str, bytes]) -> None:
        for key, content in files.items():
            self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def put_folder(self, folder: Path, prefix: str) -> str:
        """Upload a folder; returns its URL."""
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        self.put({f"{prefix}/{name}": path.read_bytes() for name, path in found.items()})
        return f"s3://{BUCKET}/{prefix}"

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=key)

    def reads(self) -> list[str]:
        """List the keys that were read so far, in order."""
        return re.findall(rf'"GET /{BUCKET}/([^? "]+) HTTP', self._log.read_text())


@contextlib.contextmanager
def object_store(**environment: str) -> Iterator[ObjectStore]:
    """Start the server in a process of its own."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        command = [sys.executable, "-m", "moto.server", "-p", str(port)]
        with subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment) as server:
            try:
                deadline = time.monotonic() + 60
                while True:
                    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                        break
                    assert server.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                store = ObjectStore(port, Path(folder) / "log")
                store.client.create_bucket(Bucket=BUCKET)
                yield store
                store.client.close()
            finally:
                server.terminate()
