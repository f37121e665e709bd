"""What the commands make of whatever answers where the service should: its own words, or what is wrong, on one line."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service.asking import Refused, ask, ray_address
from service.config import ApplicationSection, HttpOptions, ServeFile


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """The port of a server that answers so, whatever it is asked, once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            line, _ = listener.accept()
            with line:
                line.recv(2**16)
                line.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield int(listener.getsockname()[1])
        thread.join()


def at(port: int) -> ServeFile:
    return ServeFile(http_options=HttpOptions(port=port), applications=[ApplicationSection()])


def told(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "BadStatusLine"),
        (b"", "RemoteDisconnected"),
        (told("200 OK", "hello"), "JSONDecodeError"),
        (told("200 OK", "[1]"), "TypeError"),
        (told("200 OK", "{}"), "tells no replica.ray_address"),
        (told("200 OK", '{"replica": null}'), "tells no replica.ray_address"),
        (told("404 Not Found", "<html>\n\n<b>no</b>"), "answered 404: <html> <b>no</b>"),
    ],
)
def test_another_service_at_the_address_is_told_as_such(answer: bytes, words: str) -> None:
    with answering(answer) as port, pytest.raises(Refused) as refusal:
        ray_address(at(port))
    assert words in str(refusal.value) and f":{port}/info" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_no_proxy_stands_between_the_commands_and_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with answering(told("200 OK", '{"ready": true}')) as port:
        assert ask(f"http://127.0.0.1:{port}/ready", ApplicationSection()) == {"ready": True}


def test_one_that_does_not_answer_is_not_waited_for_longer_than_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/ready"
        with pytest.raises(Refused, match=f"{url} has not answered within 0 s"):
            ask(url, ApplicationSection(), timeout_seconds=0.2)
