"""What the running service tells over HTTP, for the commands that need no more of it than its address."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from service.config import ApplicationSection, ServeFile


class Refused(Exception):
    """The command cannot do what it was asked; the message says why and what helps."""


def base_url(file: ServeFile, application: ApplicationSection) -> str:
    """Where this machine reaches an application."""
    options = file.http_options
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
        options.host, f"[{options.host}]" if ":" in options.host else options.host
    )
    return f"{'https' if options.ssl_certfile else 'http'}://{host}:{options.port}{application.route_prefix.rstrip('/')}"


def ask(url: str, application: ApplicationSection, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON a route answers; POST when there is a body. Raises Refused with the service's own words, if it has some."""
    headers = {"content-type": "application/json", **key_header(application)}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        told = error.read().decode(errors="replace")
        raise Refused(f"{url} answered {error.code}: {told}") from error
    except urllib.error.URLError as error:
        raise Refused(f"nothing answers at {url} ({error.reason}); longserve serve starts the service") from error


def key_header(application: ApplicationSection) -> dict[str, str]:
    """What shows the first API key of the environment, where the application asks for one and it is there."""
    name = application.args.http.api_keys_env
    keys = os.environ.get(name, "") if name else ""
    return {"authorization": f"Bearer {keys.split(',')[0].strip()}"} if keys else {}


def ray_address(file: ServeFile) -> str:
    """Where the Ray of the service behind the file's address is: the service itself says it."""
    application = file.applications[0]
    return str(ask(f"{base_url(file, application)}/info", application)["replica"]["ray_address"])
