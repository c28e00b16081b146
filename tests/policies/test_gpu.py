"""Does every hour of a server come to its price, whatever ran in it, and every run to the sum of its hours?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from policies.gpu import (
    HOUR_MS,
    Change,
    Paid,
    Part,
    Run,
    Share,
    Span,
    Split,
    apart,
    apportioned,
    changes,
    joined,
    split_hour,
)

HOUR = Span(10 * HOUR_MS, 11 * HOUR_MS)
HOURS = tuple(Span(number * HOUR_MS, (number + 1) * HOUR_MS) for number in range(8, 14))
USD = 10**9


def run(number: int, from_s: float, until_s: float, *, first_s: float | None = None, **fields: int) -> Run:
    """A run whose times are seconds after the begin of the hour."""
    return Run(
        id=(f"x{number:03}", 1),
        started_ms=HOUR.from_ms + round(1000 * from_s),
        first_token_ms=None if first_s is None else HOUR.from_ms + round(1000 * first_s),
        ended_ms=HOUR.from_ms + round(1000 * until_s),
        prompt_tokens=fields.get("prompt", 0),
        completion_tokens=fields.get("completion", 0),
        billed_nusd=fields.get("billed", 0),
    )


def part(
    from_s: int, until_s: int, *, watcher: str = "a", prompt: int = 0, completion: int = 0, busy_s: int = 0
) -> Part:
    span = Span(HOUR.from_ms + 1000 * from_s, HOUR.from_ms + 1000 * until_s)
    return Part(watcher, span, prompt, completion, 1000 * busy_s)


def total(split: Split) -> int:
    return split.shares_nusd + split.idle_nusd + split.outside_nusd


MOMENTS = st.one_of(
    st.integers(HOUR.from_ms - HOUR_MS, HOUR.until_ms + HOUR_MS),
    st.sampled_from([HOUR.from_ms, HOUR.until_ms, HOUR.from_ms - 1, HOUR.until_ms - 1, 9 * HOUR_MS]),
)
TOKENS = st.one_of(st.just(0), st.integers(0, 5000), st.integers(0, 10**9))


@st.composite
def any_runs(draw: st.DrawFn) -> list[Run]:
    fields = st.tuples(MOMENTS, st.none() | MOMENTS, MOMENTS, TOKENS, TOKENS, st.integers(0, 10**12))
    return [Run((f"x{number % 7}", number), *given) for number, given in enumerate(draw(st.lists(fields, max_size=12)))]


@st.composite
def any_parts(draw: st.DrawFn) -> list[Part]:
    within = st.integers(HOUR.from_ms, HOUR.until_ms)
    fields = st.tuples(st.sampled_from("abc"), within, within, TOKENS, TOKENS, st.integers(0, 2 * HOUR_MS))
    return [
        Part(watcher, Span(min(one, two), max(one, two)), prompt, completion, busy_ms)
        for watcher, one, two, prompt, completion, busy_ms in draw(st.lists(fields, max_size=8))
    ]


PRICES = st.one_of(st.just(0), st.just(1), st.integers(0, 100), st.integers(0, 10**15))
WEIGHTS = st.integers(1, 10**6)


@given(any_runs(), any_parts(), PRICES, WEIGHTS, st.booleans())
def test_shares_idle_and_outside_are_the_price_of_the_hour(
    runs: list[Run], parts: list[Part], hour_nusd: int, weight: int, idle_on_runs: bool
) -> None:
    split = split_hour(HOUR, hour_nusd, runs, parts, decode_weight=weight, idle_on_runs=idle_on_runs)
    assert total(split) == hour_nusd
    assert min([split.idle_nusd, split.outside_nusd, *(share.nusd for share in split.shares)]) >= 0
    assert {share.id for share in split.shares} == {one.id for one in runs}
    assert 0 <= split.busy_ms <= HOUR_MS
    again = split_hour(HOUR, hour_nusd, runs[::-1], parts[::-1], decode_weight=weight, idle_on_runs=idle_on_runs)
    assert again == split, "in whatever order rows are read, the shares are the same"


@given(any_runs())
def test_what_a_run_is_in_its_hours_adds_up_to_the_run(runs: list[Run]) -> None:
    for one in runs:
        assert sum(one.billed_within(hour) for hour in HOURS) == one.billed_nusd
        tokens = [one.tokens_within(hour) for hour in HOURS]
        assert sum(read for read, _ in tokens) == one.prompt_tokens
        assert sum(wrote for _, wrote in tokens) == one.completion_tokens
        assert min(map(min, tokens)) >= 0


def close(
    hour: Span, runs: Sequence[Run], paid: dict[tuple[str, int], Paid], hour_nusd: int, weight: int = 4000
) -> list[Change]:
    """Close an hour once more, and note what was told."""
    here = [one for one in runs if one.started_ms < hour.until_ms and one.span.until_ms >= hour.from_ms]
    told = changes(hour, here, split_hour(hour, hour_nusd, here, [], decode_weight=weight), paid)
    for change in told:
        before = paid.get(change.id, Paid(0, 0))
        paid[change.id] = Paid(change.share_nusd, before.changed_nusd + change.change_nusd)
    return told


NUMBERS = st.sets(st.integers(0, 11))


@given(any_runs(), st.lists(NUMBERS, max_size=3), NUMBERS, PRICES, st.integers(1, 10**6))
def test_rows_that_come_late_or_go_end_at_what_one_closing_with_all_of_them_says(
    runs: list[Run], before: list[set[int]], last: set[int], hour_nusd: int, weight: int
) -> None:
    paid: dict[tuple[str, int], Paid] = {}
    for numbers in before:
        close(HOUR, [one for number, one in enumerate(runs) if number in numbers], paid, hour_nusd, weight)
    there = [one for number, one in enumerate(runs) if number in last]
    close(HOUR, there, paid, hour_nusd)
    at_once: dict[tuple[str, int], Paid] = {}
    close(HOUR, there, at_once, hour_nusd)
    nothing = Paid(0, 0)
    assert {id_: one for id_, one in paid.items() if one != nothing} == {
        id_: one for id_, one in at_once.items() if one != nothing
    }
    assert close(HOUR, there, paid, hour_nusd) == [], "what was told is not told again"


@given(any_runs(), st.permutations(HOURS), PRICES)
def test_when_all_hours_are_closed_a_run_has_paid_its_shares(
    runs: list[Run], hours: list[Span], hour_nusd: int
) -> None:
    cost = {one.id: one.billed_nusd for one in runs}
    shares = dict.fromkeys(cost, 0)
    for hour in hours:
        for change in close(hour, runs, {}, hour_nusd):
            cost[change.id] += change.change_nusd
            shares[change.id] += change.share_nusd
    assert cost == shares


def test_a_run_alone_pays_for_its_time_and_the_rest_is_idle() -> None:
    split = split_hour(HOUR, 2 * USD, [run(1, 0, 36, prompt=100, completion=10)], [], decode_weight=4000)
    assert split == Split(
        shares=(Share(("x001", 1), USD // 50),), idle_nusd=2 * USD - USD // 50, outside_nusd=0, busy_ms=36_000
    )


def test_runs_at_the_same_time_share_it_by_their_work() -> None:
    runs = [run(1, 0, 36, prompt=100, completion=25), run(2, 0, 36, prompt=200, completion=0), run(3, 9, 18)]
    split = split_hour(HOUR, 3600, runs, [], decode_weight=4000)
    assert [share.nusd for share in split.shares] == [18, 18, 0]
    assert split.idle_nusd == 3564


def test_an_answer_across_the_hour_pays_in_both_by_what_it_did_there() -> None:
    across = run(1, 3590, 3610, first_s=3598, prompt=1000, completion=120)
    assert across.tokens_within(HOUR) == (1000, 20)
    assert across.tokens_within(HOURS[3]) == (0, 100)


def test_a_clock_that_goes_backwards_costs_nothing_but_shares_what_ran() -> None:
    back = run(1, 20, 10, first_s=15, prompt=500, completion=5)
    split = split_hour(HOUR, 3600, [back], [], decode_weight=4000)
    assert (split.busy_ms, split.idle_nusd) == (0, 3600)
    both = split_hour(HOUR, 3600, [back, run(2, 0, 36, prompt=520)], [], decode_weight=4000)
    assert [share.nusd for share in both.shares] == [18, 18]


def test_work_that_was_not_ours_is_told_by_the_servers_counters() -> None:
    ours = run(1, 0, 30, first_s=10, prompt=1000, completion=100)
    seen = part(0, 3600, prompt=1000, completion=300, busy_s=360)
    split = split_hour(HOUR, 3600, [ours], [seen], decode_weight=4000)
    # 360 s of the hour were busy; 1,400,000 units are ours and 800,000 others'.
    assert (split.idle_nusd, split.shares_nusd, split.outside_nusd) == (3240, 229, 131)


def test_counters_that_say_less_than_we_know_take_nothing_away() -> None:
    ours = run(1, 0, 36, prompt=1000, completion=100)
    split = split_hour(HOUR, 3600, [ours], [part(0, 3600, prompt=10, completion=400)], decode_weight=4000)
    assert (split.idle_nusd, split.shares_nusd, split.outside_nusd) == (3564, 19, 17)


def test_only_what_ran_while_the_server_was_watched_is_taken_from_its_counters() -> None:
    ours = [run(1, 0, 10, completion=100), run(2, 1000, 1010, completion=100)]
    split = split_hour(HOUR, 3600, ours, [part(900, 1200, completion=200, busy_s=20)], decode_weight=1000)
    assert split.busy_ms == 30_000
    assert split.outside_nusd == split.shares[0].nusd == split.shares[1].nusd == 10


def test_a_run_across_gaps_of_the_watch_is_ours_on_both_sides() -> None:
    ours = [run(1, 5, 45, first_s=5, completion=400)]
    seen = [part(0, 15, completion=100), part(35, 50, completion=130)]
    split = split_hour(HOUR, 3600, ours, seen, decode_weight=1000)
    assert (split.shares_nusd, split.outside_nusd) == (37, 3)


def test_idle_time_is_loaded_on_what_ran_where_that_is_wanted() -> None:
    runs = [run(1, 0, 36, prompt=100), run(2, 50, 60, prompt=300)]
    split = split_hour(HOUR, 3600, runs, [], decode_weight=4000, idle_on_runs=True)
    assert [share.nusd for share in split.shares] == [900, 2700]
    assert split_hour(HOUR, 3600, [], [], decode_weight=4000, idle_on_runs=True).idle_nusd == 3600


def test_two_watchers_of_a_server_count_once() -> None:
    long = [part(at, at + 60, watcher="b", completion=1) for at in range(0, 3000, 60)]
    short = [part(at, at + 60, watcher="a", completion=5) for at in range(1200, 3600, 60)]
    chosen = apart([*short, *long])
    assert [one.watcher for one in chosen] == ["b"] * 50 + ["a"] * 10
    assert joined(one.span for one in chosen) == [HOUR]


@given(any_parts())
def test_chosen_parts_never_overlap(parts: list[Part]) -> None:
    chosen = apart(parts)
    assert all(one.span.until_ms <= other.span.from_ms for one, other in pairwise(chosen))
    assert bool(chosen) == any(one.span.ms for one in parts)


@given(st.integers(0, 10**15), st.lists(st.integers(0, 10**12), min_size=1).filter(any))
def test_what_is_divided_is_not_lost_and_not_more_than_a_unit_off(amount: int, weights: list[int]) -> None:
    parts = apportioned(amount, weights)
    assert sum(parts) == amount
    for got, weight in zip(parts, weights, strict=True):
        assert abs(got * sum(weights) - amount * weight) < sum(weights)


def test_of_equal_remainders_the_first_are_rounded_up() -> None:
    assert apportioned(5, [1, 1, 1]) == [2, 2, 1]
    assert apportioned(2, [1, 0, 1, 1]) == [1, 0, 1, 0]
