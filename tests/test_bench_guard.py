"""What a request costs in counts stays within 5 % of what was accepted, and a growth is told by the functions it is in."""

from __future__ import annotations

import collections
from pathlib import Path

import msgspec
import pytest

from bench import guard
from bench.guard import Count
from bench.replay import bytecodes


def test_hot_path_costs_what_was_accepted() -> None:
    """`python -m bench.guard --record` accepts a change that is worth it."""
    record = guard.accepted(guard.read_records())
    now = guard.count_in_child()
    assert set(now) == {"json", "sse", "event"}
    assert now["sse"].bytecodes > now["event"].bytecodes > 0
    if record is None:
        pytest.skip(f"no counts were accepted for {guard.versions()}")
    complaints = guard.grown(record.counts, now)
    assert not complaints, "\n".join(complaints)


def counted(functions: dict[str, int], *, held: int = 1000, blocks: float = 0.0) -> dict[str, Count]:
    return {"json": Count(bytecodes=sum(functions.values()), functions=functions, bytes=held, blocks=blocks)}


def test_growth_is_told_by_function() -> None:
    before = counted({"a.py parse": 500, "b.py bill": 500})
    assert guard.grown(before, counted({"a.py parse": 550, "b.py bill": 500})) == []  # 5 % exactly
    (complaint,) = guard.grown(before, counted({"a.py parse": 500, "b.py bill": 501, "c.py log": 60}))
    assert complaint == "json: 1,000 -> 1,061 bytecodes; grown: c.py log +60, b.py bill +1"


def test_memory_counts_as_well() -> None:
    before = counted({"a.py parse": 500})
    assert "1,051 bytes" in guard.grown(before, counted({"a.py parse": 500}, held=1051))[0]
    assert "blocks left behind" in guard.grown(before, counted({"a.py parse": 500}, blocks=1.0))[0]


def test_records_of_other_versions_are_kept_and_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    other = guard.Record(versions={**guard.versions(), "python": "CPython 3.0.0"}, counts=counted({"a.py parse": 1}))
    path.write_bytes(msgspec.json.encode([other]))
    assert guard.accepted(guard.read_records(path)) is None
    guard.write_record(counted({"a.py parse": 2}), path)
    guard.write_record(counted({"a.py parse": 3}), path)
    records = guard.read_records(path)
    assert len(records) == 2 and other in records
    found = guard.accepted(records)
    assert found is not None and found.counts == counted({"a.py parse": 3})


def test_counts_are_of_the_step_alone() -> None:
    def work() -> int:
        return sum([1, 2, 3])

    code = collections.Counter({work.__code__: 7})
    assert guard._by_name(code) == {"test_bench_guard.py test_counts_are_of_the_step_alone.<locals>.work": 7}
    once, twice = bytecodes(work), bytecodes(lambda: (work(), work()))
    assert twice[work.__code__] == 2 * once[work.__code__] > 0
