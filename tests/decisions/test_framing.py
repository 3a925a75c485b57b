"""Where a chunked body ends: the payload and what follows it are exact however the bytes were cut; all else is refused."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.wire.framing import CHUNK_OVERHEAD_BYTES_MAX, SIZE_LINE_BYTES_MAX, TRAILERS_BYTES_MAX, Dechunker, FramingError, content_length
from tests.timing import again_if_untimely, in_time

NEXT = b"POST /api/v1/chat/completions HTTP/1.1\r\nHost: a\r\n\r\n"


def encoded(chunks: Iterable[bytes], trailers: bytes = b"", size: str = "%x") -> bytes:
    """The chunked coding of `chunks`, by the book."""
    parts = [(size % len(chunk)).encode() + b"\r\n" + chunk + b"\r\n" for chunk in chunks]
    return b"".join(parts) + b"0\r\n" + trailers + b"\r\n"


def read(pieces: Iterable[bytes]) -> tuple[bytes, bytes, bool]:
    """Payload, what followed the message, and whether it ended; pieces after the end are counted as following."""
    dechunker = Dechunker()
    payload, after = b"", b""
    for piece in pieces:
        if dechunker.done:
            after += piece
        else:
            payload += dechunker.feed(piece)
    return payload, dechunker.rest + after, dechunker.done


def cut(data: bytes, at: Sequence[int]) -> Iterator[bytes]:
    for start, end in zip((0, *at), (*at, len(data)), strict=True):
        yield data[start:end]


def refused(data: bytes) -> bool:
    """Refused in one piece, byte by byte, and cut anywhere in two; the same answer each time."""
    answers = set()
    ways = [[data], [data[i : i + 1] for i in range(len(data))], *([data[:i], data[i:]] for i in range(1, len(data)))]
    for pieces in ways:
        try:
            read(pieces)
            answers.add(False)
        except FramingError:
            answers.add(True)
    assert len(answers) == 1, f"whether {data!r} is refused depends on how it was cut"
    return answers.pop()


BODIES = {
    "empty": [],
    "one": [b'{"model":"a/b"}'],
    "several": [b"a", b"bc", b"d" * 300, b"\r\n", b"0\r\n\r\n"],
    "looks like framing": [b"5\r\nhello\r\n", b"0\r\n\r\n", b"\r", b"\n"],
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("trailers", [b"", b"X-Sum: 1\r\nX-Empty:\r\n"])
@pytest.mark.parametrize("size", ["%x", "%X", "%06x"])
@pytest.mark.parametrize("after", [b"", NEXT, b"\r\n"])
def test_any_cut_gives_the_same_payload_and_rest(name: str, trailers: bytes, size: str, after: bytes) -> None:
    chunks = BODIES[name]
    data = encoded(chunks, trailers, size) + after
    expected = (b"".join(chunks), after, True)
    assert read([data]) == expected
    assert read([data[i : i + 1] for i in range(len(data))]) == expected
    for i in range(1, len(data)):
        assert read([data[:i], data[i:]]) == expected, i


@settings(max_examples=150, deadline=None)
@given(
    chunks=st.lists(st.binary(min_size=1, max_size=200), max_size=12),
    after=st.binary(max_size=60),
    seed=st.integers(0, 2**32),
    pieces=st.integers(0, 40),
)
def test_random_chunkings_agree_with_the_reference(chunks: list[bytes], after: bytes, seed: int, pieces: int) -> None:
    data = encoded(chunks) + after
    rng = random.Random(seed)
    places = sorted(rng.randint(0, len(data)) for _ in range(pieces))
    assert read(cut(data, places)) == (b"".join(chunks), after, True)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=80) | st.text(alphabet="0123abcdefF\r\n;x ", max_size=40).map(str.encode), seed=st.integers(0, 2**32))
def test_noise_is_read_alike_however_it_is_cut(data: bytes, seed: int) -> None:
    rng = random.Random(seed)

    def outcome(pieces: Iterable[bytes]) -> tuple[bytes, bytes, bool] | None:
        try:
            return read(pieces)
        except FramingError:
            return None

    whole = outcome([data])
    assert outcome([data[i : i + 1] for i in range(len(data))]) == whole
    assert outcome(cut(data, sorted(rng.randint(0, len(data)) for _ in range(4)))) == whole


def test_a_whole_chunk_in_a_segment_is_its_payload() -> None:
    dechunker = Dechunker()
    for text in (b"a", b"b" * 16, b"c" * 70000):
        assert dechunker.feed(b"%x\r\n%b\r\n" % (len(text), text)) == text
        assert not dechunker.done
    assert dechunker.feed(b"0\r\n\r\n") == b""
    assert dechunker.done and dechunker.rest == b""


def test_the_last_chunk_and_the_next_message_may_share_a_segment() -> None:
    dechunker = Dechunker()
    assert dechunker.feed(b"3\r\nabc\r\n0\r\n\r\n" + NEXT) == b"abc"
    assert dechunker.done and dechunker.rest == NEXT


def test_nothing_is_done_before_the_empty_line() -> None:
    dechunker = Dechunker()
    assert dechunker.feed(b"3\r\nabc\r\n0\r\n") == b"abc"
    assert not dechunker.done
    dechunker.feed(b"\r")
    assert not dechunker.done
    dechunker.feed(b"\n")
    assert dechunker.done and dechunker.rest == b""


def test_an_empty_read_changes_nothing() -> None:
    dechunker = Dechunker()
    assert [dechunker.feed(piece) for piece in (b"", b"3\r", b"", b"\nab", b"", b"c\r\n", b"")] == [b"", b"", b"", b"ab", b"", b"c", b""]


EXTENSIONS = {
    "named": b";a=b",
    "bare": b";",
    "quoted": b';a="b; c"',
    "several": b";a;b=c;d",
    "spaced": b' ; a = "b"',
    "of no ASCII": ";ä=ö".encode(),
    "signed": b";chunk-signature=" + b"0f" * 32,
    "as long as may be": b";" + b"a" * (SIZE_LINE_BYTES_MAX - 2),
}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_extensions_of_chunks_are_dropped_however_they_are_cut(name: str) -> None:
    extension = EXTENSIONS[name]
    data = b"".join(
        (b"3", extension, b"\r\nabc\r\n", b"2\r\nde\r\n", b"1", extension, b"\r\nf\r\n", b"0", extension, b"\r\nX: y\r\n\r\n", NEXT)
    )
    expected = (b"abcdef", NEXT, True)
    assert read([data]) == expected
    assert read([data[i : i + 1] for i in range(len(data))]) == expected
    for i in range(1, len(data)):
        assert read([data[:i], data[i:]]) == expected, i


def test_extensions_weigh_like_the_rest_of_the_framing() -> None:
    dechunker = Dechunker()
    with pytest.raises(FramingError):
        for _ in range(CHUNK_OVERHEAD_BYTES_MAX // 1000 + 2):
            dechunker.feed(b"1;" + b"a" * 1000 + b"\r\nx\r\n")


MALFORMED = {
    "sign": b"+3\r\nabc\r\n0\r\n\r\n",
    "minus": b"-3\r\nabc\r\n0\r\n\r\n",
    "minus zero": b"-0\r\n\r\n",
    "0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "underscore": b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "leading space": b" 3\r\nabc\r\n0\r\n\r\n",
    "trailing space": b"3 \r\nabc\r\n0\r\n\r\n",
    "tab": b"3\t\r\nabc\r\n0\r\n\r\n",
    "no size": b"\r\nabc\r\n0\r\n\r\n",
    "not hex": b"g\r\nabc\r\n0\r\n\r\n",
    "unicode digit": "٣\r\nabc\r\n0\r\n\r\n".encode(),
    "full-width digit": "\uff13\r\nabc\r\n0\r\n\r\n".encode(),
    "decimal point": b"3.0\r\nabc\r\n0\r\n\r\n",
    "NUL": b"3\x00\r\nabc\r\n0\r\n\r\n",
    "extension without a semicolon": b"3 a=b\r\nabc\r\n0\r\n\r\n",
    "extension with a line feed": b"3;\nabc\r\nabc\r\n0\r\n\r\n",
    "extension with a bare CR": b"3;a\rb\r\nabc\r\n0\r\n\r\n",
    "extension with NUL": b"3;a=\x00\r\nabc\r\n0\r\n\r\n",
    "extension that quotes a line end": b'3;a="\r\nabc"\r\nabc\r\n0\r\n\r\n',
    "extension without a size": b";a=b\r\nabc\r\n0\r\n\r\n",
    "over-long extension": b"3;" + b"a" * SIZE_LINE_BYTES_MAX + b"\r\nabc\r\n0\r\n\r\n",
    "bare LF after the size": b"3\nabc\r\n0\r\n\r\n",
    "bare CR after the size": b"3\rabc\r\n0\r\n\r\n",
    "CR CR LF": b"3\r\r\nabc\r\n0\r\n\r\n",
    "bare LF after the data": b"3\r\nabc\n0\r\n\r\n",
    "no CRLF after the data": b"3\r\nabc0\r\n\r\n",
    "data longer than its size": b"3\r\nabcd\r\n0\r\n\r\n",
    "data shorter than its size": b"3\r\nab\r\n0\r\n\r\n",
    "thirteen digits": b"0000000000003\r\nabc\r\n0\r\n\r\n",
    "over-long size": b"f" * 300 + b"\r\nabc\r\n0\r\n\r\n",
    "trailer without colon": b"3\r\nabc\r\n0\r\njunk\r\n\r\n",
    "trailer without name": b"3\r\nabc\r\n0\r\n: x\r\n\r\n",
    "trailer with space before the colon": b"3\r\nabc\r\n0\r\nX : x\r\n\r\n",
    "folded trailer": b"3\r\nabc\r\n0\r\nX: x\r\n y\r\n\r\n",
    "trailer with bare LF": b"3\r\nabc\r\n0\r\nX: x\nY: y\r\n\r\n",
    "trailer with bare CR": b"3\r\nabc\r\n0\r\nX: x\rY: y\r\n\r\n",
    "trailer with NUL": b"3\r\nabc\r\n0\r\nX: \x00\r\n\r\n",
    "a request in the trailers": b"3\r\nabc\r\n0\r\nGET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_chunks_are_refused_however_they_are_cut(name: str) -> None:
    assert refused(MALFORMED[name])


def test_a_line_that_never_ends_is_refused_before_it_fills_memory() -> None:
    for data in (b"3" * 20, b"x", b"3;" + b"a" * SIZE_LINE_BYTES_MAX, b"3\r\nabc\r\n0\r\n" + b"X: " + b"y" * TRAILERS_BYTES_MAX):
        dechunker = Dechunker()
        with pytest.raises(FramingError):
            for i in range(len(data)):
                dechunker.feed(data[i : i + 1])


def test_trailers_are_limited_all_together() -> None:
    dechunker = Dechunker()
    dechunker.feed(b"186a0\r\n" + b"x" * 100_000 + b"\r\n0\r\n")
    with pytest.raises(FramingError):
        for _ in range(TRAILERS_BYTES_MAX // 100 + 1):
            dechunker.feed(b"X: " + b"y" * 95 + b"\r\n")


@pytest.mark.parametrize("segment", [3, 6, 1448, 65536, 10_000_000])
@again_if_untimely
def test_inp_04_a_mebibyte_in_tiny_chunks_is_refused_cheaply(segment: int) -> None:
    data = b"1\r\nx\r\n" * (1 << 20)
    dechunker = Dechunker()
    read_bytes = 0
    started = time.process_time()
    with pytest.raises(FramingError):
        for start in range(0, len(data), segment):
            read_bytes += len(dechunker.feed(data[start : start + segment]))
    assert read_bytes <= CHUNK_OVERHEAD_BYTES_MAX
    in_time(time.process_time() - started, 0.5)


def test_tokens_in_chunks_of_their_own_are_not_tiny_chunks() -> None:
    event = b'data: {"id":"a","choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'
    dechunker = Dechunker()
    for _ in range(50_000):
        assert dechunker.feed(b"%x\r\n%b\r\n" % (len(event), event)) == event


@pytest.mark.parametrize(("text", "length"), [("0", 0), ("5", 5), ("007", 7), ("123456789012345", 123456789012345)])
def test_content_length_is_plain_digits(text: str, length: int) -> None:
    assert content_length(text) == length


@pytest.mark.parametrize(
    "text", ["", " 5", "5 ", "+5", "-5", "5,5", "5, 5", "0x5", "1_0", "5.0", "1e3", "٣", "\uff15", "five", "1" * 16, "5\n"]
)
def test_other_content_lengths_are_refused(text: str) -> None:
    with pytest.raises(FramingError):
        content_length(text)
