"""A gateway whose edge and control are a few lines, under the real supervisor: what remains is supervision alone.

    python -m tests.processes.fake_gateway serve --config FILE --workers N

Files in the config's folder steer it: `edge-dies`, `control-dies` (exit 1 at the start), `catalog-is-bad`.
A caller's GET /pid answers the edge's pid; GET /stream answers ten chunks, 100 ms apart, and closes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec
from aiohttp import web

from gateway import config, supervisor
from gateway.link.pulse import ChildArgs, Pulse, pulse_interval_s
from gateway.link.runtime import ADMIN, RuntimeDir
from gateway.supervisor.children import Role

CHUNKS = 10
CHUNK_S = 0.1


def fake_command(role: Role, args: ChildArgs) -> list[str]:
    return [sys.executable, "-m", __spec__.name, role, msgspec.json.encode(args).decode()]


def main() -> int:
    what, *rest = sys.argv[1:]
    if what == "serve":
        return supervisor.serve(Path(rest[1]), None, None, int(rest[3]), command=fake_command)
    args = msgspec.json.decode(rest[0], type=ChildArgs)
    if (Path(args.config).parent / f"{what}-dies").exists():
        return 1
    asyncio.run(edge(args) if what == "edge" else control(args))
    return 0


def pulse(args: ChildArgs) -> Pulse:
    hang_s = config.load_settings(Path(args.config)).server.hang_s
    beating = Pulse(args.pulse_fd, interval_s=pulse_interval_s(hang_s), is_ready=lambda: True, on_orphaned=lambda: os._exit(3))
    beating.start()
    return beating


def told_to_stop() -> asyncio.Event:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


async def edge(args: ChildArgs) -> None:
    stopped = told_to_stop()
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        while head := await reader.readline():
            while (await reader.readline()).strip():
                pass
            if b"/pid" in head:
                body = str(os.getpid()).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
                for number in range(CHUNKS):
                    writer.write(b"%d\n" % number)
                    await asyncio.sleep(CHUNK_S)
                break
            await writer.drain()
        writer.close()
        serving.discard(task)

    listener = socket.socket(fileno=args.listen_fd)
    server = await asyncio.start_server(serve, sock=listener)
    beating = pulse(args)
    await stopped.wait()
    server.close()
    done = {task for task in serving if not task.done()}
    if done:
        await asyncio.wait(done, timeout=5.0)
    beating.stop()


async def control(args: ChildArgs) -> None:
    stopped = told_to_stop()
    facts: list[tuple[str, object]] = []

    async def take(request: web.Request) -> web.Response:
        facts.append((request.path, json.loads(await request.read())))
        return web.json_response({})

    async def reload(_: web.Request) -> web.Response:
        if (Path(args.config).parent / "catalog-is-bad").exists():
            return web.json_response({"problems": [{"file": "catalog.toml", "key": "models[0].id"}]}, status=400)
        return web.json_response({"revision": "2"})

    async def show_facts(_: web.Request) -> web.Response:
        return web.json_response(facts)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text="up 1\n", content_type="text/plain")

    app = web.Application()
    app.router.add_post("/reaped", take)
    app.router.add_post("/supervisor", take)
    app.router.add_post("/catalog/reload", reload)
    app.router.add_get("/facts", show_facts)
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    runtime = RuntimeDir(Path(config.load_settings(Path(args.config)).server.runtime_dir))
    await web.UnixSite(runner, runtime.socket(ADMIN)).start()
    beating = pulse(args)
    await stopped.wait()
    await runner.cleanup()
    beating.stop()


if __name__ == "__main__":
    sys.exit(main())
