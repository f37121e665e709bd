"""What stands around Ray Serve's proxy: its errors in OpenAI's shape, its headers without power, its connections with limits.

A real `longserve serve` under a prefix, so that the proxy itself answers what lies beside it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.http.client import Client, Reply, eventually
from tests.serving import Service, descendants, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PREFIX = "/lm"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    def prefixed(data: Any) -> None:
        application = data["applications"][0]
        application["route_prefix"] = PREFIX
        application["args"]["threads"] = 1
        application["args"]["http"] |= {"body_timeout_seconds": 1, "line": {"head_timeout_seconds": 1, "max_head_bytes": 8192}}

    with serving(tmp_path_factory.mktemp("serve") / "prefixed.yaml", prefixed) as service:
        yield service


def raw(service: Client, sent: bytes) -> Reply:
    """What the service answers to these bytes until it hangs up."""
    host = urlsplit(service.url)
    with socket.create_connection((str(host.hostname), int(host.port or 0)), timeout=60) as line:
        line.sendall(sent)
        received = b"".join(iter(lambda: line.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    return Reply(int(first.split()[1]), dict(each.lower().split(": ", 1) for each in rest), body.decode())


def test_a_path_beside_the_prefix_is_a_404_in_openais_shape(service: Client) -> None:
    for path in ("/v1/models", "/", "/elsewhere"):
        reply = service.get(path)
        assert (reply.status, reply.error["code"]) == (404, "not_found")
        assert path in reply.error["message"]
    assert service.get(f"{PREFIX}/v1/models").status == 200


def test_serves_own_paths_answer_as_they_do(service: Client) -> None:
    assert service.get("/-/healthz").text == "success"


@pytest.mark.parametrize("header", ["x-request-timeout-seconds", "x-longserve-timeout-seconds"])
def test_either_timeout_is_a_408_of_the_services_own(service: Client, header: str) -> None:
    body = {"prompt": "import os", "max_tokens": 20_000, "ignore_eos": True}
    reply = service.post(f"{PREFIX}/v1/completions", body, {header: "0.5"})
    assert (reply.status, reply.error["code"]) == (408, "deadline_exceeded")
    refused = service.post(f"{PREFIX}/v1/completions", body, {header: "-1"})
    assert refused.status == 400


def test_a_caller_who_leaves_cannot_keep_his_call_going(service: Client) -> None:
    body = json.dumps({"prompt": "import os", "max_tokens": 20_000, "ignore_eos": True}).encode()
    head = f"POST {PREFIX}/v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    host = urlsplit(service.url)
    with socket.create_connection((str(host.hostname), int(host.port or 0)), timeout=60) as line:
        line.sendall(f"{head}x-request-disconnect-disabled: ?1\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: running(service) == 1)
    assert eventually(lambda: running(service) == 0)


def running(service: Client) -> float:
    lines = service.get(f"{PREFIX}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("longserve_requests_running{"))


def test_an_old_client_gets_a_stream_without_marks_of_chunks(service: Client) -> None:
    body = b'{"prompt": "import os", "max_tokens": 4, "stream": true, "ignore_eos": true}'
    head = f"POST {PREFIX}/v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    reply = raw(service, head.encode() + body)
    assert "transfer-encoding" not in reply.headers
    assert reply.events[-1] == "[DONE]"


def test_half_a_head_and_half_a_body_are_408s(service: Client) -> None:
    head = f"POST {PREFIX}/v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()
    for sent in (head, head + b"content-length: 1000\r\n\r\n{"):
        start = time.monotonic()
        reply = raw(service, sent)
        assert (reply.status, reply.error["type"]) == (408, "timeout_error")
        assert time.monotonic() - start < 30  # where nothing ended it before


def test_what_is_no_request_and_what_is_no_text_are_400s(service: Client) -> None:
    assert raw(service, b"\x16\x03\x01\r\n\r\n").error["type"] == "invalid_request_error"
    head = f"GET {PREFIX}/health HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: \xff\r\n\r\n"
    assert raw(service, head.encode("latin-1")).status == 400


def test_an_answer_of_many_megabytes_passes_the_proxy_whole(service: Client) -> None:
    word, times = "return ", 1_000_000
    tokens = service.post(f"{PREFIX}/tokenize", {"prompt": word, "add_special_tokens": False}).json["tokens"]
    assert service.post(f"{PREFIX}/detokenize", {"tokens": tokens * times}).json["prompt"] == word * times


def test_head_and_options_pass_the_proxy(service: Client) -> None:
    assert (service.send("HEAD", f"{PREFIX}/health").status, service.send("HEAD", f"{PREFIX}/health").text) == (200, "")
    assert service.send("OPTIONS", f"{PREFIX}/v1/completions").headers["allow"] == "POST, OPTIONS"


def test_a_packed_body_is_a_415(service: Client) -> None:
    assert service.post(f"{PREFIX}/v1/completions", {"prompt": "a"}, {"content-encoding": "gzip"}).status == 415


def test_callers_of_a_replica_that_is_killed_are_told_so(service: Service) -> None:
    """The last test of the module: the replica is another one after it."""
    body = {"prompt": "import os", "max_tokens": 20_000, "ignore_eos": True}
    with concurrent.futures.ThreadPoolExecutor(2) as callers:
        answer, stream = (
            callers.submit(service.post, f"{PREFIX}/v1/completions", body | {"stream": each}) for each in (False, True)
        )
        assert eventually(lambda: running(service) == 2)
        (replica,) = [pid for pid in descendants(service.process.pid) if is_replica(pid)]
        os.kill(replica, signal.SIGKILL)
        assert (answer.result().status, answer.result().error["code"]) == (502, "replica_gone")
        assert stream.result().events[-1]["error"]["code"] == "replica_gone"


def is_replica(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::ServeReplica")
    return False
