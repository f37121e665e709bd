"""The page under `/docs`: Swagger UI over the served OpenAPI. All of it comes from this service, for where long inputs are
served a CDN can often not be reached; the browser is told to load nothing from anywhere else.

Its files come in the package fastapi-offline, of which nothing else is used. Paths are relative: they hold below any prefix.
"""

from __future__ import annotations

from importlib.metadata import files
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon.png": "image/png"}

POLICY = "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
"""The inline script is FastAPI's own, of two lines."""


def install(app: FastAPI) -> None:
    """Add the page and its files."""

    @app.get("/docs", include_in_schema=False)
    async def page() -> Response:
        made = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"{app.title}: the API",
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon.png",
        )
        made.headers["content-security-policy"] = POLICY
        return made

    @app.get("/docs/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404)
        return FileResponse(_folder() / name, media_type=FILES[name], headers={"cache-control": "max-age=3600"})


def _folder() -> Path:
    """Where the package's files lie; it is not imported."""
    found = next(each for each in files("fastapi-offline") or () if each.name == "swagger-ui-bundle.js")
    return Path(str(found.locate())).parent
