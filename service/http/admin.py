"""The operator's routes: the attention switch, and the truth check. For those who show a key of `http.admin_keys_env`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest

from service.config import AttentionConfig
from service.engine.request import InvalidRequest
from service.http.body import check_media_type, parse
from service.http.errors import SwitchFailed
from service.http.face import Host

PREFIX = "/admin/"


def install(app: FastAPI, host: Host) -> None:
    @app.get("/admin/attention", include_in_schema=False)
    async def states() -> dict[str, Any]:
        """Each replica's switch: in force, asked for, how the last changes went, what is withdrawn."""
        return {"replicas": list(await host.admin.states())}

    @app.post("/admin/attention", include_in_schema=False)
    async def switch(caller: HttpRequest) -> dict[str, Any]:
        """Put the `attention` section in force that is the body. Ends when every replica serves it."""
        check_media_type(caller.headers)
        wanted = parse(await caller.body(), AttentionConfig)
        try:
            states = await host.admin.switch(wanted)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        if failed := [f"replica {each['replica']}: {why}" for each in states if (why := _failure(each, wanted))]:
            raise SwitchFailed("; ".join(failed))
        return {"replicas": list(states)}

    @app.post("/admin/truth-check", include_in_schema=False)
    async def check_truth() -> dict[str, Any]:
        """Check what serves against its definition now; what is off it is withdrawn."""
        return {"replicas": [_told(each) for each in await host.admin.check_truth()]}


def _failure(state: Mapping[str, Any], wanted: AttentionConfig) -> str | None:
    """Why a replica does not serve what was wanted of it."""
    is_late = state["switching"] or state["asked"] != wanted.model_dump()
    return state["degraded"] or ("it has not switched yet" if is_late else None)


def _told(replica: Mapping[str, Any]) -> dict[str, Any]:
    """A replica's verdicts as JSON has them: an error that is no number is null."""
    checks = [{**each, "error": each["error"] if math.isfinite(each["error"]) else None} for each in replica["checks"]]
    return {**replica, "checks": checks}
