"""Is the provisional price what the server's work comes to, and its weight what its tokens take?"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.gpu import HOUR_MS, Part, Run, Span
from policies.gpu_price import FIRST_DECODE_WEIGHT, TokenPrice, Trail, blended, decode_weight, moved

USD = 10**9
STEP_MS, PROMPT_MS = 8.0, 0.05
"""The simulated server: every step writes a token for each request in it and reads up to 512 tokens of prompts."""
CHUNK_TOKENS = 512


def served(requests: int, every_ms: float, seed: int = 1) -> tuple[list[Run], float]:
    """Simulate a server that batches continuously; return its runs, and how many it wrote for at a time."""
    random = Random(seed)
    at_ms = 0.0
    waiting: list[list[float]] = []
    for number in range(requests):
        at_ms += random.expovariate(1 / every_ms)
        waiting.append([at_ms, number, random.choice((50, 200, 800, 2000)), random.randrange(20, 200)])
    now_ms = 0.0
    steps = written = 0
    reading: list[list[float]] = []
    writing: list[list[float]] = []
    firsts: dict[int, float] = {}
    runs: list[Run] = []
    begun = [list(one) for one in waiting]
    while waiting or reading or writing:
        if not reading and not writing:
            now_ms = max(now_ms, waiting[0][0])
        while waiting and waiting[0][0] <= now_ms:
            reading.append([*waiting.pop(0)])
        room = float(CHUNK_TOKENS)
        for one in reading:
            room -= (took := min(room, one[2]))
            one[2] -= took
        now_ms += STEP_MS + PROMPT_MS * (CHUNK_TOKENS - room)
        written += len(writing)
        steps += bool(writing)
        for one in writing:
            one[3] -= 1
        for one in [one for one in reading if not one[2]]:
            firsts[int(one[1])] = now_ms
            reading.remove(one)
            writing.append(one)
        for one in [one for one in writing if not one[3]]:
            writing.remove(one)
            came_ms, index, prompt, completion = begun[int(one[1])]
            runs.append(
                Run(
                    (f"x{int(index)}", 1), round(came_ms), round(firsts[int(index)]), round(now_ms),
                    int(prompt), int(completion) + 1, 0,
                )
            )  # fmt: skip
    return runs, written / steps


@pytest.mark.parametrize("every_ms", [5000, 400, 150])
def test_the_weight_is_what_tokens_take_alone_and_in_a_crowd(every_ms: float) -> None:
    runs, at_a_time = served(600, every_ms)
    weight = decode_weight(runs)
    assert weight is not None
    truth = 1000 * STEP_MS / at_a_time / PROMPT_MS
    assert truth / 2 < weight < 2 * truth, (weight, truth, at_a_time)


def test_who_waited_in_a_crowd_says_nothing_of_what_reading_takes() -> None:
    random = Random(1)
    runs = []
    for number in range(700):
        alone = number < 250
        started_ms = 10_000 * number if alone else 10_000_000 + 30_000 * (number // 10)
        prompt = random.randrange(50, 3000)
        first_ms = started_ms + (prompt // 10 if alone else random.randrange(3000))
        took_ms = 2000 if alone else 20_000
        runs.append(Run((f"x{number}", 1), started_ms, first_ms, first_ms + took_ms, prompt, 101, 0))
    weight = decode_weight(runs)
    assert weight == pytest.approx(200_000, rel=0.25)


def test_what_runs_cannot_tell_is_not_guessed() -> None:
    runs, _ = served(600, 400)
    assert decode_weight([]) is None
    assert decode_weight(runs[:10]) is None
    whole = [Run(one.id, one.started_ms, one.ended_ms, one.ended_ms, 100, 10, 0) for one in runs]
    assert decode_weight(whole) is None, "answers that came whole do not say when they began"
    alike = [Run(one.id, one.started_ms, one.first_token_ms, one.ended_ms, 100, 10, 0) for one in runs]
    assert decode_weight(alike) is None, "prompts of one length do not say what a token takes"


def test_a_weight_moves_by_a_quarter() -> None:
    assert blended(None, None) == FIRST_DECODE_WEIGHT
    assert blended(None, 9000) == 9000
    assert blended(9000, None) == 9000
    assert blended(9000, 5000) == 8000


def run(number: int, from_ms: int, took_ms: int, prompt: int = 0, completion: int = 0) -> Run:
    return Run((f"x{number}", 1), from_ms, None, from_ms + took_ms, prompt, completion, 0)


def price_of(
    runs: Sequence[Run], parts: Sequence[Part] = (), *, now_ms: int = HOUR_MS, idle: bool = False
) -> TokenPrice:
    trail = Trail()
    for one in runs:
        trail.saw_run(one)
    for part in parts:
        trail.saw_part(part)
    price = trail.price(2 * USD, decode_weight=4000, now_ms=now_ms, idle_on_runs=idle)
    assert price is not None
    return price


def test_the_price_is_that_of_the_time_at_work() -> None:
    # 6 s of work, 100 ms for 1,000 prompt tokens: 36 million in an hour for 2 dollars.
    alone = price_of([run(number, 1000 * number, 100, prompt=1000) for number in range(60)])
    assert alone == TokenPrice(56_000_000, 220_000_000)
    assert price_of([run(number, 50_000 * number, 100, prompt=1000) for number in range(60)]) == alone


def test_those_who_run_together_share_the_time() -> None:
    alone = price_of([run(number, 1000 * number, 100, prompt=1000) for number in range(60)])
    both = [run(number, 1000 * (number // 2), 100, prompt=1000) for number in range(120)]
    assert price_of(both).input_nusd == alone.input_nusd // 2


def test_before_enough_was_seen_there_is_no_price() -> None:
    trail = Trail()
    assert trail.price(2 * USD, decode_weight=4000, now_ms=0) is None
    trail.saw_run(run(1, 0, 4999, prompt=10))
    assert trail.price(2 * USD, decode_weight=4000, now_ms=0) is None
    trail.saw_run(run(2, 5000, 1, prompt=10))
    assert trail.price(2 * USD, decode_weight=4000, now_ms=0) is not None


def test_work_of_others_makes_it_cheaper() -> None:
    ours = [run(number, 1000 * number, 500, prompt=1000) for number in range(60)]
    seen = [Part("a", Span(0, 60_000), 120_000, 0, 30_000)]
    assert price_of(ours, seen).input_nusd == price_of(ours).input_nusd // 2


def test_idle_time_makes_it_dearer_only_where_requests_bear_it_and_not_without_end() -> None:
    ours = [run(number, 1000 * number, 500, prompt=1000) for number in range(60)]
    busy = price_of(ours)
    assert price_of(ours, now_ms=60_000, idle=True).input_nusd == 2 * busy.input_nusd
    assert price_of(ours, now_ms=240 * HOUR_MS, idle=True).input_nusd == 10 * busy.input_nusd


def test_a_part_that_is_told_again_counts_once_and_is_kept_once() -> None:
    parts = [Part("a", Span(0, until_ms), until_ms, 0, until_ms) for until_ms in (20_000, 40_000, 60_000)]
    assert price_of([], parts) == price_of([], parts[2:])
    trail = Trail()
    for part in parts:
        trail.saw_part(part)
    assert [len(minute.parts) for minute in trail._minutes.values()] == [1]


@given(
    st.lists(st.tuples(st.integers(0, 10 * HOUR_MS), st.integers(-1000, 2 * HOUR_MS), st.integers(0, 10**6))),
    st.integers(0, 10**15),
)
def test_a_price_is_never_negative_and_what_is_kept_is_bounded(
    seen: list[tuple[int, int, int]], hour_nusd: int
) -> None:
    trail = Trail()
    for number, (from_ms, took_ms, tokens) in enumerate(seen):
        trail.saw_run(run(number, from_ms, took_ms, tokens, tokens))
        trail.saw_part(Part("a", Span(from_ms, from_ms + 1000), tokens, tokens, max(0, took_ms)))
    price = trail.price(hour_nusd, decode_weight=4000, now_ms=10 * HOUR_MS, idle_on_runs=True)
    assert price is None or 0 <= price.input_nusd <= price.output_nusd
    assert len(trail._minutes) <= 60


def test_a_price_is_replaced_when_it_is_a_tenth_off() -> None:
    assert moved(None, TokenPrice(0, 0))
    assert not moved(TokenPrice(100, 400), TokenPrice(110, 440))
    assert moved(TokenPrice(100, 400), TokenPrice(100, 450))
    assert moved(TokenPrice(0, 0), TokenPrice(1, 4))
