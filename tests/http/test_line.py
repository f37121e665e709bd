"""Clients who are slow, silent, many or old: what a connection may cost, over real sockets under `service/plain.py`."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

from service.config import HttpConfig, LineConfig, ServiceConfig, UserConfig
from service.plain import listening_in_thread
from tests.http.client import Client, Reply, eventually

LINE = LineConfig(
    max_connections=40, max_head_bytes=4096, head_timeout_seconds=0.5, rest_timeout_seconds=0.5, send_timeout_seconds=1
)
HTTP = HttpConfig(max_body_bytes=200_000, max_bodies_bytes=300_000, body_timeout_seconds=0.8, line=LINE)
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def strict() -> Iterator[Client]:
    with listening_in_thread(ServiceConfig(threads=1, http=HTTP), UserConfig()) as (url, replica):
        yield Client(url, replica)


@pytest.fixture(autouse=True)
def _the_service_goes_on(strict: Client) -> Iterator[None]:
    yield
    assert strict.complete("import os", max_tokens=1).status == 200
    assert eventually(lambda: strict.replica.engine.snapshot().bytes_in_use == 0)


def connect(client: Client) -> socket.socket:
    host = urlsplit(client.url)
    return socket.create_connection((str(host.hostname), int(host.port or 0)), timeout=client.patience_seconds)


def rest_of(line: socket.socket) -> bytes:
    """What comes until the service hangs up."""
    parts = []
    while part := line.recv(65536):
        parts.append(part)
    return b"".join(parts)


def reply_of(line: socket.socket) -> Reply:
    head, _, body = rest_of(line).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return Reply(int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body.decode())


def seconds_until_hung_up(line: socket.socket, drip: bytes = b"") -> float:
    """How long the service bears this client, who sends another byte now and then."""
    start = time.monotonic()
    line.settimeout(0.05)
    while True:
        try:
            if not line.recv(65536):
                return time.monotonic() - start
        except TimeoutError:
            if drip:
                line.sendall(drip)
        except (ConnectionResetError, BrokenPipeError):
            return time.monotonic() - start


def test_a_silent_connection_is_closed(strict: Client) -> None:
    with connect(strict) as line:
        assert rest_of(line) == b""


@pytest.mark.parametrize("sent", [b"POST", HEAD, HEAD + b"x-slow: "])
def test_half_a_head_is_a_408(strict: Client, sent: bytes) -> None:
    with connect(strict) as line:
        line.sendall(sent)
        reply = reply_of(line)
    assert (reply.status, reply.error["type"]) == (408, "timeout_error")
    assert "0.5 s" in reply.error["message"]


@pytest.mark.parametrize("drip", [b"a", b"\r\n"])
def test_a_head_that_drips_in_is_not_waited_for(strict: Client, drip: bytes) -> None:
    with connect(strict) as line:
        assert seconds_until_hung_up(line, drip) < 5  # ten times what is allowed


def test_a_kept_connection_that_sends_empty_lines_is_closed(strict: Client) -> None:
    with connect(strict) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert line.recv(65536).startswith(b"HTTP/1.1 200")
        assert seconds_until_hung_up(line, b"\r\n") < 5


@pytest.mark.parametrize("framing", [b"content-length: 1000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n3e8\r\n"])
def test_half_a_body_is_a_408(strict: Client, framing: bytes) -> None:
    with connect(strict) as line:
        line.sendall(HEAD + framing + b'{"prompt": ')
        reply = reply_of(line)
    assert (reply.status, reply.error["code"]) == (408, "body_timeout")
    assert "0.8 s" in reply.error["message"]


def test_a_refused_body_is_not_listened_to_for_ever(strict: Client) -> None:
    with connect(strict) as line:
        line.sendall(HEAD + b"content-length: 300000\r\n\r\n")
        assert seconds_until_hung_up(line, b"a") < 5


def test_a_reader_who_reads_nothing_is_hung_up_on(strict: Client) -> None:
    body = json.dumps({"prompt": "import os " * 2000, "max_tokens": 4, "echo": True, "logprobs": 20}).encode()
    with connect(strict) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert eventually(lambda: sockets_of_this_process(strict) > 0)
        assert eventually(lambda: sockets_of_this_process(strict) == 0)


def test_a_reader_who_stops_is_noticed_before_the_kernel_has_taken_megabytes(strict: Client) -> None:
    """Uvicorn would hand the whole of this answer to the kernel, and the engine would write it to its end."""
    body = {"prompt": "import os", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    raw, cancelled = json.dumps(body).encode(), ended(strict, "cancelled")
    with connect(strict) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(raw) + raw)
        assert line.recv(100)
        assert eventually(lambda: ended(strict, "cancelled") == cancelled + 1)


def ended(client: Client, outcome: str) -> float:
    counted = client.replica._metrics.registry.get_sample_value
    return float(counted("longserve_requests_total", {"kind": "completion", "outcome": outcome, "backend": "dense"}) or 0)


def sockets_of_this_process(client: Client) -> int:
    """Connections that the service has open."""
    port = int(urlsplit(client.url).port or 0)
    with open("/proc/self/net/tcp") as table:
        rows = [row.split() for row in table.readlines()[1:]]
    own = {os.readlink(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd") if _is_open(each)}
    return sum(1 for row in rows if int(row[1].split(":")[1], 16) == port and row[3] != "0A" and f"socket:[{row[9]}]" in own)


def _is_open(descriptor: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{descriptor}")


def test_a_storm_of_half_open_connections_leaves_no_descriptor(strict: Client) -> None:
    assert eventually(lambda: sockets_of_this_process(strict) == 0)
    before = len(os.listdir("/proc/self/fd"))
    refused = 0
    with ExitStack() as stack:
        lines = [stack.enter_context(connect(strict)) for _ in range(500)]
        for place, line in enumerate(lines):
            try:
                line.sendall((b"", b"POST /v1", HEAD, HEAD + b"content-length: 99\r\n\r\n{")[place % 4])
                refused += reply_of(line).status == 503 if place >= 400 else 0
            except (ConnectionResetError, BrokenPipeError, IndexError):
                pass  # refused before it had sent all, or closed without a word
        assert refused > 0
    assert eventually(lambda: sockets_of_this_process(strict) == 0)
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_connections_past_the_bound_are_refused_with_a_503(strict: Client) -> None:
    with ExitStack() as stack:
        for _ in range(LINE.max_connections):
            stack.enter_context(connect(strict))
        with connect(strict) as line:
            reply = reply_of(line)
    assert (reply.status, reply.error["type"]) == (503, "server_error")
    assert reply.headers["retry-after"] == "1"
    assert "40 connections" in reply.error["message"]


@pytest.mark.parametrize(
    "sent", [b"x-long: " + b"a" * 5000 + b"\r\n\r\n", b"x-many: 1\r\n" * 500, b"x-endless: " + b"a" * 5000]
)
def test_a_head_past_its_bound_is_a_431(strict: Client, sent: bytes) -> None:
    with connect(strict) as line:
        line.sendall(HEAD + sent)
        reply = reply_of(line)
    assert reply.status == 431
    assert "4096 bytes" in reply.error["message"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc",
    ],
)
def test_what_is_no_request_is_a_400_in_openais_shape(strict: Client, sent: bytes) -> None:
    with connect(strict) as line:
        line.sendall(sent)
        reply = reply_of(line)
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")


OFFERS = [
    b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\n",
    b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZQ==\r\nsec-websocket-version: 13\r\n",
]
LENGTH, CHUNKED = b"content-length: 15\r\n\r\n%b", b"transfer-encoding: chunked\r\n\r\n8\r\n%b\r\n7\r\n%b\r\n0\r\n\r\n"


@pytest.mark.parametrize("piece", [1, 7, 100_000])
@pytest.mark.parametrize("offer", OFFERS)
def test_an_offer_of_another_protocol_is_passed_over_and_its_body_read(strict: Client, offer: bytes, piece: int) -> None:
    head, body = HEAD.replace(b"/v1/completions", b"/tokenize") + offer, b'{"prompt":"ab"}'
    calls = [head + LENGTH % body, HEAD + offer + b"\r\n", head + CHUNKED % (body[:8], body[8:]), head + LENGTH % body]
    sent = b"".join(calls) + b"GET /health HTTP/1.1\r\nhost: x\r\n" + offer + b"\r\n"
    sent += b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with connect(strict) as line:
        for at in range(0, len(sent), piece):
            line.sendall(sent[at : at + piece])
        told = rest_of(line)
    assert re.findall(rb"HTTP/1.1 (\d+)", told) == [b"200", b"400", b"200", b"200", b"200", b"200"]
    assert told.count(b'"count": 2') == 3 and told.count(b'{"status":"ok"}') == 2


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_an_offer_on_a_connection_that_will_close_is_passed_over(strict: Client, version: bytes) -> None:
    head = HEAD.replace(b"1.1", version).replace(b"/v1/completions", b"/tokenize")
    with connect(strict) as line:
        line.sendall(head + b"connection: close, upgrade\r\nupgrade: h2c\r\n" + LENGTH % b'{"prompt":"ab"}')
        assert reply_of(line).json["count"] == 2


def test_what_is_no_request_behind_one_cuts_its_stream_and_says_nothing_in_it(strict: Client) -> None:
    body = b'{"prompt": "import os", "max_tokens": 2000, "stream": true, "ignore_eos": true}'
    with connect(strict) as line:
        line.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        got = line.recv(65536)
        line.sendall(b"GARBAGE\r\n\r\n")
        got += rest_of(line)
    assert got.startswith(b"HTTP/1.1 200") and got.count(b"HTTP/1.1") == 1 and b"[DONE]" not in got


def test_an_old_client_gets_a_stream_without_marks_of_chunks(strict: Client) -> None:
    body = b'{"prompt": "import os", "max_tokens": 4, "stream": true, "ignore_eos": true}'
    with connect(strict) as line:
        line.sendall(HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"content-length: %d\r\n\r\n" % len(body) + body)
        reply = reply_of(line)
    assert reply.status == 200
    assert "transfer-encoding" not in reply.headers
    assert reply.text.startswith("data: {")
    assert reply.events[-1] == "[DONE]"


def test_an_old_client_gets_a_whole_answer_with_its_length(strict: Client) -> None:
    with connect(strict) as line:
        line.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        reply = reply_of(line)
    assert int(reply.headers["content-length"]) == len(reply.text)
    assert reply.json == {"status": "ok"}


def test_an_upload_that_is_cut_off_is_the_clients_going(strict: Client) -> None:
    def count(status: str) -> float:
        label = {"route": "unmatched", "method": "POST", "status": status}
        return float(strict.replica._metrics.registry.get_sample_value("longserve_http_responses_total", label) or 0)

    before, failed = count("499"), count("500")
    with connect(strict) as line:
        line.sendall(HEAD + b'content-length: 1000\r\n\r\n{"prompt": ')
    assert eventually(lambda: count("499") == before + 1)
    assert count("500") == failed


def test_a_body_longer_than_declared_is_cut_where_it_was_said_to_end(strict: Client) -> None:
    body = b'{"prompt": "import os", "max_tokens": 1}'
    with connect(strict) as line:
        line.sendall(HEAD + b"content-length: %d\r\nconnection: close\r\n\r\n" % (len(body) - 1) + body)
        reply = reply_of(line)
    assert reply.status == 400
    assert "JSON" in reply.error["message"]


@pytest.mark.parametrize("coding", ["gzip", "br", "GZIP, identity", "zstd"])
def test_a_packed_body_is_a_415_that_names_its_coding(strict: Client, coding: str) -> None:
    reply = strict.post("/v1/completions", {"prompt": "a"}, {"content-encoding": coding})
    assert (reply.status, reply.error["code"]) == (415, "unsupported_content_encoding")
    assert coding in reply.error["message"]
    assert reply.headers["accept-encoding"] == "identity"


def test_a_body_that_says_it_is_not_packed_is_read(strict: Client) -> None:
    assert strict.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, {"content-encoding": "identity"}).status == 200


def test_bodies_together_have_a_bound(strict: Client) -> None:
    with ExitStack() as stack:
        for _ in range(2):
            line = stack.enter_context(connect(strict))
            line.sendall(HEAD + b"content-length: 199000\r\n\r\n" + b" " * 140_000)
        assert eventually(lambda: strict.replica.app.intake.held_bytes >= 280_000)
        reply = strict.post("/v1/completions", b" " * 100_000)
        assert (reply.status, reply.error["type"]) == (429, "rate_limit_error")
        assert int(reply.headers["retry-after"]) >= 1
    assert eventually(lambda: strict.replica.app.intake.held_bytes == 0)


@pytest.mark.parametrize("path", ["/health", "/ready", "/info", "/metrics", "/v1/models", "/docs", "/openapi.json"])
def test_head_answers_as_get_does_without_its_body(strict: Client, path: str) -> None:
    head, get = strict.send("HEAD", path), strict.get(path)
    assert (head.status, head.text) == (get.status, "")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_head_of_what_is_posted_is_a_405(strict: Client) -> None:
    reply = strict.send("HEAD", "/v1/completions")
    assert (reply.status, reply.text, reply.headers["allow"]) == (405, "", "POST, OPTIONS")


@pytest.mark.parametrize(("path", "allowed"), [("/v1/completions", "POST, OPTIONS"), ("/health", "GET, HEAD, OPTIONS")])
def test_options_tells_the_methods_that_a_405_tells(strict: Client, path: str, allowed: str) -> None:
    options, wrong = strict.send("OPTIONS", path), strict.send("DELETE", path)
    assert (options.status, options.text, options.headers["allow"]) == (204, "", allowed)
    assert (wrong.status, wrong.error["code"], wrong.headers["allow"]) == (405, "method_not_allowed", allowed)
