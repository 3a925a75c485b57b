"""Writes OpenAI-shaped answers: events of a stream and JSON bodies, in the dialects of real servers.

Pure: behaviour and request in, bytes out. Every answer carries ID_MARK where its id belongs, of the same length as an id,
so that an answer can be framed before its id is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from bench.behaviour import Behaviour

ID_MARK = b"chatcmpl-" + b"\0" * 20
_SENTENCE = "the river runs past quiet stones while small birds count every light upon the water and go home"
WORDS = tuple(" " + word for word in _SENTENCE.split())
TOOL_NAME = "take_note"

_DETAILED = frozenset({"openai", "changing_ids", "groq"})


def dump(value: object) -> bytes:
    return msgspec.json.encode(value)


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer depends on in the request."""

    model: str
    chat: bool  # False: the legacy completions shape
    stream: bool
    include_usage: bool  # stream_options.include_usage
    limit: int | None  # max_tokens or max_completion_tokens
    prompt_tokens: int  # bytes of the text / 4, rounded up
    begun: int = 0  # tokens of the answer that the prompt has already


@dataclass(frozen=True, slots=True)
class Amount:
    """Tokens of one answer after the request's limit. `completion` includes reasoning."""

    prompt: int
    cached: int
    reasoning: int
    reasoning_deltas: int
    content: int
    finish_reason: str

    @property
    def completion(self) -> int:
        return self.reasoning + self.content

    def made_after_delta(self, beat: int) -> int:
        """Completion tokens made when `beat` deltas (reasoning first) are out."""
        if beat <= self.reasoning_deltas:
            return self.reasoning * beat // self.reasoning_deltas if self.reasoning_deltas else 0
        return self.reasoning + beat - self.reasoning_deltas


class Event(NamedTuple):
    """One SSE event with its empty line. `made` counts completion tokens so far, `beat` the deltas before this one."""

    data: bytes
    made: int
    beat: int


def amount_of(behaviour: Behaviour, ask: Ask) -> Amount:
    reasoning = behaviour.reasoning_deltas if behaviour.reasoning_tokens is None else behaviour.reasoning_tokens
    tokens = max(0, behaviour.tokens - ask.begun)
    limit = reasoning + tokens if ask.limit is None else ask.limit
    kept_reasoning = min(reasoning, limit)
    content = min(tokens, limit - kept_reasoning)
    cut = kept_reasoning + content < reasoning + tokens
    natural = "length" if cut else "tool_calls" if behaviour.tool_call else "stop"
    return Amount(
        prompt=ask.prompt_tokens if behaviour.prompt_tokens is None else behaviour.prompt_tokens,
        cached=behaviour.cached_tokens,
        reasoning=kept_reasoning,
        reasoning_deltas=min(behaviour.reasoning_deltas, kept_reasoning) if kept_reasoning < reasoning else behaviour.reasoning_deltas,
        content=content,
        finish_reason=behaviour.finish_reason or natural,
    )


def usage_of(behaviour: Behaviour, amount: Amount, completion: int) -> bytes:
    """A usage object as the dialect writes it, after `completion` tokens."""
    prompt, cached, reasoning = amount.prompt, amount.cached, min(amount.reasoning, completion)
    if behaviour.usage == "zero":
        prompt = completion = cached = reasoning = 0
    elif behaviour.usage == "negative":
        prompt, completion = -5, -7
    usage: dict[str, object] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    if behaviour.dialect in _DETAILED or cached:
        usage["prompt_tokens_details"] = {"cached_tokens": cached, "audio_tokens": 0}
    if behaviour.dialect in _DETAILED or reasoning:
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning, "audio_tokens": 0}
    if behaviour.dialect == "groq":
        usage |= {"queue_time": 0.012, "prompt_time": 0.003, "completion_time": 0.021, "total_time": 0.024}
    return dump(usage)


