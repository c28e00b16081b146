"""Is what watchers keep of a server's counters what the server did while it was watched, and no more?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.backend import Counters, Unreachable
from gateway.ledger.meters import Meter, Meters
from gateway.ledger.rows import MeterRow

T0 = 490_000 * 3_600_000


def counted(prompt: int = 0, completion: int = 0, running: int = 0, started_s: float | None = None) -> Counters:
    return Counters(prompt_tokens=prompt, completion_tokens=completion, running=running, started_s=started_s)


def watched(*looks: tuple[float, Counters | None]) -> list[MeterRow]:
    """What is kept of looks at these times, in seconds; None: no answer."""
    meter = Meter("gpu-a", "here")
    rows = []
    for at_s, counters in looks:
        if counters is None:
            meter.missed()
        else:
            meter.saw(counters, T0 + round(1000 * at_s))
        rows += meter.rows()
    return rows + meter.rows(all_of_it=True)


def short(rows: Sequence[MeterRow]) -> list[tuple[float, float, int, int]]:
    """From and until, in seconds, prompt and completion tokens."""
    return [
        ((row.from_ms - T0) / 1000, (row.until_ms - T0) / 1000, row.prompt_tokens, row.completion_tokens)
        for row in rows
    ]


def test_counters_are_kept_by_the_minute_and_what_is_between_is_divided() -> None:
    rows = watched((50, counted(100)), (55, counted(130, 1)), (65, counted(140, 21)), (70, counted(141, 21)))
    assert short(rows) == [(50, 60, 35, 11), (60, 70, 6, 10)]
    assert [(row.backend, row.instance, row.hour, row.ready_ms) for row in rows] == [
        ("gpu-a", "here", 490_000, 10_000)
    ] * 2


def test_a_part_never_crosses_an_hour() -> None:
    assert [row.hour for row in watched((-2, counted()), (3, counted(50)))] == [489_999, 490_000]


def test_a_minute_is_told_once_and_when_it_is_over() -> None:
    meter = Meter("gpu-a", "here")
    for at_s in (0, 30, 59):
        meter.saw(counted(at_s), T0 + 1000 * at_s)
        assert meter.rows() == []
    meter.saw(counted(61), T0 + 61_000)
    assert short(meter.rows()) == [(0, 60, 60, 0)]
    assert meter.rows() == []


def test_it_is_busy_where_it_runs_at_both_ends_and_half_of_it_at_one() -> None:
    rows = watched((0, counted(running=1)), (10, counted(running=2)), (20, counted()), (30, counted()))
    assert [row.busy_ms for row in rows] == [15_000]


def test_a_server_that_was_started_anew_counts_from_the_start() -> None:
    rows = watched((0, counted(1000, 50, started_s=T0 / 1000 - 99)), (10, counted(70, 7, started_s=T0 / 1000 + 4)))
    assert short(rows) == [(0, 10, 70, 7)]
    assert [row.restarts for row in rows] == [1]
    assert short(watched((0, counted(1000, 50)), (10, counted(70, 7)))) == [(0, 10, 70, 7)]


def test_servers_that_take_turns_at_one_address_are_not_taken_for_restarts() -> None:
    one, two = counted(10_000, 500, started_s=T0 / 1000 - 900), counted(70, 7, started_s=T0 / 1000 - 800)
    assert watched((0, one), (5, two), (10, one), (15, two)) == []


def test_what_happened_while_it_could_not_be_asked_is_not_guessed() -> None:
    assert short(watched((0, counted(1)), (5, counted(2)), (10, None), (15, counted(90)), (20, counted(91)))) == [
        (0, 5, 1, 0),
        (15, 20, 1, 0),
    ]
    assert watched((0, counted(1)), (61, counted(2))) == [], "asked too long ago"
    assert watched((10, counted(1)), (5, counted(2))) == [], "the clock went back"


LOOKS = st.lists(
    st.tuples(
        st.integers(-1, 70),
        st.none() | st.tuples(st.integers(0, 999), st.integers(0, 999), st.integers(0, 3)),
    ),
    max_size=20,
)


@given(LOOKS)
def test_nothing_is_counted_twice_or_more_than_there_was(looks: list[tuple[int, tuple[int, int, int] | None]]) -> None:
    at_s, prompt, completion, total = 0, 0, 0, 0
    played: list[tuple[float, Counters | None]] = []
    for pause_s, seen in looks:
        at_s += pause_s
        if seen is None:
            played.append((at_s, None))
            continue
        prompt, completion = prompt + seen[0], completion + seen[1]
        played.append((at_s, counted(prompt, completion, seen[2])))
    rows = watched(*played)
    counts = [counters for _, counters in played if counters is not None]
    if counts:
        total = counts[-1].prompt_tokens - counts[0].prompt_tokens
    assert sum(row.prompt_tokens for row in rows) <= total
    if all(0 < pause_s <= 60 and seen is not None for pause_s, seen in looks):
        assert sum(row.prompt_tokens for row in rows) == total, "without a gap all of it is there"
    for row in rows:
        assert row.from_ms < row.until_ms
        assert row.from_ms // 60_000 == (row.until_ms - 1) // 60_000
        assert 0 <= row.busy_ms <= row.ready_ms == row.until_ms - row.from_ms
    keys = [(row.from_ms, row.until_ms) for row in rows]
    if all(pause_s >= 0 for pause_s, _ in looks):
        assert all(one[1] <= other[0] for one, other in pairwise(keys))


class Server:
    def __init__(self, *answers: Counters | Unreachable | None) -> None:
        self.answers = list(answers)

    async def counters(self) -> Counters | None:
        answer = self.answers.pop(0)
        if isinstance(answer, Unreachable):
            raise answer
        return answer


def test_servers_are_asked_and_what_is_complete_is_written() -> None:
    clock = iter(range(T0, T0 + 10**6, 30_000))
    written: list[MeterRow] = []
    server = Server(counted(1), counted(2), counted(5), Unreachable("gone"), None, counted(9))
    meters = Meters({"gpu-a": server}, written.extend, instance="here", now_ms=lambda: next(clock))

    async def play() -> list[bool]:
        return [await meters.look("gpu-a") for _ in range(6)]

    assert asyncio.run(play()) == [True, True, True, True, False, True]
    assert written == []
    assert meters._meters["gpu-a"].rows(all_of_it=True)[0].prompt_tokens == 4


def test_what_is_left_is_written_at_the_end() -> None:
    clock = iter(range(T0, T0 + 10**6, 1000))
    written: list[MeterRow] = []
    meters = Meters(
        {"gpu-a": Server(counted(1), counted(5), counted(9))},
        written.extend,
        instance="here",
        every_s=0.0,
        now_ms=lambda: next(clock),
    )

    async def play() -> None:
        with pytest.raises(IndexError):
            await meters.keep_watching()

    asyncio.run(play())
    assert short(written) == [(0, 2, 8, 0)]
