"""INP-01: one request in, one request out, whatever the bytes.

Every attack is either refused and its connection closed, or read in the one way that HTTP/1.1 allows. `SECOND` is what an
attacker wants executed beside the request that was authorised: the provider's books must never hold more than the caller's 200s.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest

from tests.edge.stage import GOOD, Stage, stage_of
from tests.provider_caller import Caller

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = b"@" * 73  # stands for the caller's key, and is as long
HOST = b"Host: gw\r\n"
AUTHORIZED = b"Authorization: Bearer %b\r\nContent-Type: application/json\r\n" % KEY
ROUTE = b"POST /api/v1/chat/completions HTTP/1.1\r\n"
POST = ROUTE + HOST + AUTHORIZED
BODY = b'{"model":"%b","max_tokens":2,"messages":[{"role":"user","content":"Hello"}]}' % GOOD.encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
GOOD_REQUEST = POST + LENGTH + b"\r\n" + BODY
SECOND = GOOD_REQUEST
PING = b"OPTIONS /api/v1/chat/completions HTTP/1.1\r\n" + HOST + b"\r\n"


class Attack(NamedTuple):
    data: bytes
    statuses: tuple[int, ...]
    closed: bool


def refused(status: int, data: bytes) -> Attack:
    """One answer, and the connection is closed."""
    return Attack(data, (status,), closed=True)


def read_as(statuses: tuple[int, ...], data: bytes, *, closed: bool = False) -> Attack:
    """These answers, one for each request that the bytes hold."""
    return Attack(data, statuses, closed)


def with_length(value: bytes) -> bytes:
    return POST + b"Content-Length: " + value + b"\r\n\r\n" + BODY


def with_coding(line: bytes) -> bytes:
    return POST + line + b"\r\n\r\n" + CHUNKS + SECOND


def with_header(line: bytes) -> bytes:
    return POST + line + b"\r\n" + LENGTH + b"\r\n" + BODY


def with_line(line: bytes) -> bytes:
    return line + b"\r\n" + HOST + AUTHORIZED + LENGTH + b"\r\n" + BODY


def chunked(body: bytes) -> bytes:
    return POST + CHUNKED + b"\r\n" + body


SIZE = b"%x" % len(BODY)
REST = b"\r\n" + BODY + b"\r\n0\r\n\r\n"  # of a chunked body, after the first size

ATTACKS = {
    # Both lengths, or more than one.
    "cl-te": refused(400, POST + LENGTH + CHUNKED + b"\r\n" + CHUNKS + SECOND),
    "te-cl": refused(400, POST + CHUNKED + LENGTH + b"\r\n" + CHUNKS + SECOND),
    "cl-zero-te": refused(400, POST + b"Content-Length: 0\r\n" + CHUNKED + b"\r\n" + CHUNKS + SECOND),
    "cl-short-te": refused(400, POST + b"Content-Length: 4\r\n" + CHUNKED + b"\r\n" + CHUNKS + SECOND),
    "cl-twice-equal": refused(400, POST + LENGTH + LENGTH + b"\r\n" + BODY),
    "cl-twice-different": refused(400, POST + LENGTH + b"Content-Length: 0\r\n\r\n" + BODY),
    "cl-twice-other-case": refused(400, POST + LENGTH + b"content-length: 0\r\n\r\n" + BODY),
    "cl-list-equal": refused(400, with_length(b"%d, %d" % (len(BODY), len(BODY)))),
    "cl-list-different": refused(400, with_length(b"%d, 0" % len(BODY))),
    # Lengths that are not plain digits.
    "cl-plus": refused(400, with_length(b"+%d" % len(BODY))),
    "cl-minus": refused(400, with_length(b"-%d" % len(BODY))),
    "cl-hex": refused(400, with_length(b"0x" + SIZE)),
    "cl-underscore": refused(400, with_length(b"7_9")),
    "cl-fraction": refused(400, with_length(b"79.0")),
    "cl-exponent": refused(400, with_length(b"1e2")),
    "cl-empty": refused(400, with_length(b"")),
    "cl-inner-space": refused(400, with_length(b"7 9")),
    "cl-quoted": refused(400, with_length(b'"79"')),
    "cl-other-digits": refused(400, with_length("٧٩".encode())),
    "cl-beyond-64-bits": refused(400, with_length(b"9" * 30)),
    "cl-beyond-limit": refused(413, with_length(b"9" * 12)),
    "cl-space-before-colon": refused(400, POST + b"Content-Length : %d\r\n\r\n" % len(BODY) + BODY),
    "cl-leading-zeros": read_as((200,), with_length(b"00%d" % len(BODY))),
    # Codings that peers read differently.
    "te-identity": refused(501, with_coding(b"Transfer-Encoding: identity")),
    "te-gzip": refused(501, with_coding(b"Transfer-Encoding: gzip")),
    "te-gzip-chunked": refused(501, with_coding(b"Transfer-Encoding: gzip, chunked")),
    "te-chunked-gzip": refused(400, with_coding(b"Transfer-Encoding: chunked, gzip")),
    "te-chunked-chunked": refused(400, with_coding(b"Transfer-Encoding: chunked, chunked")),
    "te-twice": refused(400, with_coding(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked")),
    "te-chunked-then-identity": refused(400, with_coding(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity")),
    "te-identity-then-chunked": refused(400, with_coding(b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked")),
    "te-xchunked": refused(501, with_coding(b"Transfer-Encoding: xchunked")),
    "te-quoted": refused(501, with_coding(b'Transfer-Encoding: "chunked"')),
    "te-parameter": refused(501, with_coding(b"Transfer-Encoding: chunked;q=1")),
    "te-comma-after": refused(400, with_coding(b"Transfer-Encoding: chunked,")),
    "te-empty": refused(501, with_coding(b"Transfer-Encoding: ")),
    "te-vertical-tab": refused(400, with_coding(b"Transfer-Encoding: \x0bchunked")),
    "te-nul": refused(400, with_coding(b"Transfer-Encoding: chunked\x00")),
    "te-space-before-colon": refused(400, with_coding(b"Transfer-Encoding : chunked")),
    "te-folded": refused(400, with_coding(b"Transfer-Encoding:\r\n chunked")),
    "te-behind-bare-lf": refused(400, with_coding(b"X: y\nTransfer-Encoding: chunked")),
    "te-http-1.0": refused(400, ROUTE.replace(b"1.1", b"1.0") + HOST + AUTHORIZED + CHUNKED + b"\r\n" + CHUNKS),
    "te-other-case": read_as((200,), POST + b"transfer-ENCODING: ChUnKeD\r\n\r\n" + CHUNKS),
    "te-underscore-beside-cl": read_as((200,), with_header(b"Transfer_Encoding: chunked")),
    # Lines and bytes.
    "bare-lf-everywhere": refused(400, GOOD_REQUEST.replace(b"\r\n", b"\n")),
    "bare-lf-everywhere-then-an-end": refused(400, GOOD_REQUEST.replace(b"\r\n", b"\n") + b"\r\n\r\n"),
    "bare-lf-in-a-head-without-end": refused(400, POST + b"X: a\nY: b\r\n"),
    "bare-lf-request-line": refused(400, GOOD_REQUEST.replace(b"\r\n", b"\n", 1)),
    "bare-lf-header": refused(400, with_header(b"X: a\nY: b")),
    "bare-lf-empty-line": refused(400, POST + LENGTH + b"\n" + BODY + b"\r\n\r\n"),
    "bare-cr-header": refused(400, with_header(b"X: a\rY: b")),
    "bare-cr-empty-line": refused(400, POST + LENGTH + b"\r" + BODY + b"\r\n\r\n"),
    "folding": refused(400, with_header(b"X: a\r\n b")),
    "folding-tab": refused(400, with_header(b"X: a\r\n\tb")),
    "folding-first": refused(400, ROUTE + b" X: a\r\n" + HOST + AUTHORIZED + LENGTH + b"\r\n" + BODY),
    "nul-in-value": refused(400, with_header(b"X: a\x00b")),
    "nul-in-name": refused(400, with_header(b"X\x00Y: b")),
    "nul-in-target": refused(400, with_line(b"POST /api/v1/chat/completions\x00 HTTP/1.1")),
    "control-in-value": refused(400, with_header(b"X: a\x01b")),
    "delete-in-value": refused(400, with_header(b"X: a\x7fb")),
    "escape-in-value": refused(400, with_header(b"X: \x1b[2J")),
    "header-without-colon": refused(400, with_header(b"X")),
    "header-without-name": refused(400, with_header(b": x")),
    "space-in-name": refused(400, with_header(b"X Y: z")),
    "high-byte-in-name": refused(400, with_header(b"X\xff: z")),
    # Chunks.
    "chunk-extension": read_as((200, 200), chunked(SIZE + b";a=b" + REST + SECOND)),
    "chunk-extension-on-the-last": read_as((200,), chunked(SIZE + b"\r\n" + BODY + b"\r\n0;a=b\r\n\r\n")),
    "chunk-extension-too-long": refused(400, chunked(SIZE + b";" + b"a" * 2000 + REST + SECOND)),
    "chunk-extension-bare-cr": refused(400, chunked(SIZE + b";\r;" + REST + SECOND)),
    "chunk-extension-quoted-crlf": refused(400, chunked(SIZE + b';a="\r\n' + BODY + b'"' + REST + SECOND)),
    "chunk-extension-bare-lf": refused(400, chunked(SIZE + b";\n" + REST + SECOND)),
    "chunk-0x": refused(400, chunked(b"0x" + SIZE + REST)),
    "chunk-plus": refused(400, chunked(b"+" + SIZE + REST)),
    "chunk-minus": refused(400, chunked(b"-" + SIZE + REST)),
    "chunk-underscore": refused(400, chunked(b"0_" + SIZE + REST)),
    "chunk-space-before": refused(400, chunked(b" " + SIZE + REST)),
    "chunk-space-after": refused(400, chunked(SIZE + b" " + REST)),
    "chunk-not-hex": refused(400, chunked(b"zz" + REST)),
    "chunk-without-size": refused(400, chunked(REST)),
    "chunk-overflow": refused(400, chunked(b"1" + b"0" * 14 + SIZE + REST)),
    "chunk-beyond-limit": refused(413, chunked(b"fffffffffff\r\n" + b"x" * 1_100_000)),
    "chunk-size-bare-lf": refused(400, chunked(SIZE + b"\n" + BODY + b"\r\n0\r\n\r\n" + SECOND)),
    "chunk-size-bare-cr": refused(400, chunked(SIZE + b"\r" + BODY + b"\r\n0\r\n\r\n" + SECOND)),
    "chunk-data-without-crlf": refused(400, chunked(SIZE + b"\r\n" + BODY + b"0\r\n\r\n")),
    "chunk-data-bare-lf": refused(400, chunked(SIZE + b"\r\n" + BODY + b"\n0\r\n\r\n")),
    "chunk-longer-than-said": refused(400, chunked(b"2\r\n" + BODY + b"\r\n0\r\n\r\n")),
    "chunk-trailer-bare-lf": refused(400, chunked(SIZE + b"\r\n" + BODY + b"\r\n0\r\nX: a\nY: b\r\n\r\n")),
    "chunk-trailer-smuggles": refused(400, chunked(SIZE + b"\r\n" + BODY + b"\r\n0\r\n" + SECOND)),
    "chunk-trailers-length": read_as((200,), chunked(SIZE + b"\r\n" + BODY + b"\r\n0\r\nContent-Length: 5\r\nX: a\r\n\r\n")),
    "chunk-leading-zeros": read_as((200,), chunked(b"0000" + SIZE + REST)),
    # Versions.
    "http-0.9": refused(400, b"GET /api/v1/models\r\n\r\n"),
    "http-0.9-said": refused(505, with_line(b"POST /api/v1/chat/completions HTTP/0.9")),
    "http-1.2": refused(400, with_line(b"POST /api/v1/chat/completions HTTP/1.2")),
    "http-1.10": refused(400, with_line(b"POST /api/v1/chat/completions HTTP/1.10")),
    "http-01.1": refused(400, with_line(b"POST /api/v1/chat/completions HTTP/01.1")),
    "http-1": refused(400, with_line(b"POST /api/v1/chat/completions HTTP/1")),
    "http-2.0": refused(505, with_line(b"POST /api/v1/chat/completions HTTP/2.0")),
    "http-3.0": refused(400, with_line(b"POST /api/v1/chat/completions HTTP/3.0")),
    "http-lower-case": refused(400, with_line(b"POST /api/v1/chat/completions http/1.1")),
    "http-2-preface": refused(400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "rtsp": refused(505, with_line(b"POST /api/v1/chat/completions RTSP/1.0")),
    "without-version": refused(400, with_line(b"POST /api/v1/chat/completions")),
    # Targets.
    "absolute-form": refused(400, with_line(b"POST http://gw/api/v1/chat/completions HTTP/1.1")),
    "absolute-form-other-host": refused(400, with_line(b"POST http://127.0.0.1:1/api/v1/chat/completions HTTP/1.1")),
    "authority-form": refused(400, with_line(b"POST gw:80 HTTP/1.1")),
    "asterisk-form": refused(400, b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n"),
    "connect": refused(400, b"CONNECT 127.0.0.1:1 HTTP/1.1\r\n" + HOST + b"\r\n" + SECOND),
    "connect-path": refused(400, b"CONNECT /api/v1/chat/completions HTTP/1.1\r\n" + HOST + b"\r\n" + SECOND),
    "two-spaces-before-target": refused(400, with_line(b"POST  /api/v1/chat/completions HTTP/1.1")),
    "two-spaces-after-target": refused(400, with_line(b"POST /api/v1/chat/completions  HTTP/1.1")),
    "tabs-for-spaces": refused(400, with_line(b"POST\t/api/v1/chat/completions\tHTTP/1.1")),
    "space-in-target": refused(400, with_line(b"POST /api/v1/chat/completions x HTTP/1.1")),
    "space-after-version": refused(400, with_line(b"POST /api/v1/chat/completions HTTP/1.1 ")),
    "space-before-method": refused(400, b" " + GOOD_REQUEST),
    "lower-case-method": refused(400, with_line(b"post /api/v1/chat/completions HTTP/1.1")),
    "high-byte-in-target": refused(400, with_line(b"POST /api/v1/chat/completions\xff HTTP/1.1")),
    "double-slash-target": read_as((404,), with_line(b"POST //api/v1/chat/completions HTTP/1.1")),
    "empty-lines-before": refused(400, b"\r\n\r\n" + GOOD_REQUEST),
    "empty-line-before": read_as((200,), b"\r\n" + GOOD_REQUEST),
    # Hosts.
    "host-missing": refused(400, ROUTE + AUTHORIZED + LENGTH + b"\r\n" + BODY),
    "host-twice": refused(400, with_header(b"Host: gw")),
    "host-twice-different": refused(400, with_header(b"host: other")),
    # Offers to become another protocol are not taken up.
    "upgrade-websocket": read_as((200,), with_header(b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13")),
    "upgrade-h2c": read_as((200,), with_header(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk")),
    "upgrade-h2c-smuggles": read_as((200, 200), with_header(b"Connection: Upgrade\r\nUpgrade: h2c") + SECOND),
    "expect-other": refused(417, with_header(b"Expect: 200-ok")),
    "expect-list": refused(417, with_header(b"Expect: 100-continue, x")),
    # Requests inside bodies, and behind requests.
    "request-as-body": read_as((400,), POST + b"Content-Length: %d\r\n\r\n" % len(SECOND) + SECOND),
    "request-as-body-of-get": read_as(
        (404,), b"GET /nowhere HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(SECOND) + SECOND
    ),
    "request-as-chunk": read_as((400,), chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(SECOND), SECOND))),
    "length-too-short": read_as((400, 400), with_length(b"%d" % (len(BODY) - 1)), closed=True),
    "length-too-long": read_as((400,), with_length(b"%d" % (len(BODY) + 4)) + b"xxxx"),
    "good-then-good": read_as((200, 200), GOOD_REQUEST + SECOND),
    "good-then-garbage": read_as((200, 400), GOOD_REQUEST + b"\x16\x03\x01 garbage\r\n\r\n", closed=True),
    "good-then-body-again": read_as((200, 400), GOOD_REQUEST + BODY + b"\r\n\r\n", closed=True),
    "close-then-more": read_as((200,), with_header(b"Connection: close") + SECOND, closed=True),
    "tls-hello": refused(400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x5a" * 32),
    "tls-hello-then-an-end": refused(400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    "zeros": refused(400, bytes(64)),
    "json-without-a-head": refused(400, BODY),
}  # fmt: skip


stage = stage_of(settings={"server": {"request_head_s": 1.0, "request_body_s": 1.0, "body_bytes_max": 1_000_000}})


@pytest.mark.parametrize("pieces", ["whole", "in-pieces", "after-others"])
@pytest.mark.parametrize("name", ATTACKS)
async def test_inp_01_one_request_in_one_request_out(stage: Stage, name: str, pieces: str) -> None:
    attack = ATTACKS[name]
    data = attack.data.replace(KEY, stage.gateway.key.encode())
    stage.good.books.clear()
    async with stage.connected() as caller, asyncio.timeout(5.0):
        if pieces == "after-others":  # whose head, but for its length, is known by now
            for _ in range(2):
                caller.writer.write(GOOD_REQUEST.replace(KEY, stage.gateway.key.encode()))
                assert (await caller.answer())[0] == 200
            stage.good.books.clear()
        if pieces != "in-pieces":
            caller.writer.write(data)
        else:
            await write_in_pieces(caller, data)
        answers = [await caller.answer() for _ in attack.statuses]
        assert tuple(status for status, _, _ in answers) == attack.statuses
        for number, (status, headers, body) in enumerate(answers, 1):
            assert status == 200 or b'"error"' in body
            assert (headers.get("connection") == "close") == (attack.closed and number == len(answers))
        if attack.closed:
            assert await caller.reader.read() == b""
        else:  # the connection is where both sides think it is
            caller.writer.write(PING)
            assert (await caller.head())[0] == 204
    assert len(stage.good.books.entries) == attack.statuses.count(200)


async def write_in_pieces(caller: Caller, data: bytes) -> None:
    """Borders of segments in the middle of everything, for the first kilobyte."""
    for start in range(0, min(len(data), 1024), 7):
        caller.writer.write(data[start : min(start + 7, 1024)])
        await asyncio.sleep(0)
    caller.writer.write(data[1024:])


UNENDED = {
    "http-0.9-line": b"GET /api/v1/models\r\n",
    "head": b"GET / HTTP/1.1\r\nHost: gw\r\nX: ",
    "length": POST + b"Content-Length: 5\r\n\r\nxx",
    "chunk": chunked(b"5\r\nxx"),
    "trailers": chunked(b"0\r\nX: a\r\n"),
}


@pytest.mark.parametrize("name", UNENDED)
async def test_inp_01_what_never_ends_is_cut(stage: Stage, name: str) -> None:
    async with stage.connected() as caller, asyncio.timeout(2.0):
        caller.writer.write(UNENDED[name].replace(KEY, stage.gateway.key.encode()))
        assert (await caller.answer())[0] == 408
        assert await caller.reader.read() == b""


@pytest.mark.parametrize("path", ["/api/v1/chat/completions", "/api/v1/models", "/api/v1/nowhere"])
async def test_inp_01_head_has_no_body_in_its_answer_however_often_it_is_asked(stage: Stage, path: str) -> None:
    """A body in the answer to the second HEAD would be read as the beginning of the third answer."""
    asked = GOOD_REQUEST.replace(KEY, stage.gateway.key.encode()).replace(b"POST /api/v1/chat/completions", b"HEAD " + path.encode())
    async with stage.connected() as caller, asyncio.timeout(5.0):
        heads = []
        for _ in range(4):
            caller.writer.write(asked)
            heads.append((await caller.head())[0])
            caller.writer.write(PING)
            assert (await caller.head())[0] == 204
        assert len(set(heads)) == 1


async def test_inp_01_a_repeated_head_may_come_in_any_pieces(stage: Stage) -> None:
    """Its bytes are cut at every place in turn, between whole ones, and pipelined behind another."""
    request = GOOD_REQUEST.replace(KEY, stage.gateway.key.encode())
    stage.good.books.clear()
    async with stage.connected() as caller, asyncio.timeout(30.0):
        for cut in range(1, len(request), 3):
            caller.writer.write(request[:cut])
            await asyncio.sleep(0.001 if cut % 16 == 1 else 0)
            caller.writer.write(request[cut:])
            assert (await caller.answer())[0] == 200, cut
            caller.writer.write(request)
            assert (await caller.answer())[0] == 200, cut
        caller.writer.write(request * 20)
        assert {(await caller.answer())[0] for _ in range(20)} == {200}
    assert len(stage.good.books.entries) == 2 * len(range(1, len(request), 3)) + 20
