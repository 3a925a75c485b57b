"""Log events as JSON lines on stderr, never at the cost of a request.

Lines collect in memory and one thread writes them every `FLUSH_S`: a reader of stderr that is slow, stopped or gone,
or a full disk, costs lines (counted in `dropped`), not time on the event loop. Control bytes are escaped by JSON.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import orjson

FLUSH_S = 0.1
PENDING_BYTES_MAX = 4 * 1024 * 1024
LINE_BYTES_MAX = 16 * 1024
PIPE_BLOCK_BYTES_MAX = 4096  # PIPE_BUF: a pipe that several processes write to keeps blocks of this size whole
FILE_BLOCK_BYTES_MAX = 65536  # a file keeps all whole; each write makes this thread wait for its turn to run

_encoder = msgspec.json.Encoder()

Level = Literal["debug", "info", "warning", "error"]


class Log:
    """The log of one process. Usable before `start()` and after `stop()`: lines then are written at once."""

    def __init__(self, process: str, fd: int = 2) -> None:
        self._fd = fd
        self._head = {"process": process, "pid": os.getpid()}
        self._head_json = orjson.dumps(self._head)[1:-1]
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._block_bytes_max = FILE_BLOCK_BYTES_MAX if _is_file(fd) else PIPE_BLOCK_BYTES_MAX
        self._torn = False  # the last line that was written has no end
        self.dropped = 0

    def start(self) -> None:
        """Begin writing from a thread of its own."""
        self._stopping = False
        self._thread = threading.Thread(target=self._write_pending, name="log", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 1.0) -> None:
        """Write what is pending, for at most `timeout_s`."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping = True
            self._wake.set()
            thread.join(timeout_s)

    def info(self, event: str, **fields: Any) -> None:
        self.write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self.write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self.write("error", event, fields)

    def write(self, level: Level, event: str, fields: Mapping[str, Any]) -> None:
        """One line: time (unix seconds), level, event, process, pid and the fields."""
        record = {"time": round(time.time(), 3), "level": level, "event": event, **self._head, **fields}
        try:
            # The newline also makes a copy of the right size: what orjson returns keeps its 4 KiB buffer while it waits here.
            line = orjson.dumps(record, default=str, option=orjson.OPT_NON_STR_KEYS) + b"\n"
        except orjson.JSONEncodeError:  # text that is not Unicode, such as a path of arbitrary bytes
            line = json.dumps(record, default=str).encode() + b"\n"
        self._append(line)

    def structs(self, event: str, lines: Sequence[msgspec.Struct]) -> None:
        """Info lines whose fields are structs', all of this moment: a fifth of the cost, for what is written once per request."""
        head = b'{"time":%.3f,"level":"info","event":"%b",%b,' % (time.time(), event.encode(), self._head_json)
        # JSON holds no bare line end, so each one is where a line begins.
        text = (b"\n" + _encoder.encode_lines(lines)).replace(b"\n{", b"\n" + head)[1:]
        if len(text) <= LINE_BYTES_MAX:
            self._append(text)
        else:
            for line in text.splitlines(keepends=True):
                self._append(line)

    def _append(self, text: bytes) -> None:
        """A line, or several that are no longer than one may be."""
        if len(text) > LINE_BYTES_MAX or self._pending_bytes > PENDING_BYTES_MAX:
            self.dropped += text.count(b"\n")
            return
        self._pending.append(text)
        self._pending_bytes += len(text)
        if self._thread is None:
            self._flush()

    def capture_stdlib(self, level: int = logging.WARNING) -> None:
        """Route the `logging` module (asyncio, aiohttp) here, at `level` and above."""
        root = logging.getLogger()
        root.handlers[:] = [_StdlibHandler(self)]
        root.setLevel(level)

    def _write_pending(self) -> None:
        while not self._stopping:
            self._wake.wait(FLUSH_S)
            self._flush()
        self._flush()

    def _flush(self) -> None:
        # Lines are only ever appended behind these, also while this thread is interrupted between two statements.
        texts = self._pending[:]
        del self._pending[: len(texts)]
        self._pending_bytes = 0
        data, at = b"".join(texts), 0
        try:
            for block in _blocks(data, self._block_bytes_max):
                self._write_block(block)
                at += len(block)
        except OSError:  # reader gone, disk full: logging trouble is not request trouble
            self.dropped += data.count(b"\n", at)

    def _write_block(self, data: bytes) -> None:
        if self._torn:
            data = b"\n" + data
        at = 0
        try:
            while at < len(data):
                at += os.write(self._fd, data[at:])
        finally:
            if at:
                self._torn = data[at - 1] != ord("\n")


def _is_file(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


def _blocks(lines: bytes, bytes_max: int) -> Iterator[bytes]:
    """Runs of whole lines, each of at most `bytes_max` unless one line alone is longer."""
    start = 0
    while start < len(lines):
        end = lines.rfind(b"\n", start, start + bytes_max) + 1 or lines.find(b"\n", start) + 1
        yield lines[start:end]
        start = end


class _StdlibHandler(logging.Handler):
    """Foreign records as events; the exception's type and place, never its arguments (they may hold input)."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"logger": record.name, "message": str(record.msg)[:500]}
        if record.exc_info and record.exc_info[0] is not None:
            fields |= exception_fields(record.exc_info[1])
        level: Level = "error" if record.levelno >= logging.ERROR else "warning" if record.levelno >= logging.WARNING else "info"
        self._log.write(level, "stdlib", fields)


def exception_fields(error: BaseException | None) -> dict[str, Any]:
    """`{"exception", "at"}`: the class and the innermost frames of an error, without its message."""
    if error is None:
        return {}
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        place = "/".join(Path(code.co_filename).parts[-2:])
        frames.append(f"{place}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return {"exception": type(error).__name__, "at": frames[-6:]}
