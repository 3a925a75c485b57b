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
from multidict import MultiMapping

from gateway.domain.errors import BadRequest, BodyTooLarge, Bug, GatewayError, MethodNotAllowed, NotFound, OurFault, envelope
from gateway.log import Log, exception_fields
from gateway.wire.envelope import MEMBERS_MAX, repeats_key

T = TypeVar("T")
QueryT = TypeVar("QueryT", bound=msgspec.Struct)

_PLACE = re.compile(r"(.*) - at `\$\.?([^`]*)`", re.DOTALL)  # the last one: what comes before it may be a caller's text
_NAME = re.compile("[A-Za-z0-9_]{1,64}")  # of a field that nobody knows; a key is no name
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


async def decoded(request: web.Request, kind: type[T]) -> T:
    """The request's JSON body as a struct. Raises BadRequest with the place of the first fault, and none of the caller's values."""
    body = await request.read()
    try:
        value = msgspec.json.decode(body, type=kind)
        fields = _fields_decoder.decode(body)
    except msgspec.ValidationError as error:
        raise BadRequest(_fault(error, kind, "the body")) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest("the body is not JSON") from None
    if len(fields) > MEMBERS_MAX:  # to look through them takes time that is everybody's
        raise BadRequest(f"the body has more than {MEMBERS_MAX} keys")
    if repeats_key(body, fields):  # another reader, such as a proxy that inspects bodies, might have taken the other one
        raise BadRequest("the body repeats a key")
    return value


def queried(query: MultiMapping[str], kind: type[QueryT]) -> QueryT:
    """A query as a struct, its texts as what they say. Raises BadRequest with the first parameter at fault."""
    try:
        value = msgspec.convert(dict(query), kind, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(_fault(error, kind, "the query")) from None
    for field in msgspec.structs.fields(kind):
        if len(query.getall(field.encode_name, ())) > 1:
            raise BadRequest(f"{field.encode_name}: is given more than once")
    return value


def _fault(error: msgspec.ValidationError, kind: type, whole: str) -> str:
    """The field first, then what is wrong with it."""
    text, place = str(error), ""
    if (found := _PLACE.fullmatch(text)) is not None:
        text, place = found[1], found[2]
    text = text.replace("`", "")
    if (missing := re.fullmatch("Object missing required field (.+)", text)) is not None:
        return f"{'.'.join(filter(None, (place, missing[1])))}: is required"
    if text.startswith("Invalid enum value"):
        text = f"must be one of {_allowed(kind, place)}"
    elif text.startswith("Object contains unknown field "):
        name = text.rpartition(" ")[2]
        text = f"has a field {name} that is not known" if _NAME.fullmatch(name) else "has a field that is not known"
        return f"{place or whole} {text}"
    return f"{place}: {text}" if place else f"{whole} does not fit: {text}"


def _allowed(kind: type, place: str) -> str:
    """The words that a field of a struct may have."""
    struct = msgspec.inspect.type_info(kind)
    assert isinstance(struct, msgspec.inspect.StructType)
    for field in struct.fields:
        if field.encode_name == place:
            types = field.type.types if isinstance(field.type, msgspec.inspect.UnionType) else (field.type,)
            return ", ".join(str(word) for each in types if isinstance(each, msgspec.inspect.LiteralType) for word in each.values)
    return "the words that are documented"


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
