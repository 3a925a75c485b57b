"""Answer heads as bytes. Only headers named here, or given by the caller of these functions, ever leave."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from http import HTTPStatus

from gateway.domain.errors import GatewayError, RateLimited

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
EVENT_STREAM = "text/event-stream"

# Any page may call the API with a key of its own; cookies never come along, since no origin is named.
CORS = (
    b"Access-Control-Allow-Origin: *\r\n"
    b"Access-Control-Expose-Headers: X-Generation-Id, Retry-After, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset\r\n"
)
# What callers and providers said is in JSON and event streams: no browser may take it for a page.
EVERY = CORS + b"X-Content-Type-Options: nosniff\r\n"
PREFLIGHT = (
    ("Access-Control-Allow-Methods", "GET, POST, PATCH, DELETE, OPTIONS"),
    # Every header, since clients invent their own: the star covers all but Authorization. Old browsers read it as a name and need the rest.
    (
        "Access-Control-Allow-Headers",
        "*, Authorization, Content-Type, HTTP-Referer, X-Title, X-OpenRouter-Title, X-OpenRouter-Categories, X-OpenRouter-Metadata, "
        "X-OpenRouter-Experimental-Metadata, X-Session-Id, X-Api-Key, Idempotency-Key, User-Agent, X-Stainless-Lang, "
        "X-Stainless-Package-Version, X-Stainless-OS, X-Stainless-Arch, X-Stainless-Runtime, X-Stainless-Runtime-Version, "
        "X-Stainless-Retry-Count, X-Stainless-Timeout",
    ),
    ("Access-Control-Max-Age", "86400"),
)

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


def status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or f"HTTP/1.1 {status} Status\r\n".encode()


def answer_head(status: int, length: int, headers: Iterable[tuple[str, str]], content_type: str, *, close: bool) -> bytes:
    """The head of an answer of known length."""
    head = _sized(status, content_type) % length if status != 204 else status_line(status) + EVERY
    for name, value in headers:
        head += f"{name}: {value}\r\n".encode()
    return head + (b"Connection: close\r\n\r\n" if close else b"\r\n")


@cache
def _sized(status: int, content_type: str) -> bytes:
    """How the head of an answer of known length begins, without the length; the few there are are made once."""
    return status_line(status) + EVERY + b"Content-Type: %b\r\nContent-Length: %%d\r\n" % content_type.encode()


@cache
def _begun(status: int, content_type: str) -> bytes:
    """The same of a stream's head."""
    kind = b"Content-Type: %b\r\nCache-Control: no-cache\r\nX-Accel-Buffering: no\r\n" % content_type.encode()
    return status_line(status) + EVERY + kind


def stream_head(status: int, headers: Iterable[tuple[str, str]], content_type: str | None, *, close: bool, chunked: bool) -> bytes:
    """The head of an answer of unknown length; `content_type` None: among the headers."""
    head = status_line(status) if content_type is None else _begun(status, content_type)
    for name, value in headers:
        head += f"{name}: {value}\r\n".encode("utf-8", "surrogateescape")
    if chunked:
        head += b"Transfer-Encoding: chunked\r\n"
    return head + (b"Connection: close\r\n\r\n" if close else b"\r\n")


def chunk(data: bytes) -> bytes:
    """One chunk of the chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def error_headers(error: GatewayError) -> tuple[tuple[str, str], ...]:
    """Headers that go with an error: Retry-After in whole seconds, rounded up, and those of a limit of ours."""
    if error.retry_after_s is None:
        return ()
    wait = ("Retry-After", str(max(1, -int(-error.retry_after_s // 1))))
    return (wait, *error.metadata.get("headers", {}).items()) if isinstance(error, RateLimited) else (wait,)
