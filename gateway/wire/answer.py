"""A whole JSON answer of a provider: is it one, what does it say, and how does it read in our name."""

from __future__ import annotations

import msgspec

from gateway.wire.completion import NO_ERROR, id_of, is_filled_object, normal_finish, normalised_choices, unveil, veil


class NotAnAnswer(Exception):
    """The body is not a completion: not JSON, no choices, or an error object in a 200 (`error`, as bytes)."""

    def __init__(self, error: bytes | None = None) -> None:
        super().__init__()
        self.error = error


class Answer(msgspec.Struct, frozen=True, gc=False):
    """A provider's answer, in our name."""

    body: bytes  # without usage
    upstream_id: str
    finish_reason: str | None
    native_finish_reason: str | None
    usage: bytes | None  # the provider's usage object
    choices: msgspec.Raw = msgspec.Raw()  # as the provider wrote them

    def render(self, usage: bytes) -> bytes:
        """The body with this `usage` object."""
        return self.body[:-1] + b',"usage":' + usage + b"}"

    @property
    def content_bytes(self) -> int:
        """Bytes of text made; where that is not plain text (tool calls, parts), of the JSON that carries it."""
        try:
            choices = _choices_decoder.decode(self.choices)
        except msgspec.ValidationError:
            return len(self.choices)
        said = sum([len((each.text or "").encode()) + (each.message.text_bytes() if each.message is not None else 0) for each in choices])
        carried = any(each.message is not None and each.message.tool_calls for each in choices)
        return said or (len(self.choices) if carried else 0)


class _Message(msgspec.Struct, frozen=True, gc=False):
    role: str | msgspec.UnsetType | None = msgspec.UNSET
    content: str | list[msgspec.Raw] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    function_call: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    reasoning_details: list[msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    images: list[msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    annotations: list[msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    audio: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET

    def may_hold_null(self) -> bool:
        """Whether there is, or may be, a null where strict clients refuse one."""
        return (
            self.role is None
            or self.tool_calls is None
            or self.reasoning_details is None
            or self.images is None
            or self.annotations is None
            or self.function_call is not msgspec.UNSET
            or self.audio is not msgspec.UNSET
        )

    def text_bytes(self) -> int:
        texts = (self.content, self.reasoning, self.reasoning_content)
        parts = sum(map(len, self.content)) if isinstance(self.content, list) else 0
        return parts + sum([len(text.encode()) for text in texts if isinstance(text, str)])


class _Choice(msgspec.Struct, frozen=True, gc=False):
    index: int | msgspec.UnsetType = msgspec.UNSET
    finish_reason: str | None = None
    native_finish_reason: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    message: _Message | None = None
    text: str | None = None


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_choices_decoder = msgspec.json.Decoder(list[_Choice])
_encode = msgspec.json.Encoder().encode
_OURS = frozenset(("id", "model", "provider", "choices", "usage", "error"))


def rewrite(body: bytes, generation_id: str, model: str, provider: str) -> Answer:
    """Read and rewrite a provider's JSON answer. Raises NotAnAnswer."""
    try:
        if not body.isascii():
            body.decode()
        return _rewritten(body, generation_id, model, provider)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError):
        veiled = veil(body)
        if veiled is None:
            raise NotAnAnswer from None
    answer = rewrite(veiled, generation_id, model, provider)
    return msgspec.structs.replace(answer, body=unveil(answer.body))


def _rewritten(body: bytes, generation_id: str, model: str, provider: str) -> Answer:
    fields = _fields_decoder.decode(body)
    if "error" in fields and bytes(fields["error"]) not in NO_ERROR:
        raise NotAnAnswer(bytes(fields["error"]))
    raw = fields["choices"]
    usage = fields.get("usage")
    told = bytes(usage) if usage is not None and is_filled_object(usage) else None
    native, choices = _choices(raw)
    pieces: list[bytes | msgspec.Raw] = [
        b'{"id":"', generation_id.encode(), b'","provider":', _encode(provider), b',"model":', _encode(model)
    ]  # fmt: skip
    for name, value in fields.items():
        if name not in _OURS:
            pieces += (b",", _encode(name), b":", value)
    if "system_fingerprint" not in fields:
        pieces.append(b',"system_fingerprint":null')
    pieces += (b',"choices":', choices, b"}")
    return Answer(
        b"".join(pieces), id_of(fields["id"]) if "id" in fields else "", normal_finish(native), native, told, raw
    )  # fmt: skip


def _choices(raw: msgspec.Raw) -> tuple[str | None, bytes | msgspec.Raw]:
    """The native finish reason, and the choices by the contract."""
    try:
        choices = _choices_decoder.decode(raw)
    except msgspec.ValidationError:  # of unusual types
        normalised = normalised_choices(raw)
        if not normalised:
            raise NotAnAnswer from None
        return _text(normalised[0].get("native_finish_reason")), _encode(normalised)
    if not choices:
        raise NotAnAnswer
    first = choices[0]
    native, message = first.finish_reason, first.message
    # The common form needs one insertion, behind a member that stands there once: texts hold no bare quotes.
    if (
        len(choices) == 1
        and native is not None
        and normal_finish(native) == native
        and first.index is not msgspec.UNSET
        and first.native_finish_reason is msgspec.UNSET
        and not (message is not None and message.may_hold_null())
    ):
        text = bytes(raw)
        for colon in (b":", b": "):
            member = b'"finish_reason"%b"%b"' % (colon, native.encode())
            if text.count(member) == 1:
                return native, text.replace(member, b'%b,"native_finish_reason":"%b"' % (member, native.encode()))
    return native, _encode(normalised_choices(raw))


def _text(value: object) -> str | None:
    """A choice's member that is plain or still raw JSON."""
    if isinstance(value, msgspec.Raw):
        value = msgspec.json.decode(value)
    return value if isinstance(value, str) else None
