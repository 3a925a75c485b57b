"""Plain pages of the site: the API's documents, and the page on which a person consents to an application's key.

Pages are files; their scripts call the API over HTTP like anybody. Nothing of a request is ever written into a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import orjson
from aiohttp import web

from gateway.control.api.docs_page import docs_page
from gateway.control.api.openapi import openapi
from gateway.control.api.route import Call, Nothing, Route
from gateway.domain.errors import NotFound

PAGES = Path(__file__).parent / "pages"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Scripts are files of ours and nothing else, and they cannot make markup of text: what callers and providers said stays text.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
ROOT = ("",)  # pages are not below the API's base


class SiteApi:
    """Handlers of documents and pages. `routes` are those that the documents are about; without `signup` pages offer none."""

    def __init__(self, routes: Sequence[Route], *, signup: bool) -> None:
        document = openapi(routes)
        self._document = orjson.dumps(document)
        self._docs = docs_page(document).encode()
        self._files = {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in PAGES.iterdir() if path.suffix in TYPES}
        if not signup:
            page, content_type = self._files["auth.html"]
            self._files["auth.html"] = page.replace(b"<body>", b'<body class="closed">'), content_type

    def routes(self) -> list[Route]:
        return [
            Route(method="GET", path="/openapi.json", access="public", handler=self.get_openapi, bases=ROOT, summary="This API"),
            Route(
                method="GET", path="/openapi.yaml", access="public", handler=self.get_openapi_yaml, bases=ROOT,
                summary="The same: all JSON is YAML",
            ),
            Route(method="GET", path="/docs", access="public", handler=self.get_docs, bases=ROOT, summary="This API, for people"),
            Route(method="GET", path="/auth", access="public", handler=self.get_consent_page, bases=ROOT, summary="Consent to a key"),
            Route(method="GET", path="/pages/{name}", access="public", handler=self.get_file, bases=ROOT, summary="Scripts and styles"),
        ]  # fmt: skip

    async def get_openapi(self, call: Call[Nothing, Nothing]) -> web.Response:
        return web.Response(body=self._document, content_type="application/json")

    async def get_openapi_yaml(self, call: Call[Nothing, Nothing]) -> web.Response:
        return web.Response(body=self._document, content_type="application/yaml")

    async def get_docs(self, call: Call[Nothing, Nothing]) -> web.Response:
        return _page(self._docs, "text/html")

    async def get_consent_page(self, call: Call[Nothing, Nothing]) -> web.Response:
        return _page(*self._files["auth.html"])

    async def get_file(self, call: Call[Nothing, Nothing]) -> web.Response:
        found = self._files.get(call.request.match_info["name"])
        if found is None:
            raise NotFound("Resource not found")
        return _page(*found)


def _page(body: bytes, content_type: str) -> web.Response:
    return web.Response(body=body, content_type=content_type, charset="utf-8", headers={"Content-Security-Policy": POLICY})
