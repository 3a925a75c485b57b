"""How the simulated provider behaves: one struct of rhythm, shape, refusals and faults, and its short text form.

Nothing here does I/O. `bench.plan` turns a behaviour and a request into the steps of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]
Duration = Annotated[float, msgspec.Meta(ge=0)]

DialectName = Literal["openai", "llamacpp", "ollama", "vllm", "groq", "changing_ids"]
UsageVariant = Literal["openai", "none", "every", "with_finish", "zero", "negative", "null_until_end"]

# Longer answers are made event by event under back-pressure instead of being kept ready as one block.
PLAIN_TOKENS_MAX = 2048


class Behaviour(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to answer. The default is a healthy OpenAI-like provider without any delay.

    "Events" counts everything that is sent as one SSE event: the role chunk, deltas, the finishing chunk, the usage
    chunk and `[DONE]`. A fault "after N events" cuts a JSON answer in the middle of its body.
    """

    # Rhythm
    headers_delay_ms: Duration = 0.0  # before the status line
    ttft_ms: Duration = 0.0  # from the status line to the role chunk and the first delta
    tokens_per_s: Duration = 0.0  # 0: burst, every event in one write

    # What is made
    tokens: Count = 16  # completion tokens of visible content, one event each; a request's max_tokens cuts them
    prompt_tokens: Count | None = None  # reported; None: bytes of the text / 4, rounded up
    cached_tokens: Count = 0  # reported part of the prompt tokens
    reasoning_deltas: Count = 0  # reasoning events before the content
    reasoning_tokens: Count | None = None  # reported inside the completion tokens; None: as many as reasoning_deltas
    tool_call: bool = False  # the tokens are the arguments of one tool call
    prefill: Literal["continues", "ignored", "refused"] = "continues"  # of a chat that ends in the beginning of the answer
    finish_reason: str = ""  # "": stop, length or tool_calls, whichever is true

    # Shape
    dialect: DialectName = "openai"
    usage: UsageVariant = "openai"  # openai, zero, negative: own last chunk, only with stream_options.include_usage
    newline: Literal["lf", "crlf"] = "lf"  # of SSE lines
    comments: Count = 0  # a comment line before every Nth event; 0: none
    framing: Literal["auto", "chunked", "length", "close"] = "auto"  # auto: chunked streams, content-length JSON
    headers: dict[str, str] = {}  # added to every answer

    # Refusals
    status: int = 200  # any other value answers with a JSON error
    retry_after: str = ""  # header value, seconds or a date
    error_body: bool = False  # an error object with status 200
    error_message: str = "simulated failure"
    error_type: str = ""  # "": by status
    error_code: str = ""  # "": null

    # Faults
    refuse: bool = False  # close without an answer
    silent_accept: bool = False  # read the request, never answer
    close_after_requests: Count | None = None  # the Nth request of a connection is dropped, unrecorded, with a close
    reset_after_events: Count | None = None  # then RST
    close_after_events: Count | None = None  # then FIN, without an end of the body
    stall_after_events: Count | None = None  # then silence
    error_event_after: Count | None = None  # then an error event and a proper end without [DONE]
    empty: bool = False  # 200 and zero bytes
    html: bool = False  # 200 and a page
    truncated_json: bool = False  # the body, or the first delta of a stream, ends in the middle of its JSON
    huge_line: Count = 0  # bytes without a newline, made in pieces under back-pressure
    gzip_bomb: Count = 0  # bytes after inflation, sent as content-encoding gzip
    raw: tuple[bytes, ...] = ()  # sent literally instead of an answer (base64 in JSON), one write each
    raw_gap_ms: Duration = 0.0  # between two of them
    raw_close: bool = True  # close after the last one

    def is_plain(self) -> bool:
        """Whether every equal request gets equal bytes at once."""
        return self.headers_delay_ms == 0 and self.ttft_ms == 0 and self.is_kept()

    def is_kept(self) -> bool:
        """Whether every equal request gets equal bytes, at once or after the same delay, so that they can be kept ready."""
        return (
            self.tokens_per_s == 0
            and self.tokens + self.reasoning_deltas <= PLAIN_TOKENS_MAX
            and not (self.refuse or self.silent_accept or self.huge_line or self.gzip_bomb or self.raw)
            and self.close_after_requests is None
            and self.events_max() is None
        )

    def events_max(self) -> int | None:
        """The number of events before the fault strikes; None: no such fault."""
        limits = (self.reset_after_events, self.close_after_events, self.stall_after_events, self.error_event_after)
        given = [limit for limit in limits if limit is not None]
        return min(given) if given else None

    def changed_by(self, text: str) -> Behaviour:
        """This behaviour with the fields of `text` replaced. Raises msgspec.ValidationError."""
        given = split_fields(text)
        other = msgspec.convert(given, Behaviour, strict=False)
        return msgspec.structs.replace(self, **{name: getattr(other, name) for name in given})


def split_fields(text: str) -> Mapping[str, object]:
    """`"ttft_ms=80;tokens=5"` as names and unconverted values.

    `raw` is a comma list of base64, `headers` a comma list of `name:value`. Raises msgspec.ValidationError.
    """
    fields: dict[str, object] = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, value = item.partition("=")
        if not equals:
            raise msgspec.ValidationError(f"{item!r} is not name=value")
        fields[name.strip()] = _value(name.strip(), value.strip())
    return fields


def _value(name: str, value: str) -> object:
    if name == "raw":
        return value.split(",")
    if name == "headers":
        pairs = (pair.partition(":") for pair in value.split(","))
        return {key.strip(): content.strip() for key, _, content in pairs}
    return value