class Writer:
    """Writes the chunks of one answer."""

    def __init__(self, behaviour: Behaviour, ask: Ask, created: int) -> None:
        self._behaviour = behaviour
        self._ask = ask
        self._dialect = behaviour.dialect
        self._line_end = b"\n" if behaviour.newline == "lf" else b"\r\n"
        self._before, self._after = self._envelope(created)
        self.amount = amount_of(behaviour, ask)
        self._written = 0

    def _envelope(self, created: int) -> tuple[bytes, bytes]:
        """The bytes around the choices of a chunk, without the closing brace."""
        kind = b"chat.completion.chunk" if self._ask.chat else b"text_completion"
        model, time = dump(self._ask.model), b"%d" % created
        if self._dialect == "llamacpp":
            after = b'],"created":%b,"id":"%b","model":%b,"system_fingerprint":"b9170-simulated","object":"%b"'
            return b'{"choices":[', after % (time, ID_MARK, model, kind)
        extra = {
            "vllm": b"",
            "ollama": b',"system_fingerprint":"fp_ollama"',
            "groq": b',"system_fingerprint":"fp_simulated"',
        }.get(self._dialect, b',"service_tier":"default","system_fingerprint":"fp_simulated"')
        suffix = b"-%05d" if self._dialect == "changing_ids" else b""
        before = b'{"id":"%b%b","object":"%b","created":%b,"model":%b%b,"choices":['
        return before % (ID_MARK, suffix, kind, time, model, extra), b"]"

    def chunk(self, choices: bytes, extra: bytes = b"") -> bytes:
        """One chunk's JSON."""
        before = self._before
        if self._dialect == "changing_ids":
            before = before.replace(b"-%05d", b"-%05d" % self._written)
        self._written += 1
        return before + choices + self._after + extra + b"}"

    def event(self, data: bytes) -> bytes:
        return b"data: " + data + self._line_end * 2

    def comment(self) -> bytes:
        return b": simulated keep-alive" + self._line_end * 2

    def choice(self, delta: bytes, text: bytes = b'""', finish_reason: str | None = None) -> bytes:
        """One choice; `delta` is an object for chat, `text` a string for the legacy shape, both as JSON."""
        finish = dump(finish_reason)
        if not self._ask.chat:
            return b'{"text":%b,"index":0,"logprobs":null,"finish_reason":%b}' % (text, finish)
        if self._dialect == "llamacpp":
            return b'{"finish_reason":%b,"index":0,"delta":%b}' % (finish, delta)
        if self._dialect == "ollama":
            return b'{"index":0,"delta":%b,"finish_reason":%b}' % (delta, finish)
        return b'{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}' % (delta, finish)

    def word(self, beat: int) -> int:
        """The place in WORDS of delta number `beat` (from 0), reasoning first."""
        reasoning_deltas = self.amount.reasoning_deltas
        return (beat if beat < reasoning_deltas else beat - reasoning_deltas + self._ask.begun) % len(WORDS)

    def delta(self, beat: int) -> bytes:
        """The choice of delta number `beat`."""
        word = WORDS[self.word(beat)]
        if beat < self.amount.reasoning_deltas:
            field = b"reasoning" if self._dialect in ("groq", "ollama") else b"reasoning_content"
            return self.choice(b"{%b}" % self._member(field, word))
        if self._behaviour.tool_call:
            return self.choice(b'{"tool_calls":[{"index":0,"function":{"arguments":%b}}]}' % dump(word), dump(word))
        return self.choice(b"{%b}" % self._member(b"content", word), dump(word))

    def _member(self, field: bytes, word: str) -> bytes:
        role = b'"role":"assistant",' if self._dialect == "ollama" else b""
        return b'%b"%b":%b' % (role, field, dump(word))

    def usage(self, made: int, *, at_end: bool) -> bytes:
        """The usage member that belongs on a chunk which is not the separate usage chunk."""
        variant = self._behaviour.usage
        if variant == "every" or (variant == "with_finish" and at_end):
            return b',"usage":' + usage_of(self._behaviour, self.amount, made)
        if variant == "null_until_end":
            return b',"usage":null'
        return b""

    def has_usage_chunk(self) -> bool:
        variant = self._behaviour.usage
        return variant == "null_until_end" or (variant in ("openai", "zero", "negative") and self._ask.include_usage)

    def usage_chunk(self) -> bytes:
        usage = b',"usage":' + usage_of(self._behaviour, self.amount, self.amount.completion)
        return self.chunk(b"", usage + (self.timings() if self._dialect == "llamacpp" else b""))

    def timings(self) -> bytes:
        amount = self.amount
        timings = {"prompt_n": amount.prompt, "prompt_ms": 41.2, "predicted_n": amount.completion, "predicted_ms": 318.9}
        return b',"timings":' + dump(timings | {"predicted_per_second": 50.2})


def events(behaviour: Behaviour, ask: Ask, created: int) -> Iterator[Event]:
    """The events of a whole, healthy stream, made as they are asked for."""
    writer = Writer(behaviour, ask, created)
    amount = writer.amount
    for number, event in enumerate(_bare_events(writer, behaviour, ask)):
        if behaviour.comments and number % behaviour.comments == 0:
            event = Event(writer.comment() + event.data, event.made, event.beat)
        yield event
    yield Event(writer.event(b"[DONE]"), amount.completion, max(0, amount.reasoning_deltas + amount.content - 1))


