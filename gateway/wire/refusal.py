"""What a provider's refusal means: whose fault it is, whether another endpoint may do better, and what the caller reads."""

from __future__ import annotations

import datetime
import email.utils
import re

import msgspec

from gateway.domain.errors import (
    ContentRefused,
    ContextTooLong,
    FirstByteTimeout,
    Refused,
    Rejected,
    Throttled,
    UpstreamFault,
    UpstreamGarbage,
)
from gateway.wire.cutter import BYTE_ORDER_MARK

RAW_CHARS_MAX = 4096
RETRY_AFTER_S_MAX = 24 * 3600.0

# Faults of our credential or of this provider's catalog: another endpoint may serve the same request.
_NOT_THE_CALLERS = frozenset({401, 402, 403, 404, 408, 409, 425})
_TIMEOUTS = frozenset({408, 504, 524})


class _Told(msgspec.Struct, frozen=True):
    # Providers put numbers, words and objects here.
    code: object = None
    message: object = None


class _Body(msgspec.Struct, frozen=True, rename={"kind": "object"}):
    error: _Told | str | None = None
    # Mistral and FastAPI tell at the top level, in words or as a list of what was wrong where.
    kind: object = None
    code: object = None
    message: object = None
    detail: object = None


_body_decoder = msgspec.json.Decoder(_Body | list[_Body])  # Gemini's compatible endpoint puts its error into a list
_told_decoder = msgspec.json.Decoder(_Told | str)


def from_answer(status: int, body: bytes, *, provider: str, secret: str, retry_after: str | None, now_s: float) -> UpstreamFault:
    """The error for an answer that is not a completion. `now_s` is unix time, for Retry-After dates."""
    told = _told(body, words=status >= 400)
    if status == 200 and told is not None:
        status = _code(told)
    metadata: dict[str, object] = {"provider_name": provider, "raw": _raw(body, secret), "is_byok": False}
    if told is not None and isinstance(told.code, int | str):
        metadata["provider_code"] = _redacted(str(told.code), secret)[:100]
    error: UpstreamFault
    if status == 429:
        return Throttled(provider_status=status, retry_after_s=retry_after_s(retry_after, now_s), metadata=metadata)
    if status in _TIMEOUTS:
        error = FirstByteTimeout("Provider timed out", provider_status=status, metadata=metadata)
    elif status >= 500 or status in _NOT_THE_CALLERS:
        error = Refused(provider_status=status, metadata=metadata)
        if status in (503, 529):
            error.retry_after_s = retry_after_s(retry_after, now_s)
    elif 400 <= status < 500:
        message = told.message if told is not None and isinstance(told.message, str) and told.message else "Provider returned error"
        error = _kind(told, message)(_redacted(message, secret)[:1000], provider_status=status, metadata=metadata)
    else:
        error = UpstreamGarbage("Provider's answer is not a completion", provider_status=status, metadata=metadata)
    return error


# What providers say when a prompt is too long or too much for their filter; codes first, words where they have no code.
_TOO_LONG = re.compile(
    r"context_length_exceeded|exceed_context_size|maximum context length|context (length|window|size)|prompt is too long|"
    r"input is too long|too many (input )?tokens|exceeds? the (maximum|max) (number of |input )?tokens|token count .{0,40}exceeds",
    re.IGNORECASE,
)
_FILTERED = re.compile(
    r"content_filter|content_policy|content management policy|responsibleai|safety (system|filter|polic)|moderation", re.IGNORECASE
)


def _kind(told: _Told | None, message: str) -> type[Rejected]:
    """What a provider means that refuses a request for the caller's sake."""
    code = told.code if told is not None and isinstance(told.code, str) else ""
    said = f"{code[:100]} {message[:1000]}"
    if _TOO_LONG.search(said):
        return ContextTooLong
    return ContentRefused if _FILTERED.search(said) else Rejected


def from_event(error: bytes, *, provider: str, secret: str, now_s: float) -> UpstreamFault:
    """The error for an error object inside a 200 answer."""
    try:
        told = _told_decoder.decode(error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        told = _Told()
    code = _code(told) if isinstance(told, _Told) else 502
    return from_answer(code, b'{"error":' + error + b"}", provider=provider, secret=secret, retry_after=None, now_s=now_s)


def retry_after_s(value: str | None, now_s: float) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date; None: absent or nonsense."""
    if value is None or len(value) > 64:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text), RETRY_AFTER_S_MAX)
    try:
        at = email.utils.parsedate_to_datetime(text)
        if at.tzinfo is None:  # "-0000", or no zone at all: HTTP dates are in UTC
            at = at.replace(tzinfo=datetime.UTC)
        left_s = at.timestamp() - now_s
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return min(max(0.0, left_s), RETRY_AFTER_S_MAX)


def _code(told: _Told) -> int:
    """The status an error object names, as if it had been the answer's."""
    code = told.code
    if isinstance(code, str) and code.isascii() and code.isdigit() and len(code) == 3:
        code = int(code)
    return code if isinstance(code, int) and 400 <= code < 600 else 502


def _told(body: bytes, *, words: bool) -> _Told | None:
    """What an error's body says; with `words` also where it has no error object."""
    try:
        found = _body_decoder.decode(body.removeprefix(BYTE_ORDER_MARK))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    first = found if isinstance(found, _Body) else found[0] if found else _Body()
    if first.error is not None:
        return _Told(first.code, first.error) if isinstance(first.error, str) else first.error
    message = _words(first.message if first.kind in ("error", "Error") else None) or _words(first.detail)
    return _Told(first.code, message) if message and words else None


def _words(said: object) -> str:
    """A message, or the first of a list of faults in its place: `stream_options.include_usage: Extra inputs are not permitted`."""
    if isinstance(said, dict):
        said = said.get("detail")
    if isinstance(said, list) and said and isinstance(said[0], dict):
        where = said[0].get("loc")
        path = ".".join([str(step) for step in where if step != "body"]) if isinstance(where, list) else ""
        said = f"{path}: {said[0].get('msg')}" if path else said[0].get("msg")
    return said if isinstance(said, str) else ""


def _raw(body: bytes, secret: str) -> str:
    return _redacted(body.decode("utf-8", "replace"), secret)[:RAW_CHARS_MAX]


def _redacted(text: str, secret: str) -> str:
    """Providers quote what they were sent; our credential is not to reach a caller that way."""
    return text.replace(secret, "***") if secret else text
