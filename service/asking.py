"""What the running service tells over HTTP, for the commands that need no more of it than its address."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from service.config import ApplicationSection, ServeFile

_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""To this machine, past whatever proxy the environment names."""

ANSWER_CHARACTERS = 500  # of what answers, where it is told


class Refused(Exception):
    """The command cannot do what it was asked; the message says why and what helps."""


def base_url(file: ServeFile, application: ApplicationSection) -> str:
    """Where this machine reaches an application."""
    options = file.http_options
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
        options.host, f"[{options.host}]" if ":" in options.host else options.host
    )
    return f"{'https' if options.ssl_certfile else 'http'}://{host}:{options.port}{application.route_prefix.rstrip('/')}"


def ask(
    url: str, application: ApplicationSection, body: Mapping[str, Any] | None = None, timeout_seconds: float = 60
) -> dict[str, Any]:
    """The JSON a route answers; POST when there is a body. Raises Refused with the service's own words, if it has some."""
    headers = {"content-type": "application/json", **key_header(application)}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with _DIRECTLY.open(request, timeout=timeout_seconds) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        told = " ".join(error.read().decode(errors="replace").split())
        raise Refused(f"{url} answered {error.code}: {told[:ANSWER_CHARACTERS]}") from error
    except urllib.error.URLError as error:
        raise Refused(f"nothing answers at {url} ({error.reason}); longserve serve starts the service") from error
    except TimeoutError as error:
        raise Refused(f"{url} has not answered within {timeout_seconds:.0f} s") from error
    except (OSError, http.client.HTTPException, ValueError, TypeError) as error:
        raise Refused(f"{url} gives no answer as longserve would ({error!r}); http_options says where it listens") from error


def ask_for(url: str, application: ApplicationSection, *keys: str) -> Any:
    """What the JSON of a route holds at a path of keys. Raises Refused where it holds nothing there: it is another's."""
    found: Any = ask(url, application)
    try:
        for key in keys:
            found = found[key]
    except (KeyError, TypeError) as error:
        raise Refused(f"{url} tells no {'.'.join(keys)}, as longserve would; http_options says where it listens") from error
    return found


def key_header(application: ApplicationSection) -> dict[str, str]:
    """What shows the first API key of the environment, where the application asks for one and it is there."""
    name = application.args.http.api_keys_env
    keys = os.environ.get(name, "") if name else ""
    return {"authorization": f"Bearer {keys.split(',')[0].strip()}"} if keys else {}


def ray_address(file: ServeFile) -> str:
    """Where the Ray of the service behind the file's address is: the service itself says it. Raises Refused."""
    application = file.applications[0]
    return str(ask_for(f"{base_url(file, application)}/info", application, "replica", "ray_address"))
