"""Protocol probe: a subject that answers wrongly is fast for nothing, so each is asked properly before it is loaded."""

from __future__ import annotations

import asyncio
import http.client

import msgspec

from bench.load import Target


class Wrong(AssertionError):
    """A subject's answer is not what the provider said."""


class Message(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    message: Message | None = None
    delta: Message | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class Answer(msgspec.Struct):
    choices: list[Choice]
    usage: Usage | None = None


async def probe(target: Target, *, text: str, tokens: int) -> int:
    """Asks twice on one connection; every answer must carry that text and usage. Gives the events of one answer, 0 for JSON.

    Raises Wrong, OSError.
    """
    return await asyncio.to_thread(_probe, target, text, tokens)


def _probe(target: Target, text: str, tokens: int) -> int:
    host, port = target.address
    connection = http.client.HTTPConnection(host, port, timeout=10)
    path = target.url.partition(f"{host}:{port}")[2]
    try:
        for _ in range(2):
            connection.request("POST", path, target.body, {"Content-Type": "application/json"} | target.headers)
            used = connection.sock
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise Wrong(f"{target.url} answered {response.status}: {body[:300]!r}")
            events = _check_stream(body, text, tokens) if target.stream else _check_json(body, text, tokens)
            if connection.sock is not used:
                raise Wrong(f"{target.url} closed a keep-alive connection")
    finally:
        connection.close()
    return events


def _check_json(body: bytes, text: str, tokens: int) -> int:
    answer = msgspec.json.decode(body, type=Answer)
    message = answer.choices[0].message
    _compare(message.content if message else None, answer.usage, text, tokens)
    return 0


def _check_stream(body: bytes, text: str, tokens: int) -> int:
    datas = [line[6:] for line in body.splitlines() if line.startswith(b"data: ")]
    if not datas or datas[-1] != b"[DONE]":
        raise Wrong(f"a stream without [DONE]: {body[-300:]!r}")
    answers = [msgspec.json.decode(data, type=Answer) for data in datas[:-1]]
    content = "".join(choice.delta.content or "" for answer in answers for choice in answer.choices if choice.delta)
    usages = [answer.usage for answer in answers if answer.usage]
    _compare(content, usages[-1] if usages else None, text, tokens)
    return len(datas)


def _compare(content: str | None, usage: Usage | None, text: str, tokens: int) -> None:
    if content != text:
        raise Wrong(f"text {content!r} is not {text!r}")
    if usage is None or usage.completion_tokens != tokens:
        raise Wrong(f"usage {usage} is not of {tokens} tokens")
