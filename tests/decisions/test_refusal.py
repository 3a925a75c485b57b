"""A provider's refusal: whose fault, what next, and what the caller reads, which is never our credential."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.errors import (
    ContentRefused,
    ContextTooLong,
    FirstByteTimeout,
    Refused,
    Rejected,
    Throttled,
    UpstreamFault,
    UpstreamGarbage,
    envelope,
)
from gateway.wire.refusal import RAW_CHARS_MAX, RETRY_AFTER_S_MAX, from_answer, from_event, retry_after_s

SECRET = "sk-north-0123456789abcdef"
NOW_S = 1_445_412_420.0  # Wed, 21 Oct 2015 07:27:00 GMT


def answered(status: int, body: bytes | object = b"", retry_after: str | None = None, secret: str = SECRET) -> UpstreamFault:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return from_answer(status, raw, provider="North", secret=secret, retry_after=retry_after, now_s=NOW_S)


def in_event(error: bytes | object) -> UpstreamFault:
    raw = error if isinstance(error, bytes) else json.dumps(error).encode()
    return from_event(raw, provider="North", secret=SECRET, now_s=NOW_S)


# status -> class, the caller's status, whether another endpoint is tried, whose fault
TABLE: list[tuple[int, type[UpstreamFault], int, bool, str]] = [
    *[(status, Rejected, status, False, "caller") for status in (400, 405, 406, 410, 411, 412, 413, 414)],
    *[(status, Rejected, status, False, "caller") for status in (415, 421, 422, 424, 426, 428, 431, 451)],
    *[(status, Refused, 502, True, "upstream") for status in (401, 402, 403, 404, 409, 425)],
    *[(status, FirstByteTimeout, 504, True, "upstream") for status in (408, 504, 524)],
    (429, Throttled, 429, True, "upstream"),
    *[(status, Refused, 502, True, "upstream") for status in (500, 501, 502, 503, 505, 507, 520, 521, 522, 529, 530, 599, 600, 999)],
    *[(status, UpstreamGarbage, 502, True, "upstream") for status in (200, 201, 204, 206, 301, 302, 304, 307, 399)],
]  # fmt: skip


@pytest.mark.parametrize(("status", "kind", "caller_status", "retryable", "fault"), TABLE)
@pytest.mark.parametrize(
    "body", [b"", b'{"detail":"x"}', b"<html>x</html>", b"\xff\xfe", b"[" * 100_000, b'{"error":null}', b"null"], ids=range(7)
)
def test_each_status_has_one_meaning(
    status: int, kind: type[UpstreamFault], caller_status: int, retryable: bool, fault: str, body: bytes
) -> None:
    error = answered(status, body)
    assert type(error) is kind
    assert (error.http_status, error.retryable, error.fault, error.provider_status) == (caller_status, retryable, fault, status)
    shown = json.loads(envelope(error))["error"]
    assert (shown["code"], shown["metadata"]["provider_name"], shown["metadata"]["is_byok"]) == (caller_status, "North", False)
    assert shown["metadata"]["raw"] == body.decode("utf-8", "replace")[:RAW_CHARS_MAX]
    assert "provider_code" not in shown["metadata"]


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        ([{"error": {"code": 400, "message": "Bad argument.", "status": "INVALID_ARGUMENT"}}], "Bad argument.", "400"),
        ({"object": "error", "message": "Invalid model: x", "type": "invalid_model", "code": "1500"}, "Invalid model: x", "1500"),
        (
            {"object": "error", "message": {"detail": [{"loc": ["body", "stream_options", "include_usage"], "msg": "Extra inputs"}]}},
            "stream_options.include_usage: Extra inputs",
            None,
        ),
        ({"detail": [{"type": "missing", "loc": ["body", "messages"], "msg": "Field required"}]}, "messages: Field required", None),
        ({"detail": "no such model"}, "no such model", None),
        ({"code": "invalid-argument", "error": "temperature is too high"}, "temperature is too high", "invalid-argument"),
        ([], "Provider returned error", None),
        ({"object": "error", "detail": [5], "message": {"detail": {}}}, "Provider returned error", None),
        ({"error": {"message": "max_tokens is too large", "code": "invalid_value"}}, "max_tokens is too large", "invalid_value"),
        ({"error": {"message": "no", "code": 400, "type": "x", "param": None}}, "no", "400"),
        ({"error": "plain words"}, "plain words", None),
        ({"error": {"message": None, "code": None}}, "Provider returned error", None),
        ({"error": {"message": "", "code": ""}}, "Provider returned error", ""),
        ({"error": {"message": {"a": 1}, "code": {"b": 1}}}, "Provider returned error", None),
        ({"error": {"message": "said all the same", "code": 400.5}}, "said all the same", None),
        ({"error": []}, "Provider returned error", None),
        ({"message": "not an envelope"}, "Provider returned error", None),
        ("text", "Provider returned error", None),
        (b"", "Provider returned error", None),
    ],
)
def test_a_rejection_is_told_in_the_providers_words(body: object, message: str, code: str | None) -> None:
    error = answered(400, body)
    assert (error.message, error.metadata.get("provider_code")) == (message, code)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (
            ContextTooLong,
            {"code": "context_length_exceeded", "message": "This model's maximum context length is 8192 tokens. However, your messages"},
        ),
        (ContextTooLong, {"code": None, "message": "This model's maximum context length is 8192 tokens. However, you requested 9000"}),
        (ContextTooLong, {"type": "invalid_request_error", "message": "prompt is too long: 212000 tokens > 200000 maximum"}),
        (ContextTooLong, {"code": 400, "message": "The input token count (1048577) exceeds the maximum number of tokens allowed"}),
        (
            ContextTooLong,
            {"type": "exceed_context_size_error", "message": "the request exceeds the available context size, try increasing it"},
        ),
        (
            ContextTooLong,
            {"code": "3051", "message": "Prompt contains 40000 tokens, too large for model with 32768 maximum context length"},
        ),
        (ContentRefused, {"code": "content_filter", "message": "The response was filtered due to the prompt triggering the policy"}),
        (ContentRefused, {"code": "content_policy_violation", "message": "Your request was rejected"}),
        (ContentRefused, {"code": None, "message": "Your request was rejected as a result of our safety system."}),
        (
            Rejected,
            {"code": "invalid_value", "message": "max_tokens is too large: 9000. This model supports at most 4096 completion tokens"},
        ),
        (Rejected, {"code": None, "message": "temperature must be between 0 and 2"}),
        (Rejected, {"code": None, "message": "messages with role 'tool' must follow a message with 'tool_calls'"}),
        (Rejected, {"code": None, "message": None}),
        (Rejected, "no such parameter"),
    ],
)
@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_a_rejection_means_is_read_from_code_and_words(kind: type[Rejected], error: object, status: int) -> None:
    for fault in (
        answered(status, {"error": error}),
        *([in_event({**error, "code": status})] if kind is Rejected and isinstance(error, dict) else []),
    ):
        assert type(fault) is kind
        assert (fault.http_status, fault.retryable, fault.fault, fault.transient) == (status, False, "caller", False)
        shown = json.loads(envelope(fault))["error"]
        assert shown["metadata"]["error_type"] == kind.error_type
        if isinstance(error, dict) and error["message"]:
            assert shown["message"] == error["message"]


def test_who_throttles_or_fails_is_not_read_for_words() -> None:
    for status, kind in ((429, Throttled), (500, Refused), (401, Refused)):
        assert type(answered(status, {"error": {"code": "context_length_exceeded", "message": "content_filter"}})) is kind


@pytest.mark.parametrize(
    ("status", "again"), [(500, True), (502, True), (503, True), (529, True), (429, False), (401, False), (404, False)]
)
def test_only_a_failing_server_may_do_better_a_moment_later(status: int, again: bool) -> None:
    assert answered(status).transient is again


def test_other_refusals_are_told_in_ours() -> None:
    for status in (401, 403, 429, 500, 503, 504):
        assert "quota" not in answered(status, {"error": {"message": "your quota is used up"}}).message


def test_long_words_are_cut() -> None:
    error = answered(400, {"error": {"message": "m" * 9000, "code": "c" * 9000}})
    assert (len(error.message), len(str(error.metadata["provider_code"])), len(str(error.metadata["raw"]))) == (1000, 100, RAW_CHARS_MAX)


@pytest.mark.parametrize("place", [0, 50, 90, 95, 99, 980, 990, 999, 4080, 4090, 4095, 9000])
@pytest.mark.parametrize("status", [400, 401, 429, 500, 503, 200])
def test_our_credential_never_reaches_the_caller(place: int, status: int) -> None:
    text = "x" * place + SECRET + "y" * 50
    for body in ({"error": {"message": text, "code": text}}, {"error": text}, text.encode()):
        shown = envelope(answered(status, body)).decode()
        for length in range(8, len(SECRET)):
            assert SECRET[:length] not in shown
    assert SECRET[:8] not in envelope(in_event({"message": text, "code": text})).decode()


def test_a_provider_without_a_credential_is_quoted_as_it_is() -> None:
    assert answered(400, {"error": "abc"}, secret="").message == "abc"


# An error object within a 200.

NO_STATUS: list[object] = [None, 0, 200, 399, 600, -400, "server_error", "4000", 429.0, True, [], {}, 10**30]


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        ({"code": 429, "message": "slow down"}, Throttled, 429),
        ({"code": "429"}, Throttled, 429),
        ({"code": 400, "message": "bad"}, Rejected, 400),
        ({"code": 401}, Refused, 502),
        ({"code": 503}, Refused, 502),
        ({"code": 504}, FirstByteTimeout, 504),
        *[({"code": code, "message": "m"}, Refused, 502) for code in NO_STATUS],
        ("words", Refused, 502),
        (5, Refused, 502),
        (True, Refused, 502),
        ([], Refused, 502),
    ],
)
def test_an_error_object_means_the_status_it_names(error: object, kind: type[UpstreamFault], status: int) -> None:
    for fault in (in_event(error), *([answered(200, {"error": error})] if isinstance(error, dict | str) else [])):
        assert (type(fault), fault.http_status) == (kind, status)
        assert fault.metadata["raw"] in (f'{{"error":{json.dumps(error)}}}', f'{{"error": {json.dumps(error)}}}')


@pytest.mark.parametrize("error", [b"", b"{", b"NaN", b'"\xff"', b'{"a":' * 100_000])
def test_an_error_that_cannot_be_read_is_a_refusal(error: bytes) -> None:
    assert type(in_event(error)) is Refused


# Retry-After.


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0), ("1", 1.0), ("120", 120.0), (" 5 ", 5.0), ("007", 7.0), ("86400", 86400.0), ("86401", RETRY_AFTER_S_MAX),
        ("9" * 60, RETRY_AFTER_S_MAX),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 60.0), ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0), ("Wed, 21 Oct 2015 07:26:00 GMT", 0.0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0), ("Wed, 21 Oct 2099 07:28:00 GMT", RETRY_AFTER_S_MAX),
        ("Wed, 21 Oct 2015 07:28:00 +0000", 60.0), ("Wed, 21 Oct 2015 09:28:00 +0200", 60.0), ("Wed, 21 Oct 2015 07:28:00 -0000", 60.0),
        ("Wednesday, 21-Oct-15 07:28:00 GMT", 60.0), ("Wed Oct 21 07:28:00 2015", 60.0),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float) -> None:
    assert retry_after_s(value, NOW_S) == seconds


NONSENSE = [
    "", " ", "soon", "-1", "+5", "1.5", "1e3", "0x5", "5s", "5, 6", "٣", "²", "NaN", "inf", "9" * 65, "Wed", "GMT", "\x00",
    "Wed, 99 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 77:28:00 GMT", "Wed, 21 Foo 2015 07:28:00 GMT", "Wed, 21 Oct 99999 07:28:00 GMT",
]  # fmt: skip


@pytest.mark.parametrize("value", [None, *NONSENSE])
def test_nonsense_is_no_retry_after(value: str | None) -> None:
    assert retry_after_s(value, NOW_S) is None


@settings(max_examples=200, deadline=None)
@given(
    value=st.text(max_size=40)
    | st.from_regex(r"[A-Z][a-z]{2}, [0-9]{1,4} [A-Z][a-z]{2} [0-9]{1,6} [0-9:]{0,9} [+-]?[0-9A-Z]{0,5}", fullmatch=True)
)
def test_whatever_a_provider_says_the_wait_is_bounded(value: str) -> None:
    seconds = retry_after_s(value, NOW_S)
    assert seconds is None or 0.0 <= seconds <= RETRY_AFTER_S_MAX


@pytest.mark.parametrize(("status", "kept"), [(429, True), (503, True), (529, True), (500, False), (400, False), (504, False)])
def test_retry_after_counts_where_it_means_something(status: int, kept: bool) -> None:
    assert (answered(status, retry_after="7").retry_after_s == 7.0) == kept