def _bare_events(writer: Writer, behaviour: Behaviour, ask: Ask) -> Iterator[Event]:
    amount = writer.amount
    deltas = amount.reasoning_deltas + amount.content
    groq = b',"x_groq":{"id":"req_simulated"}' if behaviour.dialect == "groq" else b""
    if ask.chat and (behaviour.dialect != "ollama" or behaviour.tool_call):
        yield Event(writer.event(writer.chunk(_opening(writer, behaviour), writer.usage(0, at_end=False) + groq)), 0, 0)
    repeats = behaviour.usage != "every" and behaviour.dialect != "changing_ids"  # equal words make equal events
    known: dict[tuple[bool, int], bytes] = {}
    for beat in range(deltas):
        made = amount.made_after_delta(beat + 1)
        word = (beat < amount.reasoning_deltas, writer.word(beat))
        data = known.get(word)
        if data is None:
            data = writer.event(writer.chunk(writer.delta(beat), writer.usage(made, at_end=False)))
            if repeats:
                known[word] = data
        yield Event(data, made, beat)
    last, made = max(0, deltas - 1), amount.completion
    if behaviour.tool_call and ask.chat and amount.finish_reason != "length":
        closing = writer.choice(b'{"tool_calls":[{"index":0,"function":{"arguments":"\\"}"}}]}')
        yield Event(writer.event(writer.chunk(closing, writer.usage(made, at_end=False))), made, last)
    extra = writer.usage(made, at_end=True)
    if groq:
        extra += b',"x_groq":{"id":"req_simulated","usage":%b}' % usage_of(behaviour, amount, made)
    elif behaviour.dialect == "llamacpp" and not writer.has_usage_chunk():
        extra += writer.timings()
    finish = writer.choice(b'{"role":"assistant","content":""}' if behaviour.dialect == "ollama" else b"{}", b'""', amount.finish_reason)
    yield Event(writer.event(writer.chunk(finish, extra)), made, last)
    if writer.has_usage_chunk():
        yield Event(writer.event(writer.usage_chunk()), made, last)


def _opening(writer: Writer, behaviour: Behaviour) -> bytes:
    if behaviour.tool_call:
        call = {"index": 0, "id": "call_simulated1", "type": "function", "function": {"name": TOOL_NAME, "arguments": '{"text":"'}}
        return writer.choice(dump({"role": "assistant", "content": None, "tool_calls": [call]}))
    content = b"null" if behaviour.dialect == "llamacpp" else b'""'
    return writer.choice(b'{"role":"assistant","content":%b}' % content)


def text_of(tokens: int) -> str:
    """The visible text of that many tokens."""
    whole, rest = divmod(tokens, len(WORDS))
    return "".join(WORDS) * whole + "".join(WORDS[:rest])


def tokens_of(text: str) -> int | None:
    """The number of tokens whose visible text this is; None: there is none."""
    whole, rest = divmod(len(text), len("".join(WORDS)))
    tokens = whole * len(WORDS) + next((count for count in range(len(WORDS)) if len("".join(WORDS[:count])) >= rest), 0)
    return tokens if text_of(tokens) == text else None


def json_body(behaviour: Behaviour, ask: Ask, created: int) -> bytes:
    """The whole answer as one JSON object."""
    amount = amount_of(behaviour, ask)
    text = text_of(ask.begun + amount.content)[len(text_of(ask.begun)) :]
    choice: dict[str, object] = {"index": 0, "finish_reason": amount.finish_reason, "logprobs": None}
    if ask.chat:
        message: dict[str, object] = {"role": "assistant", "content": text}
        if behaviour.tool_call:
            function = {"name": TOOL_NAME, "arguments": dump({"text": text}).decode()}
            message |= {"content": None, "tool_calls": [{"id": "call_simulated1", "type": "function", "function": function}]}
        if amount.reasoning_deltas:
            message["reasoning_content"] = text_of(amount.reasoning_deltas)
        choice["message"] = message
    else:
        choice["text"] = text
    head: dict[str, object] = {
        "id": "@",
        "object": "chat.completion" if ask.chat else "text_completion",
        "created": created,
        "model": ask.model,
        "choices": [choice],
    }
    if behaviour.usage != "none":
        head["usage"] = msgspec.Raw(usage_of(behaviour, amount, amount.completion))
    if behaviour.dialect == "llamacpp":
        head = {"choices": head.pop("choices")} | head | {"timings": {"predicted_n": amount.completion, "predicted_ms": 318.9}}
    elif behaviour.dialect == "groq":
        head["x_groq"] = {"id": "req_simulated"}
    elif behaviour.dialect in ("openai", "changing_ids"):
        head |= {"service_tier": "default", "system_fingerprint": "fp_simulated"}
    return dump(head).replace(b'"id":"@"', b'"id":"%b"' % ID_MARK, 1)


def error_body(behaviour: Behaviour, status: int) -> bytes:
    """An error answer in OpenAI's shape."""
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = behaviour.error_type or kinds.get(status, "server_error")
    return dump({"error": {"message": behaviour.error_message, "type": kind, "param": None, "code": behaviour.error_code or None}})
