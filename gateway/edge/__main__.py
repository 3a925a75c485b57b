"""`python -m gateway.edge '<ChildArgs as JSON>'`: one edge process, started by the supervisor."""

from __future__ import annotations

import gc
import sys

import aiohttp.http_parser
import msgspec
import uvloop

from gateway.edge.app import serve
from gateway.link.pulse import ChildArgs, ignore_foreign_signals
from gateway.log import Log


def main() -> None:
    # The pure-Python parser is slower by a factor and lenient in other places: refuse to serve with it.
    if aiohttp.http_parser.HttpRequestParser is aiohttp.http_parser.HttpRequestParserPy:
        raise SystemExit("aiohttp's C parser is not available on this platform")
    ignore_foreign_signals()
    args = msgspec.json.decode(sys.argv[1], type=ChildArgs)
    log = Log("edge")
    log.start()
    log.capture_stdlib()
    # What was made until now stays for good, and requests leave no cycles behind: the collector need not look often.
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    try:
        uvloop.run(serve(args, log))
    finally:
        log.stop()


if __name__ == "__main__":
    main()
