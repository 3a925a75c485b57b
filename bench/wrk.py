"""Drives `wrk` (Debian package `wrk`), the C load generator, with a generated script for the POST body.

wrk counts complete answers and statuses; it does not look into them. Probe the target before.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import msgspec

from bench.load import Report, Target

DONE = """
done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\\nJSON {"requests":%d,"duration_us":%d,"status":%d,"socket":%d,"p50":%.3f,"p99":%.3f,"max":%.3f}\\n',
    summary.requests, summary.duration, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, latency.max / 1000))
end
"""


class Summary(msgspec.Struct):
    """What the script prints: counts, and latencies in ms."""

    requests: int
    duration_us: int
    status: int  # answers other than 2xx and 3xx
    socket: int  # failed connections, reads, writes and timeouts
    p50: float
    p99: float
    max: float


def is_installed() -> bool:
    return shutil.which("wrk") is not None


def script_of(target: Target) -> str:
    """The Lua script of a target. Its strings are long brackets, which know no escapes."""
    headers = {"Content-Type": "application/json"} | target.headers
    lines = ['wrk.method = "POST"', f"wrk.body = [=====[{target.body.decode()}]=====]"]
    lines += [f"wrk.headers[ [=====[{name}]=====] ] = [=====[{value}]=====]" for name, value in headers.items()]
    return "\n".join(lines) + DONE


async def run_wrk(target: Target, *, connections: int, seconds: int, core: int | None, folder: Path) -> Report:
    """One run, pinned to `core`. The script, which may hold a key, is written to `folder`. Raises RuntimeError."""
    script = folder / "wrk.lua"
    script.touch(mode=0o600)
    script.write_text(script_of(target))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script), target.url]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
    )
    try:
        async with asyncio.timeout(seconds + 30):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    found = [line for line in output.decode(errors="replace").splitlines() if line.startswith("JSON ")]
    if process.returncode or not found:
        raise RuntimeError(f"wrk failed on {target.url}: {output.decode(errors='replace')[-500:]}")
    summary = msgspec.json.decode(found[0].removeprefix("JSON "), type=Summary)
    return Report(
        tool="wrk",
        connections=connections,
        seconds=summary.duration_us / 1e6,
        requests=summary.requests,
        errors=summary.status + summary.socket,
        requests_per_s=summary.requests / (summary.duration_us / 1e6),
        latency_ms_p50=summary.p50,
        latency_ms_p99=summary.p99,
        latency_ms_max=summary.max,
    )
