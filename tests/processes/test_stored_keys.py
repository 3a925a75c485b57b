"""AUT-01: what is kept of a key does not give it away, and neither does the time that refusing another one takes."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bench.provider import Provider
from gateway.domain.keys import PREFIX, digest
from tests.conftest import MODEL, RunningGateway, StartGateway
from tests.provider_caller import HELLO, Caller

ROUTE = "/api/v1/chat/completions"
SAMPLES = 20_000


async def connect(gateway: RunningGateway) -> Caller:
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    return Caller(*await asyncio.open_connection(host, int(port)))


def files(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


async def test_aut_01_no_file_holds_a_key_and_keys_are_found_by_their_digest(start_gateway: StartGateway, provider: Provider) -> None:
    gateway = await asyncio.to_thread(start_gateway, {"north": f"{provider.url}/v1"})
    account = await asyncio.to_thread(gateway.create_account, "grace@example.com")
    made = await asyncio.to_thread(gateway.admin, "key", "create", "--account", account["account_id"], "--name", "second")
    secrets = [gateway.key, account["key"], account["management_key"], made["key"]]
    wrong = PREFIX + "0" * 64
    caller = await connect(gateway)
    for secret, expected in zip((*secrets, wrong), (200, 200, 403, 200, 401), strict=True):
        status, _, _ = await caller.ask({"model": MODEL, "messages": HELLO}, ROUTE, f"Authorization: Bearer {secret}\r\n")
        assert status == expected
    caller.writer.close()
    assert (await asyncio.to_thread(gateway.admin, "ledger", "verify"))["generations"] == 3
    with closing(sqlite3.connect(f"file:{gateway.folder}/gateway.db?mode=ro", uri=True)) as db:
        dump = "\n".join(db.iterdump())
    kept = [("the dump", dump.encode()), *files(gateway.folder), ("the log", str(gateway.log).encode())]
    for secret, (where, data) in itertools.product((*secrets, wrong), kept):
        assert secret.removeprefix(PREFIX).encode() not in data, where
    for secret in secrets:
        assert digest(secret) in dump


def mann_whitney(ours: list[int], theirs: list[int]) -> float:
    """The two-sided probability that two samples of one distribution differ as much, by the normal approximation with ties."""
    ranks, ties, number = 0.0, 0.0, 0
    ordered = sorted([(value, True) for value in ours] + [(value, False) for value in theirs])
    for _, group in itertools.groupby(ordered, key=lambda pair: pair[0]):
        equal = [mine for _, mine in group]
        ranks += sum(equal) * (number + (len(equal) + 1) / 2)
        ties += len(equal) ** 3 - len(equal)
        number += len(equal)
    a, b = len(ours), len(theirs)
    expected = a * (number + 1) / 2
    deviation = math.sqrt(a * b / 12 * (number + 1 - ties / (number * (number - 1))))
    return math.erfc(abs(ranks - expected) / deviation / math.sqrt(2))


def test_the_statistic_tells_equal_from_different() -> None:
    rng = random.Random(1)
    samples = [[int(rng.lognormvariate(11, 0.3)) for _ in range(5000)] for _ in range(2)]
    assert mann_whitney(*samples) > 0.001
    assert mann_whitney(samples[0], [value + 3000 for value in samples[1]]) < 0.0001
    assert mann_whitney([1, 1, 2], [1, 2, 2]) == pytest.approx(0.50, abs=0.05)


def changed(secret: str, place: int, rng: random.Random) -> str:
    """The secret with another digit in this place of its random part."""
    digits = list(secret.removeprefix(PREFIX))
    digits[place] = rng.choice([digit for digit in "0123456789abcdef" if digit != digits[place]])
    return PREFIX + "".join(digits)


@pytest.mark.soak
async def test_aut_01_a_key_that_is_almost_right_is_refused_no_later_than_another(start_gateway: StartGateway, provider: Provider) -> None:
    """Keys wrong in their first digit, and keys wrong in their last, in random order on one connection."""
    gateway = await asyncio.to_thread(start_gateway, {"north": f"{provider.url}/v1"})
    rng = random.Random(5)
    took_ns: dict[int, list[int]] = {0: [], -1: []}
    caller = await connect(gateway)
    status, _, _ = await caller.ask({"model": MODEL, "messages": HELLO}, ROUTE, f"Authorization: Bearer {gateway.key}\r\n")
    assert status == 200  # the right one is known to the edge
    for number in range(SAMPLES + 500):
        place = rng.choice((0, -1))
        key = f"Authorization: Bearer {changed(gateway.key, place, rng)}"
        request = f"POST {ROUTE} HTTP/1.1\r\nHost: gw\r\n{key}\r\nContent-Length: 2\r\n\r\n{{}}"
        began = time.perf_counter_ns()
        caller.writer.write(request.encode())
        status, _, _ = await caller.answer()
        ended = time.perf_counter_ns()
        assert status == 401
        if number >= 500:  # warm
            took_ns[place].append(ended - began)
    caller.writer.close()
    assert mann_whitney(took_ns[0], took_ns[-1]) > 0.0001
