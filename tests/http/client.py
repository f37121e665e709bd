"""A caller with nothing between it and the wire: the standard library's HTTP, so that tests see what is sent."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

PATIENCE_SECONDS = 30.0  # far above what any call here takes: a hang becomes a failure


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]  # names in lower case
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> Any:
        """The error of a reply in OpenAI's shape."""
        error = self.json["error"]
        assert {"message", "type", "param", "code"} <= error.keys()
        return error

    @property
    def events(self) -> list[Any]:
        """The data of server-sent events; the last one is the text `[DONE]`."""
        lines = [line.removeprefix("data: ") for line in self.text.split("\n\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@dataclass(frozen=True)
class Client:
    url: str
    replica: Any  # the one behind the url, where it is in this process
    patience_seconds: float = PATIENCE_SECONDS

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, raw: bool = False
    ) -> Reply:
        """`raw`: the answer may be no text."""
        with self._open() as connection:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, names, answer.read().decode(errors="replace" if raw else "strict"))

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, headers=headers)

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Reply:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, raw, {"content-type": "application/json", **(headers or {})})

    def metrics(self) -> str:
        """The metrics as they are now."""
        return self.get("/metrics", **{"cache-control": "no-cache"}).text

    def complete(self, prompt: Any, **fields: Any) -> Reply:
        return self.post("/v1/completions", {"prompt": prompt, "max_tokens": 4, **fields})

    def chat(self, *texts: str, **fields: Any) -> Reply:
        """A conversation in which user and assistant take turns."""
        said = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
        return self.post("/v1/chat/completions", {"messages": said, "max_tokens": 4, **fields})

    @contextmanager
    def uploaded(self, path: str, raw: bytes, headers: Mapping[str, str] | None = None) -> Iterator[socket.socket]:
        """A call whose body has been sent and of whose answer nothing has been read; the block's end hangs up."""
        host = urlsplit(self.url)
        fields = {"host": "x", "content-type": "application/json", "content-length": str(len(raw)), **(headers or {})}
        head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
        with socket.create_connection((str(host.hostname), int(host.port or 0)), timeout=self.patience_seconds) as line:
            line.sendall(head.encode() + raw)
            yield line

    @contextmanager
    def half_read(self, body: Any, read: int) -> Iterator[socket.socket]:
        """A completion of which `read` bytes have been read; the block's end hangs up."""
        with self.uploaded("/v1/completions", json.dumps(body).encode()) as line:
            got = b""
            while len(got) < read:
                more = line.recv(read - len(got))
                assert more, f"the answer ends after {got!r}"
                got += more
            yield line

    @contextmanager
    def _open(self) -> Iterator[http.client.HTTPConnection]:
        host = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(host.hostname), host.port, timeout=self.patience_seconds)
        try:
            yield connection
        finally:
            connection.close()


def eventually(holds: Callable[[], bool], patience_seconds: float = PATIENCE_SECONDS) -> bool:
    """Whether something comes true within the time a test has patience for."""
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.01)
    return False
