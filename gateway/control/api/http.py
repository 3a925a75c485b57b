"""What all of control's HTTP has in common: bodies and queries into structs, answers out of them, errors in our envelope."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gateway.domain.errors import BadRequest, BodyTooLarge, Bug, GatewayError, MethodNotAllowed, NotFound, OurFault, envelope
from gateway.log import Log, exception_fields

T = TypeVar("T")

_AT = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?", re.DOTALL)


async def decoded(request: web.Request, kind: type[T]) -> T:
    """The request's JSON body as a struct. Raises BadRequest with the place of the first fault."""
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.ValidationError as error:
        raise BadRequest(_fault(error, "the body")) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest("the body is not JSON") from None


def queried(query: Mapping[str, str], kind: type[T]) -> T:
    """A query as a struct, its texts as what they say. Raises BadRequest with the first parameter at fault."""
    try:
        return msgspec.convert(dict(query), kind, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(_fault(error, "the query")) from None


def _fault(error: msgspec.ValidationError, whole: str) -> str:
    """The field first, then what is wrong with it."""
    found = _AT.fullmatch(str(error))
    assert found is not None
    text, place = found[1].replace("`", ""), found[2]
    missing = re.fullmatch("Object missing required field (.+)", text)
    if missing:
        return f"{'.'.join(filter(None, (place, missing[1])))}: is required"
    return f"{place}: {text}" if place else f"{whole} does not fit: {text}"


def iso_time(unix_ms: int) -> str:
    """`2026-11-24T22:00:00.000Z`, as every management object says its times."""
    return datetime.datetime.fromtimestamp(unix_ms / 1000, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A struct, or plain objects, as JSON."""
    body = msgspec.json.encode(value) if isinstance(value, msgspec.Struct) else orjson.dumps(value)
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


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
