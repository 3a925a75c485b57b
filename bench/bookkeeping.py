"""What the ledger costs: CPU per generation from journal files into a real SQLite store.

    python -m bench.bookkeeping [--records 50000] [--accounts 4] [--per-pass 1000] [--rounds 3]

An edge's journal grows by as many records as come in between two looks under load, and a Bookkeeper reads it, pass by
pass, until it is empty. CPU time of the whole process (all threads, user and system), so the disk's speed does not
count; the best of the rounds, because noise only adds. JSON on stdout. Writing the journal is not measured.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import gc
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from gateway.control.bookkeeper import Bookkeeper
from gateway.control.leases import releaser
from gateway.control.store import Account, Key
from gateway.control.store.sqlite import SqliteStore
from gateway.domain.generation import AttemptRecord, Generation, GenerationIds
from gateway.domain.usage import Usage
from gateway.log import Log
from gateway.wire import records

PER_SECOND = 5000  # generations; says how ids and times of records lie together
FIRST_S = 1_764_072_000


def made(number: int, accounts: int, chance: random.Random, ids: GenerationIds) -> Generation:
    """A chat as the edge records it."""
    account = f"user_{chance.randrange(accounts):024}"
    now_s = FIRST_S + number // PER_SECOND
    prompt, completion = chance.randrange(10, 4000), chance.randrange(1, 900)
    return Generation(
        id=ids.new(now_s),
        account_id=account,
        key_digest=account[5:].rjust(64, "d"),
        created_at_ms=now_s * 1000 + number % 1000,
        model="acme/sage-1",
        endpoint_id="acme/sage-1@north",
        provider="north",
        upstream_id=f"chatcmpl-{chance.getrandbits(96):024x}",
        streamed=bool(number % 2),
        finish_reason="stop",
        native_finish_reason="stop",
        usage=Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=prompt // 3, reasoning_tokens=completion // 4),
        charged_nanos=prompt * 2500 + completion * 10_000,
        prompt_nanos=prompt * 2500,
        settles=(f"balance:{account}",),
        latency_ms=412,
        generation_ms=3210,
        user_agent="OpenAI/Python 2.6.1",
        attempts=(AttemptRecord(endpoint_id="acme/sage-1@north", provider="north", outcome="ok", status=200, latency_ms=412),),
    )


async def measured(folder: Path, wish: argparse.Namespace) -> dict[str, Any]:
    """One round on a new store."""
    chance, ids = random.Random(1), GenerationIds()
    store = await SqliteStore.open(folder / "gateway.db")
    try:
        for number in range(wish.accounts):
            account = f"user_{number:024}"
            key = Key(digest=account[5:].rjust(64, "d"), account_id=account, name="bench", label="x", created_at_ms=1)
            await store.create_account(
                Account(id=account, email=f"{number}@example.com", created_at_ms=1), [key], topup_nanos=wish.records * 10**9
            )
        journal = folder / "journal"
        journal.mkdir()
        fd = os.open(journal / "edge-0-a.1", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_EX)
        keeper = Bookkeeper(store=store, folder=journal, release=releaser(store), log=Log("bench"))
        cpu_s, passes_s, record_bytes = 0.0, [], 0
        for begin in range(0, wish.records, wish.per_pass):
            count = min(wish.per_pass, wish.records - begin)
            data = b"".join(records.encode(made(begin + n, wish.accounts, chance, ids)) for n in range(count))
            record_bytes += len(data)
            assert os.write(fd, data) == len(data)
            began_cpu_s, began_s = time.process_time(), time.monotonic()
            assert await keeper.read_all()
            cpu_s += time.process_time() - began_cpu_s
            passes_s.append(time.monotonic() - began_s)
        os.close(fd)
        report = await store.verify_ledger()
        assert (report.ok, report.generations) == (True, wish.records)
        return {
            "cpu_us_per_generation": round(cpu_s / wish.records * 1e6, 2),
            "pass_ms_p50": round(sorted(passes_s)[len(passes_s) // 2] * 1e3, 2),
            "pass_ms_max": round(max(passes_s) * 1e3, 2),
            "record_bytes": round(record_bytes / wish.records),
            "store_bytes_per_generation": round((folder / "gateway.db").stat().st_size / wish.records),
        }
    finally:
        await store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--accounts", type=int, default=4)
    parser.add_argument("--per-pass", type=int, default=1000, help="records that come between two looks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the store is to lie; without it: the system's temporary folder")
    wish = parser.parse_args()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)  # as control does
    rounds = []
    for _ in range(wish.rounds):
        with tempfile.TemporaryDirectory(dir=wish.folder) as folder:
            rounds.append(asyncio.run(measured(Path(folder), wish)))
    best = min(rounds, key=lambda each: each["cpu_us_per_generation"])
    print(json.dumps({"records": wish.records, "accounts": wish.accounts, "per_pass": wish.per_pass, **best}))


if __name__ == "__main__":
    main()
