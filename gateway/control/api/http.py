"""What all of control's HTTP has in common: bodies into structs, answers out of them, every error in our envelope."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gateway.domain.errors import BadRequest, BodyTooLarge, Bug, GatewayError, MethodNotAllowed, NotFound, OurFault, envelope
from gateway.log import Log, exception_fields

T = TypeVar("T")

API_PREFIXES = ("/api/v1", "/v1")  # one API: OpenRouter's base path, and the one that OpenAI clients assume
# Any page may call the API with a key of its own; cookies never come along, since no origin is named.
CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": "X-Generation-Id, Retry-After, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset",
}
PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, PATCH, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "*, Authorization",  # the star does not cover Authorization
    "Access-Control-Max-Age": "86400",
}


async def decoded(request: web.Request, kind: type[T]) -> T:
    """The request's JSON body as a struct. Raises BadRequest with the place of the first fault."""
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.ValidationError as error:
        raise BadRequest(f"the body does not fit: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest("the body is not JSON") from None


def iso_time(unix_ms: int) -> str:
    """`2026-11-24T22:00:00.000Z`, as every management object says its times."""
    return datetime.datetime.fromtimestamp(unix_ms / 1000, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def public_application(routes: Iterable[web.RouteDef], *, log: Log) -> web.Application:
    """The application that edges relay callers to."""
    app = web.Application(middlewares=[_open_to_pages, errors(log)])
    app.add_routes(routes)
    return app


def answer(value: Any, status: int = 200) -> web.Response:
    """A struct, or plain objects, as JSON."""
    body = msgspec.json.encode(value) if isinstance(value, msgspec.Struct) else orjson.dumps(value)
    return web.Response(body=body, status=status, content_type="application/json")


def error_answer(error: GatewayError, headers: dict[str, str] | None = None) -> web.Response:
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return web.Response(body=envelope(error), status=error.http_status, headers=headers, content_type="application/json")


def errors(log: Log) -> Middleware:
    """The middleware that turns whatever a handler raises, and aiohttp's own refusals, into the envelope."""

    @web.middleware
    async def in_envelope(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except GatewayError as error:
            if isinstance(error, OurFault):
                log.warning("request_failed", code=error.code, **exception_fields(error.__cause__))
            return error_answer(error)
        except web.HTTPException as refusal:
            return _translated(refusal)
        except Exception as error:  # noqa: BLE001 - the outermost edge of a request
            log.error("request_crashed", **exception_fields(error))
            return error_answer(Bug())

    return in_envelope


@web.middleware
async def _open_to_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Pages of other origins may read the API, and nothing beside it."""
    if not request.path.startswith(tuple(f"{prefix}/" for prefix in API_PREFIXES)):
        return await handler(request)
    if request.method == "OPTIONS":
        return web.Response(status=204, headers={**CORS, **PREFLIGHT})
    response = await handler(request)
    response.headers.update(CORS)
    return response


def _translated(refusal: web.HTTPException) -> web.StreamResponse:
    if isinstance(refusal, web.HTTPMethodNotAllowed):
        return error_answer(MethodNotAllowed("Method not allowed"), {"Allow": ", ".join(sorted(refusal.allowed_methods))})
    if refusal.status == 404:
        return error_answer(NotFound("Resource not found"))
    if refusal.status == 413:
        return error_answer(BodyTooLarge("Request payload too large"))
    if refusal.status >= 500:
        return error_answer(Bug())
    if refusal.status >= 400:
        return error_answer(BadRequest("Invalid request"))
    return refusal
